//! Exact nearest neighbours, and the rules that turn them into hard negatives.
//!
//! * [`topk`]: every query against every corpus row in f32, in cache-sized blocks, with the score
//!   matrix never written: a tile of scores is compared with each query's running k-th best while
//!   it is still in registers, and only the survivors are looked at one by one.
//! * [`filter`]: which of the found rows are safe to call negatives, and an audit of why not.
//!
//! `unsafe` lives in `simd/` only; `naive` has the slow form of everything.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod filter;
pub mod naive;
mod simd;
mod topk;

pub use filter::{
    Audit, Bounds, Candidates, Corpus, FilterParams, NONE, Negatives, Queries, RELAXED, Refill,
    Rerank, Rule, Sample, Sketches, Trace, filter,
};
pub use simd::Isa;
pub use topk::{TopK, topk, topk_on};
