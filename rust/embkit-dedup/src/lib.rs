//! Text deduplication: which rows say the same thing, and which rows leak into an evaluation set.
//!
//! Both answers are *exact*: MinHash only proposes pairs, the Jaccard similarity of the stored
//! text decides. What "the same" means is fixed in [`normalize`] (letters) and [`shingle`]
//! (n-grams), and nowhere else, so that mining can reuse it for its near-duplicate rule.
//!
//! The oddity to know: clusters are stars. Every member is similar to its representative, two
//! members need not be similar to each other, and one edge per member is all that is stored.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]

mod against;
mod contamination;
mod exact;
pub mod filter;
mod minhash;
pub mod naive;
mod near;
pub mod normalize;
pub mod shingle;
mod simd;
mod units;

pub use against::{Matches, near_matches};
pub use contamination::{CommonGram, Contamination, ContaminationParams, Hit, contamination};
pub use exact::{ExactParams, Punctuation, exact_duplicates};
pub use minhash::Bands;
pub use near::{Clusters, DedupParams, near_duplicates};
pub use normalize::normalize;
pub use shingle::{ShingleParams, Shingler, jaccard, shingles};
pub use units::Units;
