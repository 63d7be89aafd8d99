//! Power loss, SQLite's way: record the operations of a publish, then for every prefix and every
//! subset of what was not yet durable, rebuild the disk and look: the old state or the new one.
//!
//! The model: a write reaches the disk whole, by half, or not at all until its file is fsynced; a
//! change of names is atomic and may be lost until its directory is fsynced; what is fsynced stays.

use embkit_core::publish::{Op, publish_dir, publish_parts, with_hook};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// An operation without borrowed parts.
#[derive(Clone, Debug)]
enum Step {
    Create(PathBuf),
    Write(PathBuf, Vec<u8>),
    Sync(PathBuf),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    Remove(PathBuf),
}

/// Runs `body` for real and returns its operations, paths relative to `root`.
fn record(root: &Path, body: impl FnOnce()) -> Vec<Step> {
    let log = Rc::new(RefCell::new(Vec::new()));
    let (seen, root) = (log.clone(), root.to_owned());
    let hook = move |op: &Op| {
        let p = |p: &Path| p.strip_prefix(&root).unwrap().to_owned();
        let step = match op {
            Op::Create(a) => Step::Create(p(a)),
            Op::Write(a, bytes) => Step::Write(p(a), bytes.to_vec()),
            Op::Chmod(..) => return Ok(()),
            Op::Sync(a) => Step::Sync(p(a)),
            Op::SyncDir(a) => Step::SyncDir(p(a)),
            Op::Rename(a, b) => Step::Rename(p(a), p(b)),
            Op::Exchange(a, b) => Step::Exchange(p(a), p(b)),
            Op::Remove(a) => Step::Remove(p(a)),
        };
        seen.borrow_mut().push(step);
        Ok(())
    };
    with_hook(hook, body);
    log.take()
}

type Disk = BTreeMap<PathBuf, Vec<u8>>; // files by path; directories are implied

fn moved(disk: &mut Disk, from: &Path, to: &Path) {
    let names: Vec<PathBuf> = disk.keys().filter(|k| k.starts_with(from)).cloned().collect();
    for name in names {
        let rest = name.strip_prefix(from).unwrap();
        let target = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
        let bytes = disk.remove(&name).unwrap();
        disk.insert(target, bytes);
    }
}

fn apply(disk: &mut Disk, step: &Step, half: bool) {
    match step {
        Step::Create(p) => {
            disk.insert(p.clone(), Vec::new());
        }
        Step::Write(p, bytes) => {
            // A write whose file's name was lost goes nowhere.
            if let Some(file) = disk.get_mut(p) {
                file.extend(&bytes[..if half { bytes.len() / 2 } else { bytes.len() }]);
            }
        }
        // A change of names that builds on a lost one is lost too: journals keep their order.
        Step::Rename(a, _) | Step::Exchange(a, _) if !disk.keys().any(|k| k.starts_with(a)) => {}
        Step::Rename(a, b) => {
            disk.retain(|k, _| !k.starts_with(b));
            moved(disk, a, b);
        }
        Step::Exchange(a, b) => {
            let aside = Path::new("\u{1}aside");
            moved(disk, a, aside);
            moved(disk, b, a);
            moved(disk, aside, b);
        }
        Step::Remove(p) => disk.retain(|k, _| !k.starts_with(p)),
        Step::Sync(_) | Step::SyncDir(_) => {}
    }
}

/// Whether a later operation among `rest` makes `step` durable. Names: the fsync of the directory
/// they are in. Content: the fsync of the file, which may have been created under this name.
fn durable(step: &Step, rest: &[Step]) -> bool {
    let parent = |p: &Path| p.parent().unwrap().to_owned();
    rest.iter().any(|later| match (step, later) {
        (Step::Write(p, _), Step::Sync(q)) => p == q,
        // fsync of a new file also makes its name durable on the file systems we know, but POSIX
        // does not say so: only the directory's counts here.
        (Step::Create(p), Step::SyncDir(q)) => parent(p) == *q,
        (Step::Rename(_, p) | Step::Exchange(_, p) | Step::Remove(p), Step::SyncDir(q)) => {
            parent(p) == *q
        }
        _ => false,
    })
}

/// All states the disk may be in after a crash, at most one per (prefix, choice).
fn crashes(start: &Disk, steps: &[Step]) -> Vec<Disk> {
    let mut out = Vec::new();
    for cut in 0..=steps.len() {
        let run = &steps[..cut];
        let open: Vec<usize> = (0..cut)
            .filter(|&i| {
                !matches!(run[i], Step::Sync(_) | Step::SyncDir(_))
                    && !durable(&run[i], &run[i + 1..])
            })
            .collect();
        for mut choice in 0..3usize.pow(open.len() as u32) {
            let mut fate = BTreeMap::new(); // 0 lost, 1 half, 2 whole
            for &i in &open {
                fate.insert(i, choice % 3);
                choice /= 3;
            }
            let mut disk = start.clone();
            for (i, step) in run.iter().enumerate() {
                match fate.get(&i) {
                    Some(0) => {}
                    Some(1) => apply(&mut disk, step, true),
                    _ => apply(&mut disk, step, false),
                }
            }
            out.push(disk);
        }
    }
    out
}

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
