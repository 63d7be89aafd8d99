//! Nearest neighbours of many queries at once, and the rules that turn them into hard negatives.
//!
//! * [`topk`]: exact. Tiles of int8 products are compared with each query's bar while they are in
//!   registers; what passes is scored in f32; the bar lies low enough that nothing is missed.
//! * [`Ivf`] and [`calibrate`]: the lists nearest to each query, as many as a measured recall takes.
//! * [`filter`]: which of the found rows are safe to call negatives, and an audit of why not.
//!
//! `unsafe` lives in `simd/` only; `naive` has the slow form of everything.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod best;
mod encode;
mod filter;
mod ivf;
pub mod naive;
mod recall;
mod simd;
mod topk;
mod vectors;

pub use filter::{
    Audit, Bounds, Candidates, Corpus, FilterParams, NONE, Negatives, Queries, RELAXED, Refill,
    Rerank, Rule, Sample, Sketches, Trace, filter,
};
pub use ivf::{Ivf, list_count};
pub use recall::{Calibration, calibrate};
pub use simd::Isa;
pub use topk::{SearchParams, TopK, topk};
pub use vectors::{Part, Vectors, dot};
