//! Merged stores against a list of distinct texts, with narrow and wide tokens.

mod common;

use common::{Rng, table, text, wordpiece};
use embkit_core::container::Verify;
use embkit_core::{Error, Job, TextShard};
use embkit_store::compose::{Merged, Plan, Stores, merge_rows, write};
use embkit_store::read::Store;
use embkit_store::records::identity;
use embkit_store::tokenize::{Backend, Inputs, Settings, tokenize};
use std::path::{Path, PathBuf};

const LIMITS: [u32; 3] = [8, 8, 8];

/// A store of distinct texts in small shards; returns its number of shards.
fn store(dir: &Path, texts: &[String], tokenizer: &str) -> usize {
    let (bytes, offsets) = table(texts);
    let ids: Vec<u64> = texts.iter().map(|t| identity(t) as u64).collect();
    let n = texts.len();
    let inputs = Inputs {
        texts: &[TextShard { bytes: &bytes, offsets: &offsets }],
        row: &(0..n as u64).collect::<Vec<_>>(),
        prompt: &vec![0; n],
        role: &vec![1; n],
        source: &vec![0; n],
        text_id: &ids,
        cluster: &ids,
    };
    let settings = Settings {
        prompts: &["".to_string()],
        tokenizer_json: tokenizer,
        max_length: &LIMITS,
        shard_bytes: 200,
        threads: 1,
        backend: Backend::Auto,
        refuse_long: false,
    };
    tokenize(&Job::new(), dir, inputs, settings).unwrap().shards
}

fn distinct(mut texts: Vec<String>) -> Vec<String> {
    let mut kept: Vec<String> = Vec::new();
    texts.retain(|t| {
        !kept.contains(t) && {
            kept.push(t.clone());
            true
        }
    });
    texts
}

fn tokens(store: &Store, row: u64) -> Vec<i32> {
    let mut out = vec![0; store.lengths(&[row]).unwrap()[0] as usize];
    store.gather(&[row], &mut out, &mut [0, 0]).unwrap();
    out
}

fn compose(dir: &Path, stores: &[(PathBuf, usize)]) -> (Merged, Store) {
    let job = Job::new();
    let open = Stores::open(stores).unwrap();
    let n = open.rows() as usize;
    let merged = merge_rows(&job, &open, &vec![0; n], &vec![0; n], LIMITS).unwrap();
    let plan = Plan {
        row: &merged.row,
        text_id: &merged.text_id,
        cluster: &merged.cluster,
        role: &merged.role,
        source: &merged.source,
    };
    std::fs::create_dir(dir).unwrap();
    let report = write(&job, dir, &open, plan, "digest", LIMITS, 200).unwrap();
    let out = Store::open(dir, Verify::Open).unwrap();
    assert_eq!((report.rows, report.tokens), (out.rows(), out.tokens()));
    assert_eq!(report.shards, out.shards());
    (merged, out)
}

#[test]
fn merged_rows_are_the_distinct_texts_in_order() {
    for extra in [0, 70_000] {
        let dir = tempfile::tempdir().unwrap();
        let mut rng = Rng(extra as u64 + 1);
        let tokenizer = wordpiece(extra);
        let lists: Vec<Vec<String>> =
            (0..3).map(|_| distinct((0..60).map(|_| text(&mut rng, 3)).collect())).collect();
        let mut parts = Vec::new();
        let mut open = Vec::new();
        for (i, texts) in lists.iter().enumerate() {
            let path = dir.path().join(i.to_string());
            parts.push((path.clone(), store(&path, texts, &tokenizer)));
            open.push(Store::open(&path, Verify::Open).unwrap());
        }
        let want = distinct(lists.concat());
        let (merged, out) = compose(&dir.path().join("out"), &parts);
        let got: Vec<&str> = (0..out.rows()).map(|r| out.text(r).unwrap()).collect();
        assert_eq!(got, want);
        let each = lists.iter().zip(&open).flat_map(|(texts, s)| {
            texts.iter().enumerate().map(move |(row, text)| (s, row as u64, text))
        });
        for ((s, row, text), new) in each.zip(&merged.row_of) {
            assert_eq!(&want[*new as usize], text);
            assert_eq!(tokens(&out, *new), tokens(s, row), "{text}");
        }
        // Nothing new: every shard is the first store's, by link.
        let (_, same) = compose(&dir.path().join("same"), &[parts[0].clone(), parts[0].clone()]);
        assert_eq!((same.rows(), same.shards()), (open[0].rows(), open[0].shards()));
    }
}

#[test]
fn stores_of_other_tokens_or_missing_shards_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let shards = store(&a, &["the tool".into(), "a zebra".into()], &wordpiece(0));
    let wide = store(&b, &["the tool".into()], &wordpiece(70_000));
    let both = Stores::open(&[(a.clone(), shards), (b, wide)]);
    assert!(matches!(both.err(), Some(Error::Usage { .. })));
    assert!(matches!(Stores::open(&[(a, shards + 1)]).err(), Some(Error::Io { .. })));
}
