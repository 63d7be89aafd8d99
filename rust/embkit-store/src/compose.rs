//! Stores out of stores: the rows that a merged store has, and rows of stores written as a store.
//!
//! Rows of several stores are counted on across them ([`Stores`]): first all of the first store,
//! then all of the second. [`merge_rows`] finds the texts that they share, [`write`] copies the
//! rows of a plan into new shards. A shard of the first store whose rows all stay as they are is
//! not copied but linked, so that appending a little to a large store costs little.
//!
//! Oddity: a row's tokens do not tell whether its text was cut or just fits, so the `truncated` of
//! a written shard counts the rows that are as long as the limit.

mod rows;
mod shards;
mod write;

pub use rows::{Merged, merge_rows};
pub use shards::Stores;
pub use write::{Report, write};

/// The rows of a store to be; all columns have one length.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The row of [`Stores`] whose tokens and text are taken.
    pub row: &'a [u64],
    /// Identity of the text.
    pub text_id: &'a [u64],
    /// Near-duplicate cluster.
    pub cluster: &'a [u64],
    /// 0 query, 1 passage, 2 both.
    pub role: &'a [u8],
    /// Index of the source.
    pub source: &'a [u16],
}
