//! The one error type. Every message says what is wrong, where, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// Result of everything in the Rust half of embkit.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, by who has to act.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes of a file contradict themselves or their checksum.
    #[error("{}: {what}. {fix}", path.display())]
    Corrupt {
        /// The damaged file.
        path: PathBuf,
        /// What does not fit.
        what: String,
        /// What the user can do.
        fix: String,
    },
    /// The file is sound but was written in a newer format than this embkit reads.
    #[error(
        "{}: is {found}, and this is embkit {} which reads {supported}. Install the newer embkit, \
         or write the file again with this one",
        path.display(),
        env!("CARGO_PKG_VERSION")
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Its format and version, and the embkit it needs when the file says so.
        found: String,
        /// The newest version read here.
        supported: String,
    },
    /// The caller asked for something that cannot be done.
    #[error("{what}. {fix}")]
    Usage {
        /// What was asked.
        what: String,
        /// What to ask instead.
        fix: String,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The job was cancelled by its owner; no output was published.
    #[error("cancelled")]
    Cancelled,
}

/// Advice for a file whose bytes are damaged.
pub(crate) const RESTORE: &str =
    "Restore the file from a copy, or delete it and run the stage that wrote it again";

impl Error {
    /// A [`Error::Corrupt`] with the usual advice (restore it, or write it again).
    pub fn corrupt(path: &Path, what: impl Into<String>) -> Error {
        Error::Corrupt { path: path.to_owned(), what: what.into(), fix: RESTORE.into() }
    }

    /// A [`Error::Usage`].
    pub fn usage(what: impl Into<String>, fix: impl Into<String>) -> Error {
        Error::Usage { what: what.into(), fix: fix.into() }
    }

    /// A [`Error::Io`] about `path`.
    pub fn io(path: &Path, source: impl Into<io::Error>) -> Error {
        Error::Io { path: path.to_owned(), source: source.into() }
    }
}
