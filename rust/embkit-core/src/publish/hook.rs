//! A look into each operation of a publish, for the tests of what survives a failure.
//!
//! Costs one atomic load per system call when unused. A hook sees the operations under its own
//! directory, of whatever thread: tests that publish side by side do not see each other.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// One operation, about to happen.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Creates this file, which must not exist.
    Create(&'a Path),
    /// Appends these bytes to this file.
    Write(&'a Path, &'a [u8]),
    /// Sets this file's mode.
    Chmod(&'a Path, u32),
    /// Makes this file's content durable.
    Sync(&'a Path),
    /// Makes this directory's names durable.
    SyncDir(&'a Path),
    /// Renames the first to the second.
    Rename(&'a Path, &'a Path),
    /// Exchanges the two names.
    Exchange(&'a Path, &'a Path),
    /// Removes this file or tree.
    Remove(&'a Path),
}

impl<'a> Op<'a> {
    /// The file or directory concerned; of two the first.
    pub fn path(&self) -> &'a Path {
        match *self {
            Op::Create(p)
            | Op::Write(p, _)
            | Op::Chmod(p, _)
            | Op::Sync(p)
            | Op::SyncDir(p)
            | Op::Rename(p, _)
            | Op::Exchange(p, _)
            | Op::Remove(p) => p,
        }
    }
}

type Hook = Arc<Mutex<dyn FnMut(&Op) -> io::Result<()> + Send>>;

static HOOKS: Mutex<Vec<(PathBuf, Hook)>> = Mutex::new(Vec::new());
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Runs `body` with `hook` called before each publish operation on something in `dir`; an error
/// from the hook takes the place of the operation.
pub fn with_hook<T>(
    dir: &Path,
    hook: impl FnMut(&Op) -> io::Result<()> + Send + 'static,
    body: impl FnOnce() -> T,
) -> T {
    struct Reset(PathBuf);
    impl Drop for Reset {
        fn drop(&mut self) {
            hooks().retain(|(dir, _)| *dir != self.0);
            COUNT.fetch_sub(1, Ordering::Relaxed);
        }
    }
    hooks().push((dir.to_owned(), Arc::new(Mutex::new(hook))));
    COUNT.fetch_add(1, Ordering::Relaxed);
    let _reset = Reset(dir.to_owned()); // also when `body` panics
    body()
}

fn hooks() -> std::sync::MutexGuard<'static, Vec<(PathBuf, Hook)>> {
    HOOKS.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn before(op: &Op) -> io::Result<()> {
    if COUNT.load(Ordering::Relaxed) == 0 {
        return Ok(());
    }
    let found = hooks().iter().find(|(dir, _)| op.path().starts_with(dir)).map(|(_, h)| h.clone());
    let Some(hook) = found else { return Ok(()) };
    let mut hook = hook.lock().unwrap_or_else(PoisonError::into_inner);
    hook(op)
}
