//! Power loss during a publish: in every state that the disk may be in, the old content or the new
//! one is there. The model of the disk is in `common/crash.rs`.

#[path = "common/crash.rs"]
mod crash;

use crash::{Disk, Step, crashes, record};
use embkit_core::publish::{publish_dir, publish_parts};
use std::fs;
use std::path::{Path, PathBuf};

/// What lies under `path`, with names relative to it.
fn below(disk: &Disk, path: &str) -> Disk {
    let rest =
        |(k, v): (&PathBuf, &Vec<u8>)| Some((k.strip_prefix(path).ok()?.to_owned(), v.clone()));
    disk.iter().filter_map(rest).collect()
}

fn disk(files: &[(&str, &str)]) -> Disk {
    files.iter().map(|(k, v)| (PathBuf::from(k), v.as_bytes().to_vec())).collect()
}

fn put(root: &Path, disk: &Disk) {
    for (name, bytes) in disk {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), bytes).unwrap();
    }
}

/// Every crash shows the old or the new state under `name`; both are seen; the last is the new.
fn check(start: &Disk, steps: &[Step], name: &str, new: &Disk) {
    let states = crashes(start, steps);
    assert!(states.len() >= 20 && states.len() <= 4096, "{} states", states.len());
    let old = below(start, name);
    let (mut olds, mut news) = (0, 0);
    for state in &states {
        match below(state, name) {
            now if now == old => olds += 1,
            now if now == *new => news += 1,
            now => panic!("torn: {now:?}\nin {steps:#?}"),
        }
    }
    assert!(olds > 0 && news > 0, "{olds} old, {news} new");
    let done = states.last().map(|s| below(s, name));
    assert_eq!(done.as_ref(), Some(new), "not durable at the end");
}

#[test]
fn a_file_survives_power_loss() {
    for old in [&[][..], &[("f", "old")][..]] {
        let root = tempfile::tempdir().unwrap();
        let start = disk(old);
        put(root.path(), &start);
        let path = root.path().join("f");
        let steps = record(root.path(), || publish_parts(&path, &[b"header", b"body"]).unwrap());
        let new = Disk::from([(PathBuf::new(), b"headerbody".to_vec())]);
        check(&start, &steps, "f", &new);
    }
}

/// The files of the directory were written by someone and not fsynced: publishing must do it.
#[test]
fn a_directory_survives_power_loss() {
    let unsynced = [("t/a", "new a"), ("t/sub/b", "new b")];
    for old in [&[][..], &[("out/a", "old a"), ("out/gone", "x")][..]] {
        let root = tempfile::tempdir().unwrap();
        let start = disk(old);
        put(root.path(), &start);
        put(root.path(), &disk(&unsynced));
        let mut steps = Vec::new();
        for (name, text) in unsynced {
            steps.push(Step::Create(name.into()));
            steps.push(Step::Write(name.into(), text.as_bytes().to_vec()));
        }
        let (tmp, out) = (root.path().join("t"), root.path().join("out"));
        steps.extend(record(root.path(), || publish_dir(&tmp, &out).unwrap()));
        // A failed attempt to rename onto an existing directory changes nothing.
        if !old.is_empty() {
            let first = steps.iter().position(|s| matches!(s, Step::Rename(..))).unwrap();
            steps.remove(first);
        }
        let new = disk(&[("a", "new a"), ("sub/b", "new b")]);
        check(&start, &steps, "out", &new);
    }
}

/// The test itself: without the fsync of the file, or of the directory, it must object.
#[test]
fn the_model_finds_a_missing_fsync() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f");
    fs::write(&path, "old").unwrap();
    let start = disk(&[("f", "old")]);
    let steps = record(root.path(), || publish_parts(&path, &[b"header", b"body"]).unwrap());
    let new = Disk::from([(PathBuf::new(), b"headerbody".to_vec())]);
    for missing in 0..2 {
        let is = |s: &Step| {
            if missing == 0 { matches!(s, Step::Sync(_)) } else { matches!(s, Step::SyncDir(_)) }
        };
        let broken: Vec<Step> = steps.iter().filter(|s| !is(s)).cloned().collect();
        let states = crashes(&start, &broken);
        let wrong = |s: &Disk| {
            let now = below(s, "f");
            now != below(&start, "f") && now != new
        };
        if missing == 0 {
            assert!(states.iter().any(wrong));
        } else {
            // Whole, but an acknowledged publish could be lost.
            let cut = broken.len();
            let kept: Vec<Disk> = crashes(&start, &broken[..cut]);
            assert!(kept.iter().rev().take(3).any(|s| below(s, "f") != new));
        }
    }
}
