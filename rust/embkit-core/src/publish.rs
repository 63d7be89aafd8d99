//! Atomic publish: the only code in embkit that creates a file under its final name.
//!
//! A file: temporary name in the same directory (`O_EXCL`), write, check the length, mode, fsync,
//! rename, fsync of the directory. A directory: fsync of everything in it, then one rename, or an
//! exchange with the old one, which is deleted last. Readers see the old state or the new one.
//!
//! Oddity: temporary names carry machine, process and the process's start time
//! (`.NAME.<machine>-<pid>-<start>-<n>.tmp`), so that [`sweep_tmp`] can tell a dead writer's file
//! from a live one's. Where the file system cannot exchange (NFS), the old directory is moved
//! aside to `.NAME.previous` for an instant; [`current`] finds it there.

use crate::{Error, Result};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

mod hook;
mod temp;

pub use hook::{Op, with_hook};
pub use temp::{sweep_tmp, temp_path};

/// Publishes `bytes` as the file `path`, replacing a file that is there.
///
/// Mode: that of the replaced regular file, otherwise `0o666` under the umask. A symbolic link at
/// `path` is replaced, not followed. On an error the old state is intact and nothing is left, with
/// one exception: when only the last fsync of the directory fails, the new file is in place, whole.
pub fn publish_file(path: &Path, bytes: &[u8]) -> Result<()> {
    publish_parts(path, &[bytes])
}

/// [`publish_file`] for content that lies in pieces.
pub fn publish_parts(path: &Path, parts: &[&[u8]]) -> Result<()> {
    let (dir, _) = split(path)?;
    let temp = temp_path(path)?;
    let old_mode = match fs::symlink_metadata(path) {
        Ok(m) if m.is_file() => Some(m.permissions().mode() & 0o777),
        Ok(m) if m.is_dir() => return Err(Error::io(path, Errno::ISDIR)),
        _ => None,
    };
    let result = fill(&temp, parts, old_mode).and_then(|()| {
        step(Op::Rename(&temp, path), || fs::rename(&temp, path)).map_err(|e| Error::io(path, e))
    });
    if let Err(e) = result {
        let _ = fs::remove_file(&temp); // best effort: the error that matters is already known
        return Err(e);
    }
    sync_dir(&dir)
}

/// Creates the temporary file and makes its content durable.
fn fill(temp: &Path, parts: &[&[u8]], mode: Option<u32>) -> Result<()> {
    let io = |e: io::Error| Error::io(temp, e);
    let mut file = step(Op::Create(temp), || {
        OpenOptions::new().write(true).create_new(true).mode(0o666).open(temp)
    })
    .map_err(io)?;
    let mut expected = 0u64;
    for part in parts {
        step(Op::Write(temp, part), || file.write_all(part)).map_err(io)?;
        expected += part.len() as u64;
    }
    let length = file.metadata().map_err(io)?.len();
    if length != expected {
        let what = format!("holds {length} bytes after {expected} were written");
        return Err(io(io::Error::new(io::ErrorKind::WriteZero, what)));
    }
    if let Some(mode) = mode {
        step(Op::Chmod(temp, mode), || file.set_permissions(Permissions::from_mode(mode)))
            .map_err(io)?;
    }
    step(Op::Sync(temp), || file.sync_all()).map_err(io)
}

/// Publishes the directory `tmp` as `final_`, replacing a directory that is there.
///
/// Both must have the same parent's file system. Everything inside is fsynced first. Afterwards
/// `tmp` is gone. On an error `final_` is as before and `tmp` still holds the new content.
pub fn publish_dir(tmp: &Path, final_: &Path) -> Result<()> {
    let (parent, _) = split(final_)?;
    sync_tree(tmp)?;
    restore_aside(final_)?;
    match step(Op::Rename(tmp, final_), || rename_new(tmp, final_)) {
        Ok(()) => {
            return sync_dir(&parent).inspect_err(|_| {
                let _ = rename_new(final_, tmp);
            });
        }
        Err(e) if is(&e, &[Errno::EXIST, Errno::NOTEMPTY]) => {}
        Err(e) => return Err(Error::io(final_, e)),
    }
    if !fs::symlink_metadata(final_).map_err(|e| Error::io(final_, e))?.is_dir() {
        return Err(Error::io(final_, Errno::NOTDIR));
    }
    // The exchange leaves the old content under the new one's former name. That must be a name
    // that is swept, not `tmp`, from which the next run might adopt files.
    let temp = temp_path(final_)?;
    step(Op::Rename(tmp, &temp), || fs::rename(tmp, &temp)).map_err(|e| Error::io(tmp, e))?;
    if let Err(e) = replace(&temp, final_) {
        let _ = fs::rename(&temp, tmp);
        return Err(e);
    }
    if let Err(e) = sync_dir(&parent) {
        // Not known to be durable, so the old content may not be deleted: go back to it.
        let _ = replace(&temp, final_);
        let _ = fs::rename(&temp, tmp);
        return Err(e);
    }
    // The new state is durable: a failure from here on leaves at worst a directory to sweep.
    let _ = step(Op::Remove(&temp), || fs::remove_dir_all(&temp));
    Ok(())
}

/// Gives published files in `dir` their last names and removes what is left over, durably.
///
/// Each step is atomic and no content changes, so a crash leaves every file whole under its old or
/// its new name: the caller must recognise both.
pub fn settle(dir: &Path, renames: &[(PathBuf, PathBuf)], left_over: &[PathBuf]) -> Result<()> {
    for (from, to) in renames {
        step(Op::Rename(from, to), || fs::rename(from, to)).map_err(|e| Error::io(from, e))?;
    }
    for path in left_over {
        step(Op::Remove(path), || fs::remove_file(path)).map_err(|e| Error::io(path, e))?;
    }
    sync_dir(dir)
}

/// Puts `temp` in the place of the existing directory `final_`; `temp` then holds the old one.
fn replace(temp: &Path, final_: &Path) -> Result<()> {
    let exchanged = step(Op::Exchange(temp, final_), || {
        Ok(renameat_with(CWD, temp, CWD, final_, RenameFlags::EXCHANGE)?)
    });
    match exchanged {
        Ok(()) => return Ok(()),
        Err(e) if is(&e, &[Errno::INVAL, Errno::NOSYS, Errno::OPNOTSUPP]) => {}
        Err(e) => return Err(Error::io(final_, e)),
    }
    let aside = aside(final_)?;
    let io = |e| Error::io(final_, e);
    step(Op::Rename(final_, &aside), || fs::rename(final_, &aside)).map_err(io)?;
    if let Err(e) = step(Op::Rename(temp, final_), || fs::rename(temp, final_)) {
        let _ = fs::rename(&aside, final_);
        return Err(io(e));
    }
    // `final_` is in place; if this fails, `restore_aside` tidies up the next time.
    let _ = step(Op::Rename(&aside, temp), || fs::rename(&aside, temp));
    Ok(())
}

/// Where the published directory is: `path`, or `.NAME.previous` beside it when a replacement was
/// cut short between its two renames (file systems without exchange only).
pub fn current(path: &Path) -> PathBuf {
    match aside(path) {
        Ok(aside) if fs::symlink_metadata(path).is_err() && aside.is_dir() => aside,
        _ => path.to_owned(),
    }
}

/// Ends a replacement that was cut short: back to its name, or away when the new one is in place.
fn restore_aside(final_: &Path) -> Result<()> {
    let aside = aside(final_)?;
    if fs::symlink_metadata(&aside).is_err() {
        return Ok(());
    }
    let done = if fs::symlink_metadata(final_).is_err() {
        step(Op::Rename(&aside, final_), || fs::rename(&aside, final_))
    } else {
        step(Op::Remove(&aside), || fs::remove_dir_all(&aside))
    };
    done.map_err(|e| Error::io(&aside, e))
}

fn aside(path: &Path) -> Result<PathBuf> {
    let (dir, name) = split(path)?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".previous");
    Ok(dir.join(hidden))
}

/// Renames only when nothing has the new name, also where the kernel cannot promise it (NFS).
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        other => return Ok(other?),
    }
    if fs::symlink_metadata(to).is_ok() {
        return Err(Errno::EXIST.into());
    }
    fs::rename(from, to)
}

/// fsyncs every file and directory under `dir`, children first. Symbolic links are refused: what
/// they point to is not part of the published state.
fn sync_tree(dir: &Path) -> Result<()> {
    let io = |e| Error::io(dir, e);
    let mut entries: Vec<_> =
        fs::read_dir(dir).map_err(io)?.collect::<io::Result<_>>().map_err(io)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let kind = entry.file_type().map_err(|e| Error::io(&path, e))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            step(Op::Sync(&path), || File::open(&path)?.sync_all())
                .map_err(|e| Error::io(&path, e))?;
        } else {
            return Err(Error::usage(
                format!("{}: is neither a file nor a directory", path.display()),
                "Publish copies instead of links",
            ));
        }
    }
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<()> {
    step(Op::SyncDir(dir), || File::open(dir)?.sync_all()).map_err(|e| Error::io(dir, e))
}

/// Parent directory (never empty) and last name of a path.
fn split(path: &Path) -> Result<(PathBuf, &OsStr)> {
    let Some(name) = path.file_name() else {
        return Err(Error::usage(
            format!("{}: names no file", path.display()),
            "Give a path that ends in a name",
        ));
    };
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((dir.to_owned(), name))
}

fn is(e: &io::Error, any: &[Errno]) -> bool {
    any.iter().any(|a| e.raw_os_error() == Some(a.raw_os_error()))
}

/// Runs one operation through the test hook.
fn step<T>(op: Op, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    hook::before(&op)?;
    run()
}
