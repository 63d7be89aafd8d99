//! The disk after a crash, SQLite's way: record the operations of a publish, then rebuild what
//! every prefix and every subset of what was not yet durable leaves.
//!
//! The model: a write reaches the disk whole, by half, or not at all until its file is fsynced; a
//! change of names is atomic and may be lost until its directory is fsynced; what is fsynced stays.
#![allow(dead_code)]

use embkit_core::publish::{Op, with_hook};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// An operation without borrowed parts.
#[derive(Clone, Debug)]
pub enum Step {
    Create(PathBuf),
    Write(PathBuf, Vec<u8>),
    Sync(PathBuf),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Exchange(PathBuf, PathBuf),
    Remove(PathBuf),
}

/// Runs `body` for real and returns its operations, paths relative to `root`.
pub fn record(root: &Path, body: impl FnOnce()) -> Vec<Step> {
    let log = Arc::new(Mutex::new(Vec::new()));
    let (seen, top) = (log.clone(), root.to_owned());
    let hook = move |op: &Op| {
        let p = |p: &Path| p.strip_prefix(&top).unwrap().to_owned();
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
        let mut log = seen.lock().unwrap();
        // A file of many pieces counts as two writes: each write triples the states.
        if let (Step::Write(p, bytes), [.., Step::Write(a, _), Step::Write(b, last)]) =
            (&step, &mut log[..])
            && p == a
            && p == b
        {
            last.extend(bytes);
        } else {
            log.push(step);
        }
        Ok(())
    };
    with_hook(root, hook, body);
    std::mem::take(&mut log.lock().unwrap())
}

pub type Disk = BTreeMap<PathBuf, Vec<u8>>; // files by path; directories are implied

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
pub fn crashes(start: &Disk, steps: &[Step]) -> Vec<Disk> {
    let mut out = Vec::new();
    for cut in 0..=steps.len() {
        let run = &steps[..cut];
        let open: Vec<usize> = (0..cut)
            .filter(|&i| {
                !matches!(run[i], Step::Sync(_) | Step::SyncDir(_))
                    && !durable(&run[i], &run[i + 1..])
            })
            .collect();
        // A write has three fates, a change of names two.
        let fates = |i: usize| if matches!(run[i], Step::Write(..)) { 3 } else { 2 };
        for mut choice in 0..open.iter().map(|&i| fates(i)).product::<usize>() {
            let mut fate = BTreeMap::new(); // 0 lost, 1 half (of names: whole), 2 whole
            for &i in &open {
                fate.insert(i, choice % fates(i));
                choice /= fates(i);
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
