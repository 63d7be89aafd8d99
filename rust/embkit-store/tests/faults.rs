//! Tokenizing on a disk that fails: the n-th operation, for every n, and power loss at any moment.
//! Whatever happens, the next run goes on to the same directory, and nothing torn is taken over.

mod common;
#[path = "../../embkit-core/tests/common/crash.rs"]
mod crash;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Rng, table, text, wordpiece};
use crash::{Disk, Step, crashes, record};
use embkit_core::container::Verify;
use embkit_core::publish::{Op, publish_dir, with_hook};
use embkit_core::{Error, Job, Result, TextShard};
use embkit_store::read::Store;
use embkit_store::tokenize::{Backend, Inputs, Report, Settings, tokenize};

const ROWS: usize = 60;

/// The same few rows in three shards, written to `dir`.
fn write(dir: &Path, threads: usize) -> Result<Report> {
    let mut rng = Rng(5);
    let texts: Vec<String> = (0..ROWS).map(|_| text(&mut rng, 12)).collect();
    let (bytes, offsets) = table(&texts);
    let rows: Vec<u64> = (0..ROWS as u64).collect();
    let inputs = Inputs {
        texts: &[TextShard { bytes: &bytes, offsets: &offsets }],
        row: &rows,
        prompt: &[0; ROWS],
        role: &[0; ROWS],
        source: &[0; ROWS],
        text_id: &rows,
        cluster: &rows,
    };
    let settings = Settings {
        prompts: &[String::new()],
        tokenizer_json: &wordpiece(0),
        max_length: &[16],
        shard_bytes: 600,
        threads,
        backend: Backend::Auto,
        refuse_long: false,
    };
    tokenize(&Job::new(), dir, inputs, settings)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    entries.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
}

fn finished() -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let report = write(dir.path(), 1).unwrap();
    assert_eq!(report.shards, 3);
    files(dir.path())
}

/// P17: "no space" in place of each operation in turn.
#[test]
fn test_nth_operation_fails() {
    let want = finished();
    let mut last = 0;
    for n in 1.. {
        let root = tempfile::tempdir().unwrap();
        let (work, out) = (root.path().join("work"), root.path().join("out"));
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let hook = move |_: &Op| match count.fetch_add(1, Ordering::Relaxed) + 1 == n {
            true => Err(io::Error::from_raw_os_error(28)),
            false => Ok(()),
        };
        let run = || write(&work, 2).and_then(|_| publish_dir(&work, &out));
        let result = with_hook(root.path(), hook, run);
        if seen.load(Ordering::Relaxed) < n {
            result.unwrap();
            break;
        }
        last = n;
        let Err(Error::Io { source, .. }) = result else { panic!("operation {n}: {result:?}") };
        assert_eq!(source.raw_os_error(), Some(28));
        assert!(!out.exists(), "operation {n}: published in spite of the error");
        for (name, bytes) in files(&work) {
            assert!(!name.ends_with(".tmp"), "operation {n} left {name}");
            // Under its first or its last name, but whole.
            let stem = name.trim_end_matches(".safetensors");
            let same = want.iter().find(|(n, _)| n.starts_with(stem)).map(|(_, b)| b);
            assert!(same == Some(&bytes), "operation {n}: {name}");
        }
        write(&work, 1).unwrap();
        publish_dir(&work, &out).unwrap();
        assert!(files(&out) == want, "operation {n}");
    }
    println!("{last} operations failed in turn");
    assert!(last > 60, "only {last} operations pass the hook");
}

/// P2: power loss at any moment of a run, then the run again.
#[test]
fn test_crash_model() {
    let want = finished();
    let root = tempfile::tempdir().unwrap();
    let (work, out) = (root.path().join("work"), root.path().join("out"));
    let steps = record(root.path(), || {
        write(&work, 1).unwrap();
        publish_dir(&work, &out).unwrap();
    });
    let states = crashes(&Disk::new(), &steps);
    let total = states.len();
    assert!((100..=4096).contains(&total), "{total} states");
    let published = |disk: &Disk| -> BTreeMap<String, Vec<u8>> {
        let name = |p: &Path| p.strip_prefix("out").ok().map(|n| n.to_str().unwrap().to_owned());
        disk.iter().filter_map(|(p, bytes)| Some((name(p)?, bytes.clone()))).collect()
    };
    let distinct: BTreeSet<Disk> = states.into_iter().collect();
    let (mut absent, mut adopted) = (0, BTreeSet::new());
    for disk in &distinct {
        let there = published(disk);
        if !there.is_empty() {
            assert!(there == want, "torn: {:?}", there.keys());
            continue;
        }
        absent += 1;
        let scratch = tempfile::tempdir().unwrap();
        for (name, bytes) in disk {
            let path = scratch.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let work = scratch.path().join("work");
        // Whoever wrote the temporary files is alive in this test, so no sweep takes them: they
        // must not get in the way either.
        adopted.insert(write(&work, 1).unwrap().adopted);
        let mut now = files(&work);
        now.retain(|name, _| !name.ends_with(".tmp"));
        assert!(now == want, "from {:?}", disk.keys());
    }
    println!("{total} states, {} distinct, {absent} before publishing", distinct.len());
    assert!(absent > 50 && absent < distinct.len());
    assert!(adopted.len() >= 4, "shards adopted: {adopted:?}");

    // The test itself: without the fsyncs of files it must object.
    let broken: Vec<Step> = steps.into_iter().filter(|s| !matches!(s, Step::Sync(_))).collect();
    let mut torn = crashes(&Disk::new(), &broken[..broken.len().min(12)]).into_iter();
    assert!(torn.any(|disk| {
        let named = |(p, b): (&std::path::PathBuf, &Vec<u8>)| {
            let name = p.file_name()?.to_str()?;
            let stem = name.strip_suffix(".safetensors").filter(|n| !n.starts_with('.'))?;
            let whole = want.iter().find(|(n, _)| n.starts_with(stem)).map(|(_, b)| b);
            (whole != Some(b)).then_some(())
        };
        disk.iter().find_map(named).is_some()
    }));
}

/// A finished directory in which power loss undid some of the last renames is still a store's.
#[test]
fn renames_may_be_lost_one_by_one() {
    let want = finished();
    for lost in 0..64_u32 {
        let dir = tempfile::tempdir().unwrap();
        for (i, (name, bytes)) in want.iter().enumerate() {
            let plain = name.replace("-of-00003", "");
            let name = if lost >> i & 1 == 1 { &plain } else { name };
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        assert_eq!(write(dir.path(), 1).unwrap().adopted, ROWS as u64);
        assert!(files(dir.path()) == want);
        Store::open(dir.path(), Verify::Open).unwrap();
    }
}
