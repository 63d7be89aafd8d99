//! The handle through which a long function reports progress and learns that it should stop.

use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared by a worker and its owner. Every long function takes `&Job`, calls [`Job::check`] at
/// least every 50 ms of work, and counts finished units with [`Job::advance`].
#[derive(Debug, Default)]
pub struct Job {
    /// Set by the owner to stop the work.
    pub cancel: AtomicBool,
    /// Units of work done so far (rows, queries: the function says which).
    pub done: AtomicU64,
}

impl Job {
    /// A job that has done nothing and is not cancelled.
    pub fn new() -> Job {
        Job::default()
    }

    /// `Err(Cancelled)` once [`Job::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Counts `n` more units as done.
    pub fn advance(&self, n: u64) {
        self.done.fetch_add(n, Ordering::Relaxed);
    }

    /// Asks the work to stop at its next [`Job::check`].
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cancel_reaches_check_and_advance_adds() {
        let job = Job::new();
        job.advance(2);
        job.advance(3);
        assert_eq!(job.done.load(Ordering::Relaxed), 5);
        assert!(job.check().is_ok());
        job.cancel();
        assert!(matches!(job.check(), Err(Error::Cancelled)));
    }
}
