//! The inner loops of dedup worth wide registers. Integers only: every copy returns the same bits.

mod minhash;
mod words;

pub(crate) use minhash::{LANES, minhash};
pub(crate) use words::{BLOCK, word_masks};
