//! Texts in, packed batches out.
//!
//! * [`records`]: jsonl rows to distinct texts and examples, faulty rows counted and sampled,
//! * [`tokenize`]: distinct texts to token shards, resumable, the same bytes for any thread count,
//! * [`read`]: token shards as one table of rows,
//! * [`plan`]: which examples are the batch of a step,
//! * [`batch`]: a step's rows, keys and micro-batches, filled into one buffer,
//! * [`compose`]: stores merged, or cut to some of their rows,
//! * [`naive`]: the same results by the shortest code, for tests and benches.
//!
//! Nothing here knows Python or torch; `embkit-py` wraps these functions one to one.

// Bytes that come from a file are never indexed or unwrapped: a damaged file is an error.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::unwrap_used))]

pub mod batch;
pub mod compose;
pub mod naive;
pub mod plan;
pub mod read;
pub mod records;
mod simd;
pub mod tokenize;
