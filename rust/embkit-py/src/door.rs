//! The one door for long calls: no GIL, Ctrl-C within 50 ms, progress reported.

use crate::error::to_py;
use embkit_core::{Job, Result};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// How often signals are looked at and progress is reported.
const TICK: Duration = Duration::from_millis(50);

/// Runs `work` on a thread of its own. The calling thread waits without the GIL, looks for signals
/// and calls `progress(done)` every 50 ms, and once more at the end. An exception from either
/// cancels the work, waits for it to stop, and is raised.
pub(crate) fn long<T: Send>(
    py: Python,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&Job) -> Result<T> + Send,
) -> PyResult<T> {
    let job = Job::new();
    let over = AtomicBool::new(false);
    let waiting = thread::current();
    let mut told = None;
    let mut raised = None;
    let result = thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _wake = Wake { over: &over, waiting: &waiting };
            work(&job)
        });
        loop {
            py.detach(|| {
                if !over.load(Ordering::Acquire) {
                    thread::park_timeout(TICK);
                }
            });
            let done = job.done.load(Ordering::Relaxed);
            let report = match progress {
                Some(call) if told != Some(done) => call.call1((done,)).map(|_| ()),
                _ => Ok(()),
            };
            told = Some(done);
            if let Err(e) = py.check_signals().and(report) {
                raised.get_or_insert(e);
                job.cancel();
                break;
            }
            if over.load(Ordering::Acquire) && job.done.load(Ordering::Relaxed) == done {
                break;
            }
        }
        py.detach(|| worker.join())
    });
    match (raised, result) {
        (_, Err(panic)) => std::panic::resume_unwind(panic),
        (Some(e), _) => Err(e),
        (None, Ok(result)) => result.map_err(|e| to_py(py, e)),
    }
}

/// Runs something short without the GIL on this thread.
pub(crate) fn short<T: Send>(py: Python, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(work).map_err(|e| to_py(py, e))
}

/// Says that the worker is over, also when it panics.
struct Wake<'a> {
    over: &'a AtomicBool,
    waiting: &'a thread::Thread,
}

impl Drop for Wake<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        self.waiting.unpark();
    }
}
