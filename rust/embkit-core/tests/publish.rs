//! Publishing when the n-th operation fails, for every n: old state or new state, nothing else.

use embkit_core::publish::{self, Op, publish_dir, publish_file, publish_parts, with_hook};
use embkit_core::{Error, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Every path below `dir` with its content (directories: none).
fn tree(dir: &Path) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut out = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(at) = todo.pop() {
        for e in fs::read_dir(&at).unwrap() {
            let path = e.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                todo.push(path);
                out.insert(name, None);
            } else {
                out.insert(name, Some(fs::read(&path).unwrap()));
            }
        }
    }
    out
}

fn fill(dir: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Runs `body` with operation `n` in `dir` failing; whether `n` was reached, and the result.
fn failing(
    dir: &Path,
    n: usize,
    no_exchange: bool,
    body: impl FnOnce() -> Result<()>,
) -> (bool, Result<()>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let hook = move |op: &Op| {
        if no_exchange && matches!(op, Op::Exchange(..)) {
            return Err(io::Error::from_raw_os_error(22)); // EINVAL: not on this file system
        }
        let now = count.fetch_add(1, Ordering::Relaxed) + 1;
        if now == n { Err(io::Error::from_raw_os_error(28)) } else { Ok(()) } // ENOSPC
    };
    let result = with_hook(dir, hook, body);
    (seen.load(Ordering::Relaxed) >= n, result)
}

#[test]
fn a_file_is_old_or_new_after_each_failure() {
    for old in [None, Some("old")] {
        for n in 1.. {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            if let Some(old) = old {
                fs::write(&path, old).unwrap();
            }
            let before = tree(dir.path());
            let (reached, result) =
                failing(dir.path(), n, false, || publish_parts(&path, &[b"new", b"", b"er"]));
            let after = tree(dir.path());
            let new = BTreeMap::from([("f".to_owned(), Some(b"newer".to_vec()))]);
            if !reached {
                result.unwrap();
                assert_eq!(after, new);
                assert!(n >= 8, "only {n} operations");
                break;
            }
            let Err(Error::Io { source, .. }) = result else {
                panic!("operation {n}: no I/O error")
            };
            assert_eq!(source.raw_os_error(), Some(28));
            // Only the last operation, the directory's fsync, comes after the rename.
            assert!(after == before || (after == new && n >= 7), "operation {n}: {after:?}");
        }
    }
}

#[test]
fn a_directory_is_old_or_new_after_each_failure() {
    let old: &[(&str, &str)] = &[("a", "old"), ("sub/gone", "x")];
    let new: &[(&str, &str)] = &[("a", "new"), ("sub/b", "y"), ("manifest.json", "{}")];
    for (replace, no_exchange) in [(false, false), (true, false), (true, true)] {
        for n in 1.. {
            let root = tempfile::tempdir().unwrap();
            let (tmp, out) = (root.path().join(".partial-1"), root.path().join("out"));
            fill(&tmp, new);
            if replace {
                fill(&out, old);
            }
            let before = tree(root.path());
            let wanted = tree(&tmp);
            let (reached, result) =
                failing(root.path(), n, no_exchange, || publish_dir(&tmp, &out));
            let after = tree(root.path());
            let context = format!("replace {replace} no_exchange {no_exchange} operation {n}");
            if result.is_ok() {
                // Failing to delete what was replaced is not a failure; the rest is swept later.
                assert_eq!(tree(&out), wanted, "{context}");
                assert!(!tmp.exists());
            } else {
                assert!(reached, "{context}");
                assert_eq!(after, before, "{context}");
            }
            if !reached {
                assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{context}: leftovers");
                assert!(n > 7);
                break;
            }
        }
    }
}

#[test]
fn a_published_directory_is_durable_in_order() {
    let root = tempfile::tempdir().unwrap();
    let (tmp, out) = (root.path().join("t"), root.path().join("out"));
    fill(&tmp, &[("b/c", "1"), ("a", "2")]);
    let log = Arc::new(Mutex::new(Vec::new()));
    let seen = log.clone();
    let hook = move |op: &Op| {
        let name = |p: &Path| p.file_name().unwrap().to_str().unwrap().to_owned();
        seen.lock().unwrap().push(match op {
            Op::Sync(p) => format!("sync {}", name(p)),
            Op::SyncDir(p) if p.ends_with("t") || p.ends_with("b") => format!("dir {}", name(p)),
            Op::SyncDir(_) => "dir .".into(),
            Op::Rename(a, b) => format!("rename {} {}", name(a), name(b)),
            other => format!("{other:?}"),
        });
        Ok(())
    };
    with_hook(root.path(), hook, || publish_dir(&tmp, &out)).unwrap();
    assert_eq!(
        *log.lock().unwrap(),
        ["sync a", "sync c", "dir b", "dir t", "rename t out", "dir ."]
    );
}

/// A crash between the two renames of a file system without exchange.
#[test]
fn a_replacement_cut_short_is_found_and_finished() {
    let root = tempfile::tempdir().unwrap();
    let (out, aside) = (root.path().join("out"), root.path().join(".out.previous"));
    fill(&aside, &[("a", "old")]);
    assert_eq!(publish::current(&out), aside);
    let tmp = root.path().join("t");
    fill(&tmp, &[("a", "new")]);
    publish_dir(&tmp, &out).unwrap();
    assert_eq!(publish::current(&out), out);
    assert_eq!(fs::read(out.join("a")).unwrap(), b"new");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    fill(&aside, &[("a", "older")]);
    fill(&tmp, &[("a", "newest")]);
    publish_dir(&tmp, &out).unwrap();
    assert_eq!(fs::read(out.join("a")).unwrap(), b"newest");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
}

#[test]
fn what_is_not_a_target_is_refused_whole() {
    let root = tempfile::tempdir().unwrap();
    let at = |n: &str| root.path().join(n);
    fill(root.path(), &[("dir/a", "1"), ("file", "2"), ("t/a", "3")]);
    let before = tree(root.path());
    assert!(matches!(publish_file(&at("dir"), b"x"), Err(Error::Io { .. })));
    assert!(matches!(publish_file(Path::new("/"), b"x"), Err(Error::Usage { .. })));
    assert!(matches!(publish_file(&at("no/f"), b"x"), Err(Error::Io { .. })));
    assert!(matches!(publish_dir(&at("t"), &at("file")), Err(Error::Io { .. })));
    assert!(matches!(publish_dir(&at("missing"), &at("out")), Err(Error::Io { .. })));
    assert_eq!(tree(root.path()), before);
    std::os::unix::fs::symlink(at("file"), at("t/link")).unwrap();
    assert!(matches!(publish_dir(&at("t"), &at("out")), Err(Error::Usage { .. })));
    assert!(!at("out").exists());
}

#[test]
fn a_link_is_replaced_not_followed() {
    let root = tempfile::tempdir().unwrap();
    let (target, link) = (root.path().join("target"), root.path().join("link"));
    fs::write(&target, "kept").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    publish_file(&link, b"new").unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"kept");
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

/// Eight writers of one name: the winner is one of them, whole, and nothing is left.
#[test]
fn writers_may_race() {
    let root = tempfile::tempdir().unwrap();
    let (file, dir) = (root.path().join("f"), root.path().join("d"));
    std::thread::scope(|s| {
        for i in 0..8u8 {
            let (file, dir, root) = (&file, &dir, root.path());
            s.spawn(move || {
                for round in 0..10 {
                    publish_file(file, &[i; 5000]).unwrap();
                    let tmp = root.join(format!("t-{i}-{round}"));
                    fill(&tmp, &[("a", &i.to_string()), ("b", &i.to_string())]);
                    publish_dir(&tmp, dir).unwrap();
                }
            });
        }
    });
    let bytes = fs::read(&file).unwrap();
    assert!(bytes.len() == 5000 && bytes.iter().all(|b| *b == bytes[0]));
    assert_eq!(fs::read(dir.join("a")).unwrap(), fs::read(dir.join("b")).unwrap());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
}
