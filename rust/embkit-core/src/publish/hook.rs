//! A look into each operation of a publish, for the tests of what survives a failure.
//!
//! Costs one thread-local load per system call when unused. Per thread, so that tests that publish
//! side by side do not see each other.

use std::cell::RefCell;
use std::io;
use std::path::Path;

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

type Hook = Box<dyn FnMut(&Op) -> io::Result<()>>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Runs `body` with `hook` called before each publish operation of this thread; an error from the
/// hook takes the place of the operation.
pub fn with_hook<T>(
    hook: impl FnMut(&Op) -> io::Result<()> + 'static,
    body: impl FnOnce() -> T,
) -> T {
    struct Reset;
    impl Drop for Reset {
        fn drop(&mut self) {
            HOOK.set(None);
        }
    }
    HOOK.set(Some(Box::new(hook)));
    let _reset = Reset; // also when `body` panics
    body()
}

pub(super) fn before(op: &Op) -> io::Result<()> {
    HOOK.with_borrow_mut(|hook| hook.as_mut().map_or(Ok(()), |h| h(op)))
}
