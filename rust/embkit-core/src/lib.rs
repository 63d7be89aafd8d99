//! The bottom of embkit: everything that touches a disk, a checksum, a thread or an order.
//!
//! Nothing above this crate creates a file, so the promises about files (whole or absent, every
//! flipped bit seen, no allocation sized by an unchecked number) are kept in one place:
//!
//! * [`container`]: the one file form, a `.safetensors` file with checksums,
//! * [`manifest`]: canonical JSON with a checksum,
//! * [`publish`]: temp file, fsync, rename, fsync of the directory,
//! * [`permute`]: the order of rows as a function, not a table,
//! * [`par`] and [`Job`]: threads whose number never shows in a result, and cancellation.
//!
//! The byte-level specification is `docs/formats.md`.

#[cfg(target_endian = "big")]
compile_error!("embkit maps little-endian files in place and does not run on big-endian machines");

pub mod container;
mod error;
mod hash;
mod header;
mod job;
pub mod manifest;
mod mmap;
pub mod par;
pub mod permute;
pub mod publish;
pub mod text;

pub use error::{Error, Result};
pub use hash::{blake3_file, blake3_hex, crc32c, crc32c_append, hash128, text_id};
pub use job::Job;
pub use text::{TextShard, Texts};
