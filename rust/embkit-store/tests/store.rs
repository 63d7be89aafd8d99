//! Tokenize and read: against sequential references, killed, resumed, damaged.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use common::{Rng, bytelevel, table, text, wordpiece};
use embkit_core::container::Verify;
use embkit_core::{Error, Job, TextShard};
use embkit_store::naive;
use embkit_store::read::Store;
use embkit_store::tokenize::{Backend, Encoder, Inputs, Report, SHARD_BYTES, Settings, tokenize};

/// Everything that a tokenize call takes, owned.
#[derive(Clone)]
struct Case {
    /// Texts in two shards.
    shards: [Vec<String>; 2],
    row: Vec<u64>,
    prompt: Vec<u16>,
    role: Vec<u8>,
    prompts: Vec<String>,
    json: String,
    max_length: Vec<u32>,
    shard_bytes: u64,
    threads: usize,
}

impl Case {
    fn new(rows: usize, json: String, shard_bytes: u64) -> Self {
        let mut rng = Rng(rows as u64);
        let shards = [37, 64].map(|n| (0..n).map(|_| text(&mut rng, 20)).collect::<Vec<String>>());
        let role: Vec<u8> = (0..rows).map(|_| rng.below(3) as u8).collect();
        Self {
            row: (0..rows).map(|_| rng.below(101)).collect(),
            prompt: role.iter().map(|r| u16::from(*r == 0)).collect(),
            role,
            shards,
            prompts: vec![String::new(), "query: ".into()],
            json,
            max_length: vec![12, 20, 20],
            shard_bytes,
            threads: 1,
        }
    }

    fn text(&self, i: usize) -> &str {
        self.shards.iter().flatten().nth(self.row[i] as usize).unwrap()
    }

    /// The string that serving would encode.
    fn full(&self, i: usize) -> String {
        format!("{}{}", self.prompts[self.prompt[i] as usize], self.text(i))
    }

    fn source(&self) -> Vec<u16> {
        self.row.iter().map(|r| (r % 7) as u16).collect()
    }

    fn ids(&self) -> Vec<u64> {
        self.row.iter().map(|r| r.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
    }

    fn run(&self, dir: &Path) -> Result<Report, Error> {
        self.run_with(&Job::new(), dir)
    }

    fn run_with(&self, job: &Job, dir: &Path) -> Result<Report, Error> {
        let tables = [table(&self.shards[0]), table(&self.shards[1])];
        let texts = [0, 1].map(|i| TextShard { bytes: &tables[i].0, offsets: &tables[i].1 });
        let (source, text_id) = (self.source(), self.ids());
        let cluster: Vec<u64> = text_id.iter().map(|i| i / 2).collect();
        let inputs = Inputs {
            texts: &texts,
            row: &self.row,
            prompt: &self.prompt,
            role: &self.role,
            source: &source,
            text_id: &text_id,
            cluster: &cluster,
        };
        let settings = Settings {
            prompts: &self.prompts,
            tokenizer_json: &self.json,
            max_length: &self.max_length,
            shard_bytes: self.shard_bytes,
            threads: self.threads,
            backend: Backend::Auto,
            refuse_long: false,
        };
        tokenize(job, dir, inputs, settings)
    }

    /// What the rows must hold, by the sequential reference.
    fn expected(&self) -> Vec<Vec<u32>> {
        let full: Vec<String> = (0..self.row.len()).map(|i| self.full(i)).collect();
        let lengths = self.max_length.iter().map(|l| *l as usize);
        let mut by_role: Vec<Vec<Vec<u32>>> =
            lengths.map(|l| naive::encode(&self.json, &full, l).unwrap()).collect();
        let roles = self.role.iter().enumerate();
        roles.map(|(i, role)| std::mem::take(&mut by_role[*role as usize][i])).collect()
    }
}

/// Every file of a directory with its content.
fn content(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect()
}

fn gather(store: &Store, rows: &[u64]) -> (Vec<i64>, Vec<i32>) {
    let total: u32 = store.lengths(rows).unwrap().iter().sum();
    let (mut tokens, mut cu) = (vec![-1_i64; total as usize], vec![-1_i32; rows.len() + 1]);
    assert_eq!(store.gather(rows, &mut tokens, &mut cu).unwrap(), total as usize);
    (tokens, cu)
}

#[test]
fn rows_equal_a_sequential_encode() {
    for (json, wide) in [(wordpiece(0), false), (bytelevel(), false), (wordpiece(70_000), true)] {
        let case = Case::new(150, json, if wide { 512 } else { 256 });
        let dir = tempfile::tempdir().unwrap();
        let report = case.run(dir.path()).unwrap();
        let expected = case.expected();
        let store = Store::open(dir.path(), Verify::FirstTouch).unwrap();
        let all: Vec<u64> = (0..150).collect();
        assert!(report.shards > 8 && report.shards == store.shards());
        assert_eq!((report.rows, store.rows(), report.adopted), (150, 150, 0));
        let total: usize = expected.iter().map(Vec::len).sum();
        assert_eq!((report.tokens, store.tokens()), (total as u64, total as u64));
        for (i, row) in all.iter().zip(&expected) {
            assert_eq!(gather(&store, &[*i]).0, naive::pack(&[row]).0, "row {i}");
        }
        // Truncated rows: those that are longer without a limit.
        let free: Vec<String> = (0..150).map(|i| case.full(i)).collect();
        let free = naive::encode(&case.json, &free, 1_000).unwrap();
        let cut = free.iter().zip(&expected).filter(|(f, e)| f.len() > e.len()).count() as u64;
        assert!(cut > 10 && cut < 140);
        assert_eq!(report.truncated, cut);

        let rows: Vec<&[u32]> = expected.iter().map(Vec::as_slice).collect();
        assert_eq!(gather(&store, &all), naive::pack(&rows));
        if wide {
            assert!(expected.iter().flatten().any(|id| *id > 65_536));
        }
        assert_eq!(store.role(&all).unwrap(), case.role);
        assert_eq!(store.source(&all).unwrap(), case.source());
        assert_eq!(store.text_id(&all).unwrap(), case.ids());
        let cluster: Vec<u64> = case.ids().iter().map(|i| i / 2).collect();
        assert_eq!(store.cluster(&all).unwrap(), cluster);
        for i in 0..150 {
            assert_eq!(store.text(i as u64).unwrap(), case.text(i));
        }
    }
}

#[test]
fn truncation_keeps_the_special_tokens_and_prompts_are_counted() {
    let long = "the tool search ".repeat(30);
    let encoder = Encoder::new(&wordpiece(0), &[7, 64], Backend::Auto).unwrap();
    let short = encoder.encode(0, "query: ", &long).unwrap();
    assert_eq!(short.ids, [2, 11, 12, 5, 6, 7, 3]);
    assert!(short.truncated);
    let exact = encoder.encode(0, "", "the tool search the tool").unwrap();
    assert_eq!((exact.ids.len(), exact.truncated), (7, false));
    // Without special tokens the limit is exact, too, from either side.
    let limit = Encoder::new(&bytelevel(), &[3], Backend::Auto).unwrap();
    let cut = |json: &str, text| {
        Encoder::new(json, &[3], Backend::Auto).unwrap().encode(0, "", text).unwrap()
    };
    assert!(!limit.encode(0, "", "abc").unwrap().truncated);
    let (all, right) =
        (Encoder::new(&bytelevel(), &[9], Backend::Auto).unwrap(), cut(&bytelevel(), "abcd the"));
    let all = all.encode(0, "", "abcd the").unwrap().ids;
    assert_eq!((right.ids.as_slice(), right.truncated), (&all[..3], true));
    let left = bytelevel().replace(
        "\"truncation\":null",
        "\"truncation\":{\"direction\":\"Left\",\"max_length\":5,\"strategy\":\"LongestFirst\",\"stride\":0}",
    );
    let left = cut(&left, "abcd the");
    assert_eq!((left.ids.as_slice(), left.truncated), (&all[all.len() - 3..], true));
    // [CLS] query : without the [SEP] that would follow the prompt alone.
    assert_eq!(encoder.prompt_len(1, "query: ").unwrap(), 3);
    assert_eq!(encoder.prompt_len(1, "").unwrap(), 0);
    // No special token at the end: nothing to take off.
    let bytes = Encoder::new(&bytelevel(), &[8], Backend::Auto).unwrap();
    assert_eq!(bytes.prompt_len(0, "the t").unwrap(), 2);

    let case = Case::new(60, wordpiece(0), SHARD_BYTES);
    let dir = tempfile::tempdir().unwrap();
    case.run(dir.path()).unwrap();
    let store = Store::open(dir.path(), Verify::Open).unwrap();
    let all: Vec<u64> = (0..60).collect();
    let expected: Vec<u16> = case.prompt.iter().map(|p| 3 * p).collect();
    assert_eq!(store.prompt_len(&all).unwrap(), expected);
}

#[test]
fn threads_do_not_show() {
    for (rows, shard_bytes) in [(300, 300), (1, 64), (129, SHARD_BYTES)] {
        let mut case = Case::new(rows, wordpiece(0), shard_bytes);
        let dirs = [1, 3].map(|threads| {
            let dir = tempfile::tempdir().unwrap();
            case.threads = threads;
            let job = Job::new();
            case.run_with(&job, dir.path()).unwrap();
            assert_eq!(job.done.load(Ordering::Relaxed), rows as u64);
            dir
        });
        let [one, three] = dirs.map(|d| content(d.path()));
        assert_eq!(one.keys().collect::<Vec<_>>(), three.keys().collect::<Vec<_>>());
        assert!(one == three);
    }
}

/// A finished directory and its case, in at least six shards.
fn finished() -> (Case, tempfile::TempDir, Report) {
    let case = Case::new(200, wordpiece(0), 1000);
    let dir = tempfile::tempdir().unwrap();
    let report = case.run(dir.path()).unwrap();
    assert!(report.shards >= 6, "{}", report.shards);
    (case, dir, report)
}

/// The names that a shard has before and after the last step.
fn names(index: usize, of: usize) -> [[String; 2]; 2] {
    ["raw", "texts"].map(|s| {
        [format!("{s}-{index:05}.safetensors"), format!("{s}-{index:05}-of-{of:05}.safetensors")]
    })
}

#[test]
fn a_killed_run_continues_to_the_same_directory() {
    let (case, done, report) = finished();
    let want = content(done.path());
    let of = report.shards;
    // Killed after two shards; between the files of the third; with a stray temporary file; and
    // in the middle of the renames at the end.
    for (shards, renamed, third) in [(2, 0, false), (2, 0, true), (of, 0, false), (of, 3, false)] {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..shards {
            for [plain, last] in names(index, of) {
                let to = if index < renamed { &last } else { &plain };
                fs::copy(done.path().join(&last), dir.path().join(to)).unwrap();
            }
        }
        if third {
            let [[raw, last], _] = names(2, of);
            fs::copy(done.path().join(last), dir.path().join(raw)).unwrap();
        }
        let again = case.run(dir.path()).unwrap();
        let store = Store::open(done.path(), Verify::Off).unwrap();
        assert_eq!(again.shards, of);
        assert!(again.adopted > 0 && again.adopted <= store.rows());
        assert_eq!(again.adopted == 200, shards == of);
        assert!(content(dir.path()) == want);
        assert_eq!(Report { adopted: 0, ..again }, report);
    }
    // A finished directory is only verified.
    assert_eq!(case.run(done.path()).unwrap().adopted, 200);
    assert!(content(done.path()) == want);
}

#[test]
fn a_failed_run_leaves_whole_shards_for_the_next() {
    let (case, done, report) = finished();
    let dir = tempfile::tempdir().unwrap();
    let tables = [table(&case.shards[0]), table(&case.shards[1])];
    let (mut broken, offsets) = tables[1].clone();
    // Row 150 is the first that uses this text: no shard before it is concerned.
    let mut case = case;
    let last = 100_u64;
    for row in &mut case.row {
        *row = if *row == last { 99 } else { *row };
    }
    case.row[150] = last;
    let start = offsets[offsets.len() - 2] as usize;
    broken[start] = 0xff;
    let texts = [
        TextShard { bytes: &tables[0].0, offsets: &tables[0].1 },
        TextShard { bytes: &broken, offsets: &offsets },
    ];
    let (source, text_id) = (case.source(), case.ids());
    let cluster: Vec<u64> = text_id.iter().map(|i| i / 2).collect();
    let inputs = Inputs {
        texts: &texts,
        row: &case.row,
        prompt: &case.prompt,
        role: &case.role,
        source: &source,
        text_id: &text_id,
        cluster: &cluster,
    };
    let settings = Settings {
        prompts: &case.prompts,
        tokenizer_json: &case.json,
        max_length: &case.max_length,
        shard_bytes: case.shard_bytes,
        threads: 2,
        backend: Backend::Auto,
        refuse_long: false,
    };
    let err = tokenize(&Job::new(), dir.path(), inputs, settings).unwrap_err().to_string();
    assert!(err.contains("row 100 is not UTF-8"), "{err}");
    let err = Store::open(dir.path(), Verify::Off).err().unwrap().to_string();
    assert!(err.contains("did not finish"), "{err}");
    let again = case.run(dir.path()).unwrap();
    assert!(again.adopted > 50 && again.adopted <= 150, "{}", again.adopted);
    let fresh = tempfile::tempdir().unwrap();
    case.run(fresh.path()).unwrap();
    assert!(content(dir.path()) == content(fresh.path()));
    drop((done, report));
}

#[test]
fn only_sound_shards_of_this_very_run_are_adopted() {
    let (case, done, report) = finished();
    let want = content(done.path());
    let of = report.shards;
    // One flipped bit in the second shard: it and what follows are written again.
    for (stem, at) in [("raw", 4100), ("texts", 4100)] {
        let dir = tempfile::tempdir().unwrap();
        for (name, mut bytes) in want.clone() {
            if name == format!("{stem}-00001-of-{of:05}.safetensors") {
                bytes[at] ^= 1;
            }
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        let again = case.run(dir.path()).unwrap();
        assert!(again.adopted > 0 && again.adopted < 100);
        assert!(content(dir.path()) == want);
    }
    // Anything else in the settings or inputs: nothing is taken over, nothing old is left.
    let changes: [fn(&mut Case); 7] = [
        |c| c.prompts[1] = "query: q ".into(),
        |c| c.max_length[0] = 11,
        |c| c.shard_bytes = 3000,
        |c| c.json = wordpiece(3),
        |c| c.role[0] = (c.role[0] + 1) % 3,
        |c| c.row[0] = (c.row[0] + 1) % 101,
        |c| {
            c.row.truncate(90);
            c.prompt.truncate(90);
            c.role.truncate(90);
        },
    ];
    for change in changes {
        let mut case = case.clone();
        change(&mut case);
        let (old, fresh) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, bytes) in &want {
            fs::write(old.path().join(name), bytes).unwrap();
        }
        assert_eq!(case.run(old.path()).unwrap().adopted, 0);
        case.run(fresh.path()).unwrap();
        assert!(content(old.path()) == content(fresh.path()));
    }
}

#[test]
fn shards_stay_small_whatever_the_texts_are() {
    // Long texts cut to a few tokens: the raw files are what must not grow.
    let mut case = Case::new(64, wordpiece(0), 4000);
    for text in case.shards.iter_mut().flatten() {
        *text = text.repeat(20);
    }
    let dir = tempfile::tempdir().unwrap();
    let report = case.run(dir.path()).unwrap();
    assert!(report.shards > 1);
    let store = Store::open(dir.path(), Verify::Open).unwrap();
    assert_eq!(store.rows(), 64);
    for (name, bytes) in content(dir.path()) {
        assert!(bytes.len() < 4 * 4000 + 3 * 4096, "{name} has {} bytes", bytes.len());
    }
}

#[test]
fn bad_arguments_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let base = Case::new(5, wordpiece(0), 1000);
    let fails = |change: fn(&mut Case), want: &str| {
        let mut case = base.clone();
        change(&mut case);
        let err = case.run(dir.path()).unwrap_err().to_string();
        assert!(err.contains(want), "{err}");
    };
    fails(|c| c.row[3] = 101, "row 3 has text 101, but there are 101");
    fails(|c| c.prompt[2] = 2, "row 2 has prompt 2, but there are 2");
    fails(|c| c.role[4] = 3, "row 4 has role 3, but there are 3");
    fails(|c| c.max_length[1] = 2, "leaves no room beside 2 special tokens");
    fails(|c| c.json = "{\"model\": 1}".into(), "is not a tokenizer");
    fails(|c| c.json.truncate(100), "is not a tokenizer");
    fails(|c| c.shard_bytes = 0, "shard_bytes is 0");
    fails(|c| c.prompt.truncate(4), "column 'prompt' has 4 values for 5 rows");
    fails(
        |c| {
            c.row.clear();
            c.prompt.clear();
            c.role.clear();
        },
        "no rows to tokenize",
    );
    let job = Job::new();
    job.cancel();
    assert!(matches!(base.run_with(&job, dir.path()), Err(Error::Cancelled)));
    assert!(content(dir.path()).is_empty());
}

#[test]
fn gathers_equal_the_naive_ones_on_random_rows() {
    let case = Case::new(333, bytelevel(), 700);
    let dir = tempfile::tempdir().unwrap();
    case.run(dir.path()).unwrap();
    let expected = case.expected();
    let mut rng = Rng(7);
    for verify in [Verify::FirstTouch, Verify::Open, Verify::Off] {
        let store = Store::open(dir.path(), verify).unwrap();
        for n in [0, 1, 2, 127, 500] {
            let rows: Vec<u64> = (0..n).map(|_| rng.below(333)).collect();
            let picked: Vec<&[u32]> =
                rows.iter().map(|r| expected[*r as usize].as_slice()).collect();
            let (tokens, cu) = naive::pack(&picked);
            assert_eq!(gather(&store, &rows), (tokens.clone(), cu.clone()));
            // 32 bits, in a longer buffer whose rest is left alone.
            let mut narrow = vec![-7_i32; tokens.len() + 5];
            let mut got = vec![0_i32; rows.len() + 1];
            assert_eq!(store.gather(&rows, &mut narrow, &mut got).unwrap(), tokens.len());
            let want: Vec<i32> = tokens.iter().map(|t| *t as i32).chain([-7; 5]).collect();
            assert_eq!((narrow, got), (want, cu));

            // Buffers may be longer; what is behind the batch is left alone.
            let width = picked.iter().map(|r| r.len()).max().unwrap_or(0);
            let (mut want, mut mask) = naive::pad(&picked, width, 9);
            let size = want.len() + rng.below(3) as usize;
            want.resize(size, -1);
            mask.resize(size, 5);
            let (mut ids, mut got) = (vec![-1_i64; size], vec![5_u8; size]);
            assert_eq!(store.gather_padded(&rows, &mut ids, &mut got, 9).unwrap(), width);
            assert_eq!((&ids, &got), (&want, &mask));
            let mut wide = vec![5_i64; size];
            store.gather_padded(&rows, &mut ids, &mut wide, 9).unwrap();
            assert_eq!(wide, mask.iter().map(|m| i64::from(*m)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn gathers_check_rows_and_buffers() {
    let (_, dir, _) = finished();
    let store = Store::open(dir.path(), Verify::FirstTouch).unwrap();
    let says = |result: Result<(), Error>, want: &str| {
        let err = result.unwrap_err();
        assert!(matches!(err, Error::Usage { .. }));
        assert!(err.to_string().contains(want), "{err}");
    };
    let (mut tokens, mut cu) = (vec![-1_i64; 100], vec![0_i32; 3]);
    says(
        store.gather(&[0, 200], &mut tokens, &mut cu).map(drop),
        "row 200 of a store with 200 rows",
    );
    says(store.gather(&[0, u64::MAX], &mut tokens, &mut cu).map(drop), "of a store with 200 rows");
    says(
        store.gather(&[0], &mut tokens, &mut cu).map(drop),
        "cu_seqlens has 3 elements for 1 rows",
    );
    says(store.gather(&[0, 1], &mut tokens[..3], &mut cu).map(drop), "tokens, the buffer 3");
    assert!(tokens.iter().all(|t| *t == -1));
    let len = store.lengths(&[5]).unwrap()[0] as usize;
    let (mut ids, mut mask) = (vec![-1_i64; len - 1], vec![7_u8; len]);
    let got = store.gather_padded(&[5], &mut ids, &mut mask, 0).map(drop);
    says(got, &format!("1 rows of width {len} for buffers of {} and {len}", len - 1));
    let got = store.gather_padded(&[5, 200], &mut ids, &mut mask, 0).map(drop);
    says(got, "row 200 of a store with 200 rows");
    assert!(ids.iter().all(|t| *t == -1) && mask.iter().all(|m| *m == 7));
    says(store.text(200).map(drop), "row 200");
    says(store.text_id(&[3, 200]).map(drop), "row 200");
}

#[test]
fn a_damaged_store_is_an_error() {
    let (_, done, report) = finished();
    let want = content(done.path());
    let of = report.shards;
    let dir = tempfile::tempdir().unwrap();
    let restore = || {
        for (name, bytes) in &want {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
    };
    let open = |verify| Store::open(dir.path(), verify).map(drop).map_err(|e| e.to_string());
    assert!(open(Verify::Off).unwrap_err().contains("holds no token shards"));
    let [[_, raw], [_, texts]] = names(2, of);
    for name in [&raw, &texts] {
        restore();
        open(Verify::Open).unwrap();
        fs::remove_file(dir.path().join(name)).unwrap();
        assert!(open(Verify::Off).unwrap_err().contains(name.as_str()));
        // Another shard under this name.
        restore();
        fs::copy(dir.path().join(name.replace("00002-of", "00001-of")), dir.path().join(name))
            .unwrap();
        assert!(open(Verify::Off).unwrap_err().contains("should start at row"));
        // Cut short.
        restore();
        fs::write(dir.path().join(name), &want[name][..want[name].len() - 1]).unwrap();
        open(Verify::Off).unwrap_err();
    }
    restore();
    let extra = format!("texts-00000-of-{:05}.safetensors", of + 1);
    fs::copy(dir.path().join(&texts), dir.path().join(&extra)).unwrap();
    assert!(open(Verify::Off).unwrap_err().contains("two different runs"));
    fs::remove_file(dir.path().join(extra)).unwrap();

    // Without the raw files the tokens are still there, the texts are not.
    restore();
    for index in 0..of {
        fs::remove_file(dir.path().join(&names(index, of)[0][1])).unwrap();
    }
    let store = Store::open(dir.path(), Verify::Open).unwrap();
    assert!(store.text(0).unwrap_err().to_string().contains("has no texts"));
    assert_eq!(store.rows(), 200);
}

#[test]
fn every_flipped_byte_is_seen() {
    let case = Case::new(6, wordpiece(0), SHARD_BYTES);
    let done = tempfile::tempdir().unwrap();
    case.run(done.path()).unwrap();
    let want = content(done.path());
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in &want {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let rows: Vec<u64> = (0..6).collect();
    let touch = || -> Result<(), Error> {
        let store = Store::open(dir.path(), Verify::FirstTouch)?;
        let (mut tokens, mut cu) = (vec![0_i64; 1000], vec![0_i32; 7]);
        store.gather(&rows, &mut tokens, &mut cu)?;
        store.text_id(&rows)?;
        store.cluster(&rows)?;
        store.role(&rows)?;
        store.source(&rows)?;
        store.prompt_len(&rows)?;
        rows.iter().try_for_each(|r| store.text(*r).map(drop))
    };
    touch().unwrap();
    for (name, bytes) in &want {
        let path = dir.path().join(name);
        // The header is mostly padding; every 97th space of it will do.
        let flips = (0..bytes.len()).filter(|at| bytes[*at] != b' ' || at % 97 == 0);
        for at in flips {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, bad).unwrap();
            assert!(touch().is_err(), "{name} byte {at}");
        }
        fs::write(&path, bytes).unwrap();
    }
}
