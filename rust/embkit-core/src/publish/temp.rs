//! Temporary names and the sweeping of those whose writer is dead.

use super::{Op, split, step};
use crate::{Error, Result, blake3_hex};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// After this long an unfinished file of another machine counts as abandoned.
const FOREIGN_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A fresh temporary name beside `path`, recognised by [`sweep_tmp`].
pub fn temp_path(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let (dir, name) = split(path)?;
    let pid = std::process::id();
    let start = start_time(pid).unwrap_or(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}-{pid}-{start}-{n}.tmp", machine()));
    Ok(dir.join(hidden))
}

/// Removes what dead writers left in `dir` (not below it): files and directories with names of
/// [`temp_path`]. A live process's are kept, and those of another machine for a week. Returns how
/// many were removed. Other names ending in `.tmp` are not ours and stay.
pub fn sweep_tmp(dir: &Path) -> Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(Owner::parse) else { continue };
        let path = entry.path();
        if owner.alive(&path) {
            continue;
        }
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        let done = step(Op::Remove(&path), || {
            if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }
        });
        match done {
            Ok(()) => removed += 1,
            // Someone else swept it first.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&path, e)),
        }
    }
    Ok(removed)
}

/// Who wrote a temporary file, from its name.
#[derive(Debug, PartialEq)]
struct Owner<'a> {
    machine: &'a str,
    pid: u32,
    start: u64,
}

impl Owner<'_> {
    fn parse(name: &str) -> Option<Owner<'_>> {
        let stem = name.strip_prefix('.')?.strip_suffix(".tmp")?;
        let (_, tag) = stem.rsplit_once('.')?;
        let mut parts = tag.split('-');
        let machine = parts.next().filter(|m| m.len() == 8)?;
        let pid = parts.next()?.parse().ok()?;
        let start = parts.next()?.parse().ok()?;
        parts.next()?.parse::<u64>().ok()?;
        parts.next().is_none().then_some(Owner { machine, pid, start })
    }

    fn alive(&self, path: &Path) -> bool {
        // Start 0: a system without /proc, where only age can tell.
        if self.machine == machine() && self.start != 0 {
            return start_time(self.pid) == Some(self.start);
        }
        let modified = fs::symlink_metadata(path).and_then(|m| m.modified());
        let age = modified.ok().and_then(|m| SystemTime::now().duration_since(m).ok());
        age.is_none_or(|a| a < FOREIGN_AGE)
    }
}

/// Start time of a process in clock ticks since boot, or `None` when there is none (or it is a
/// zombie, which writes no more).
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the command in parentheses, may hold spaces: count from its end.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

/// Eight hex digits that differ between machines and between containers: within one value, process
/// numbers mean the same thing.
fn machine() -> &'static str {
    static TAG: OnceLock<String> = OnceLock::new();
    TAG.get_or_init(|| {
        let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
        let space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let text = [
            read("/etc/machine-id"),
            read("/proc/sys/kernel/hostname"),
            space.to_string_lossy().into_owned(),
        ];
        blake3_hex(text.join("\n").as_bytes()).chars().take(8).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_owner() {
        let path = temp_path(Path::new("a.b/c-d.e")).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let pid = std::process::id();
        let me = Owner { machine: machine(), pid, start: start_time(pid).unwrap() };
        assert_eq!(Owner::parse(name), Some(me));
        assert_eq!(path.parent(), Some(Path::new("a.b")));
        for other in
            ["x.tmp", ".x.tmp", ".x.12345678-1-2.tmp", ".x.12345678-1-2-3-4.tmp", ".x.1-2-3-4.tmp"]
        {
            assert_eq!(Owner::parse(other), None, "{other}");
        }
    }

    #[test]
    fn only_the_dead_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: String| fs::write(dir.path().join(name), "x").unwrap();
        let (m, pid) = (machine(), std::process::id());
        let start = start_time(pid).unwrap();
        put(format!(".live.{m}-{pid}-{start}-0.tmp"));
        put(format!(".reused-pid.{m}-{pid}-{}-0.tmp", start + 1));
        put(format!(".dead.{m}-{}-5-0.tmp", u32::MAX));
        put(".elsewhere.00000000-1-1-0.tmp".into());
        put(".elsewhere-old.00000000-1-1-1.tmp".into());
        put("theirs.tmp".into());
        fs::create_dir_all(dir.path().join(format!(".dir.{m}-{}-5-1.tmp/sub", u32::MAX))).unwrap();
        let old = fs::File::open(dir.path().join(".elsewhere-old.00000000-1-1-1.tmp")).unwrap();
        old.set_modified(SystemTime::now() - FOREIGN_AGE * 2).unwrap();

        assert_eq!(sweep_tmp(dir.path()).unwrap(), 4);
        let mut left: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let live = format!(".live.{m}-{pid}-{start}-0.tmp");
        assert_eq!(left, [".elsewhere.00000000-1-1-0.tmp".to_owned(), live, "theirs.tmp".into()]);
        assert_eq!(sweep_tmp(dir.path()).unwrap(), 0);
    }
}
