//! Every row fault and file fault by name, packed inputs, identity, order.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use embkit_core::{Error, Job};
use embkit_store::naive;
use embkit_store::records::{Input, Kind, MAX_LINE, Records, RecordsBuilder, identity};

fn input<'a>(source: &'a str, kind: Option<Kind>) -> Input<'a> {
    Input { source, task: source, kind }
}

fn lines(text: &str) -> Records {
    limited(text.as_bytes(), MAX_LINE)
}

fn limited(bytes: &[u8], max_line: usize) -> Records {
    let mut builder = RecordsBuilder::new(max_line);
    builder.add_lines(&Job::new(), bytes, input("s", None)).unwrap();
    builder.finish().unwrap()
}

fn text(records: &Records, row: u64) -> &str {
    let at = |i: u64| records.text_offsets[i as usize] as usize;
    std::str::from_utf8(&records.text[at(row)..at(row + 1)]).unwrap()
}

fn texts(records: &Records, rows: &[u64]) -> Vec<String> {
    rows.iter().map(|r| text(records, *r).to_string()).collect()
}

const GOOD: &str = "{\"query\":\"q\",\"positive\":\"p\"}\n";

/// One bad line between two good ones is rejected for `reason`, and nothing else is.
fn rejects(bad: &[u8], reason: &str) {
    let all = [GOOD.as_bytes(), bad, b"\n", GOOD.as_bytes()].concat();
    let records = limited(&all, 200);
    let report = &records.reports[0];
    assert_eq!((report.read, report.kept, report.rejected), (3, 2, 1), "{reason}");
    assert_eq!(report.reasons.iter().collect::<Vec<_>>(), [(&reason.to_string(), &1)]);
    assert_eq!((report.samples[0].line, report.samples[0].reason.as_str()), (2, reason));
    assert_eq!(records.examples[0].line, [1, 3]);
    assert_eq!(records.examples[0].query, [0, 0]);
}

#[test]
fn row_faults_of_the_line() {
    rejects(b"{\"query\":\"q\xff\",\"positive\":\"p\"}", "invalid UTF-8");
    rejects(format!("{{\"query\":\"{}\"}}", "x".repeat(200)).as_bytes(), "line too long");
    rejects(b"{\"query\":\"q\",", "not JSON");
    rejects(b"{\"query\":\"q\",\"positive\":\"\\ud800\"}", "not JSON");
    rejects(b"{\"query\":\"NaN\",\"positive\":p}", "not JSON");
    rejects(b"[1,2]", "not an object");
    rejects(b"\"text\"", "not an object");
    rejects(b"7", "not an object");
    rejects(b"NaN", "not JSON");
}

#[test]
fn row_faults_of_columns() {
    rejects(b"{\"query\":\"q\"}", "missing column: positive");
    rejects(b"{\"query\":\"q\",\"positive\":null}", "missing column: positive");
    rejects(b"{\"query\":\"q\",\"positive\":[]}", "missing column: positive");
    rejects(b"{\"query\":\"q\",\"positive\":[null]}", "missing column: positive");
    rejects(b"{\"query\":[\"q\"],\"positive\":\"p\"}", "wrong type: query");
    rejects(b"{\"query\":\"q\",\"positive\":7}", "wrong type: positive");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"neg\":[[\"n\"]]}", "wrong type: negative");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"score\":\"1\"}", "wrong type: score");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"scores\":[1,2]}", "wrong type: score");
    rejects(b"{\"query\":\"q\",\"positive\":[\"a\",\"b\"],\"title\":\"t\"}", "wrong type: title");
    rejects(
        b"{\"query\":\"q\",\"pos\":[\"p\"],\"neg\":[\"n\"],\"neg_scores\":[]}",
        "wrong type: neg_scores",
    );
    rejects("{\"query\":\" \\t\u{3000}\",\"positive\":\"p\"}".as_bytes(), "blank text: query");
    rejects(b"{\"query\":\"q\",\"positive\":[\"p\",\"\"]}", "blank text: positive");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"negative_2\":\" \"}", "blank text: negative");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"score\":NaN}", "non-finite score: score");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"score\":-Infinity}", "non-finite score: score");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"score\":1e300}", "non-finite score: score");
    rejects(b"{\"query\":\"q\",\"positive\":\"p\",\"weight\":-1}", "non-finite score: weight");
    rejects(b"{\"sentence1\":\"a\",\"sentence2\":\"b\",\"score\":1}", "mixed kind");
    rejects(b"{\"text\":\"a\",\"label\":1}", "mixed kind");
}

#[test]
fn faults_are_sampled_not_hoarded() {
    let mut all = GOOD.to_string();
    for i in 0..20 {
        all += &format!("broken {i} {}\n", "\u{1b}é".repeat(100));
    }
    let report = &lines(&all).reports[0];
    assert_eq!(report.reasons["not JSON"], 20);
    assert_eq!(report.samples.iter().map(|s| s.line).collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
    assert_eq!(report.samples[0].excerpt.chars().count(), 120);
    assert!(!report.samples[0].excerpt.contains('\u{1b}'));
}

#[test]
fn every_name_of_every_column_is_read() {
    for query in ["query", "anchor", "question", "query_text", "instruction"] {
        for positive in ["positive", "positives", "pos", "answer", "document", "passage"] {
            for negative in ["negative", "negatives", "neg", "negative_1"] {
                let line = format!(
                    "{{\"{query}\":\"q\",\"{positive}\":[\"p1\",\"p2\"],\"{negative}\":\"n\",\"id\":3}}"
                );
                let r = lines(&line);
                let e = &r.examples[0];
                assert_eq!(e.kind, Kind::Retrieval);
                assert_eq!(texts(&r, &e.query), ["q"]);
                assert_eq!(texts(&r, &e.positive), ["p1", "p2"]);
                assert_eq!(texts(&r, &e.negative), ["n"]);
                assert_eq!(e.positive_offsets, [0, 2]);
                assert_eq!(e.negative_offsets, [0, 1]);
                assert!(e.score[0].is_nan() && e.negative_score[0].is_nan());
                assert_eq!((e.label[0], e.weight[0]), (-1, 1.0));
                assert!(r.reports[0].extra_columns.is_empty());
            }
        }
    }
    for score in ["score", "scores", "label", "labels"] {
        let r = lines(&format!("{{\"sentence1\":\"a\",\"sentence2\":\"b\",\"{score}\":2.5}}"));
        assert_eq!(r.examples[0].kind, Kind::Sts);
        assert_eq!(r.examples[0].score, [2.5]);
        assert_eq!(texts(&r, &r.examples[0].positive), ["b"]);
    }
}

#[test]
fn titles_numbers_scores_and_extras() {
    let r = lines(
        "{\"query\":\"q\",\"positive\":\"body\",\"title\":\"Head\",\"lang\":\"en\",\"meta\":NaN}\n\
         {\"query\":\"q\",\"positive\":\"body\",\"title\":\" \",\"weight\":0.5,\"text\":\"x\",\"anchor\":\"a\"}\n\
         {\"query\":\"q\",\"positive\":\"body\",\"negative_10\":\"n10\",\"negative_2\":\"n2\",\"negative_3\":null,\"scores\":[3,2,1]}\n\
         {\"query\":\"q\",\"pos\":[\"body\",\"p2\"],\"neg\":[\"n2\"],\"pos_scores\":[0.5,0.25],\"neg_scores\":[-1]}\n",
    );
    let e = &r.examples[0];
    assert_eq!(texts(&r, &e.positive), ["Head body", "body", "body", "body", "p2"]);
    assert_eq!(texts(&r, &e.negative), ["n2", "n10", "n2"]);
    assert_eq!(e.negative_score, [2.0, 1.0, -1.0]);
    assert_eq!((e.score[2], e.score[3]), (3.0, 0.5));
    assert_eq!(e.weight, [1.0, 0.5, 1.0, 1.0]);
    let extra = &r.reports[0].extra_columns;
    // A known column that this kind does not use is not unknown.
    assert_eq!(
        extra.iter().map(|(k, n)| (k.as_str(), *n)).collect::<Vec<_>>(),
        [("anchor", 1), ("lang", 1), ("meta", 1)]
    );
}

#[test]
fn of_two_names_the_first_in_rank_is_read_in_any_order() {
    for line in [
        "{\"query\":\"q\",\"anchor\":\"a\",\"positive\":\"p\"}",
        "{\"anchor\":\"a\",\"query\":\"q\",\"positive\":\"p\"}",
        "{\"query\":\"x\",\"anchor\":\"a\",\"query\":\"q\",\"positive\":\"p\"}",
    ] {
        let r = lines(line);
        assert_eq!(texts(&r, &r.examples[0].query), ["q"]);
        let extra: Vec<_> = r.reports[0].extra_columns.iter().collect();
        assert_eq!(extra, [(&"anchor".to_string(), &1)], "{line}");
    }
}

#[test]
fn labels_are_dense_by_name_and_task() {
    let mut b = RecordsBuilder::default();
    let job = Job::new();
    let add = |b: &mut RecordsBuilder, source, task, rows: &[&str]| {
        let rows: Vec<String> =
            rows.iter().map(|l| format!("{{\"text\":\"t{source}\",\"label\":{l}}}\n")).collect();
        b.add_lines(&job, rows.concat().as_bytes(), Input { source, task, kind: None }).unwrap();
    };
    add(&mut b, "a", "words", &["\"zoo\"", "\"bar\"", "\"zoo\""]);
    add(&mut b, "b", "numbers", &["10", "2", "2.0", "0"]);
    add(&mut b, "c", "words", &["\"foo\"", "7"]);
    let r = b.finish().unwrap();
    assert_eq!(r.labels["words"], ["7", "bar", "foo", "zoo"]);
    assert_eq!(r.labels["numbers"], ["0", "2", "10"]);
    assert_eq!(r.examples[0].label, [3, 1, 3]);
    assert_eq!(r.examples[1].label, [2, 1, 1, 0]);
    assert_eq!(r.examples[2].label, [2, 0]);
    assert!(r.examples[0].positive.is_empty());
    assert_eq!(r.examples[0].positive_offsets, [0, 0, 0, 0]);
}

#[test]
fn texts_are_distinct_by_nfc_and_numbered_by_appearance() {
    let words = [
        "b",
        "caf\u{e9}",
        "a",
        "cafe\u{301}",
        "b",
        "\u{1e9b}\u{323}",
        "\u{17f}\u{323}\u{307}",
        "A",
    ];
    let mut all = String::new();
    for pair in words.windows(2) {
        all += &serde_json::json!({"query": pair[0], "positive": pair[1]}).to_string();
        all.push('\n');
    }
    let r = lines(&all);
    let flat: Vec<&str> = words.windows(2).flatten().copied().collect();
    let (kept, rows) = naive::distinct(&flat);
    assert_eq!(texts(&r, &(0..r.text_id.len() as u64).collect::<Vec<_>>()), kept);
    let e = &r.examples[0];
    let got: Vec<u64> = e.query.iter().zip(&e.positive).flat_map(|(q, p)| [*q, *p]).collect();
    assert_eq!(got, rows);
    assert_eq!(r.text_id, kept.iter().map(|t| identity(t) as u64).collect::<Vec<_>>());
    assert_eq!(identity("caf\u{e9}"), identity("cafe\u{301}"));
}

fn file(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    w.write_all(bytes).unwrap();
    w.finish().unwrap()
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).unwrap()
}

fn many(rows: usize) -> Vec<u8> {
    let mut seed = 1_u64;
    let mut out = Vec::new();
    for i in 0..rows {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let line = serde_json::json!({"query": format!("q{}", seed >> 50), "positive": format!("p {i} é {seed}")});
        writeln!(out, "{line}").unwrap();
    }
    out
}

fn read(path: &Path) -> Result<Records, Error> {
    let mut b = RecordsBuilder::default();
    b.add_jsonl(&Job::new(), path, input("s", None))?;
    b.finish()
}

#[test]
fn plain_zstd_and_gzip_give_the_same_records() {
    let dir = tempfile::tempdir().unwrap();
    let plain = many(30_000);
    let (a, b) = plain.split_at(plain.len() / 3);
    let want = read(&file(dir.path(), "a.jsonl", &plain)).unwrap();
    assert_eq!(want.reports[0].kept, 30_000);
    let same = |name: &str, bytes: &[u8]| {
        let got = read(&file(dir.path(), name, bytes)).unwrap();
        // NaN is not equal to itself, so the scores are compared as text.
        assert_eq!(format!("{got:?}"), format!("{want:?}"), "{name}");
    };
    same("a.jsonl.zst", &zst(&plain));
    same("a.jsonl.gz", &gz(&plain));
    // Several frames or members, as parallel tools write; a skippable frame; no suffix at all.
    same("b.jsonl.zst", &[zst(a), zst(b)].concat());
    same("b.jsonl.gz", &[gz(a), gz(b)].concat());
    let skip = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &zst(&plain)].concat();
    same("c.jsonl.zst", &skip);
    same("renamed.jsonl", &zst(&plain));
    same("windows.jsonl", &String::from_utf8(plain).unwrap().replace('\n', "\r\n").into_bytes());
}

fn corrupt(path: &Path) -> (String, String) {
    match read(path) {
        Err(Error::Corrupt { path: named, what, fix }) => {
            assert_eq!(named, path);
            (what, fix)
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn file_faults_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    match read(&d.join("no.jsonl")) {
        Err(Error::Io { path, source }) => {
            assert_eq!(path, d.join("no.jsonl"));
            assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(read(d), Err(Error::Io { .. })), "a directory");
    for (name, bytes) in [
        ("e.jsonl", vec![]),
        ("e.jsonl.zst", vec![]),
        ("blank.jsonl", b"\n \n\n".to_vec()),
        ("blank.jsonl.zst", zst(b"")),
        ("blank.jsonl.gz", gz(b"\n")),
    ] {
        assert!(corrupt(&file(d, name, &bytes)).0.contains("empty"), "{name}");
    }
    let (what, fix) = corrupt(&file(d, "w.jsonl", b"{\"premise\":\"a\",\"hypothesis\":\"b\"}\n"));
    assert_eq!(what, "wrong columns: found hypothesis, premise");
    assert!(fix.contains("query") && fix.contains("sentence1") && fix.contains("label"));
    // Found after a few rows, not at the end of the file.
    let long = "{\"a\":1}\n".repeat(1000) + GOOD;
    assert!(corrupt(&file(d, "l.jsonl", long.as_bytes())).0.contains("wrong columns: found a"));
    let packed = many(20_000);
    for (name, whole) in [("t.jsonl.zst", zst(&packed)), ("t.jsonl.gz", gz(&packed))] {
        let half = &whole[..whole.len() / 2];
        assert!(corrupt(&file(d, name, half)).0.starts_with("truncated"), "{name}");
        assert!(corrupt(&file(d, name, &whole[..whole.len() - 1])).0.starts_with("truncated"));
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x10;
        // The flip may surface as bad data or only in the checksum, never as good records.
        if name.ends_with("gz") {
            assert!(corrupt(&file(d, name, &flipped)).0.starts_with("corrupt"), "{name}");
        }
        let mut garbage = whole;
        garbage.extend_from_slice(b"garbage");
        let what = corrupt(&file(d, name, &garbage)).0;
        assert!(what.starts_with("corrupt") || what.starts_with("truncated"), "{what}");
        assert!(corrupt(&file(d, name, &packed)).0.contains("the name says"), "{name}");
    }
}

#[test]
fn the_given_kind_and_task_are_kept_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "a.jsonl", GOOD.as_bytes());
    let mut b = RecordsBuilder::default();
    let job = Job::new();
    let err = b.add_jsonl(&job, &path, input("a", Some(Kind::Sts))).unwrap_err().to_string();
    assert!(err.contains("positive, query, which are not those of sts rows"), "{err}");
    b.add_jsonl(&job, &path, Input { source: "a", task: "t", kind: None }).unwrap();
    let twice = b.add_jsonl(&job, &path, Input { source: "a", task: "t", kind: None });
    assert!(matches!(twice, Err(Error::Usage { .. })));
    let sts = b"{\"sentence1\":\"a\",\"sentence2\":\"b\",\"score\":1}";
    let other = b.add_lines(&job, sts, Input { source: "b", task: "t", kind: None });
    assert!(matches!(other, Err(Error::Usage { .. })));
    assert_eq!(b.finish().unwrap().examples.len(), 1);
}

#[test]
fn a_broken_file_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let packed = zst(&many(20_000));
    let bad = file(dir.path(), "bad.jsonl.zst", &packed[..packed.len() / 2]);
    let class = b"{\"text\":\"x\",\"label\":\"z\"}\n";
    let job = Job::new();
    let (mut with, mut without) = (RecordsBuilder::default(), RecordsBuilder::default());
    for b in [&mut with, &mut without] {
        b.add_lines(&job, GOOD.as_bytes(), input("a", None)).unwrap();
    }
    assert!(with.add_jsonl(&job, &bad, input("bad", None)).is_err());
    for b in [&mut with, &mut without] {
        b.add_lines(&job, class, input("b", None)).unwrap();
    }
    assert_eq!(format!("{:?}", with.finish().unwrap()), format!("{:?}", without.finish().unwrap()));
}

#[test]
fn pieces_of_a_stream_are_one_source() {
    let whole = many(1000);
    let bad = b"oops\n";
    let cut = whole.iter().take(20_000).rposition(|b| *b == b'\n').unwrap() + 1;
    let job = Job::new();
    let mut one = RecordsBuilder::default();
    one.add_lines(&job, &[&whole[..cut], bad, &whole[cut..]].concat(), input("s", None)).unwrap();
    let mut two = RecordsBuilder::default();
    for piece in [&whole[..cut], bad, &whole[cut..]] {
        // A piece of only faulty rows neither fails nor decides the kind.
        two.add_lines(&job, piece, input("s", None)).unwrap();
    }
    assert_eq!(format!("{:?}", one.finish().unwrap()), format!("{:?}", two.finish().unwrap()));
}

#[test]
fn a_cancelled_job_stops() {
    let job = Job::new();
    job.cancel();
    let result = RecordsBuilder::default().add_lines(&job, GOOD.as_bytes(), input("s", None));
    assert!(matches!(result, Err(Error::Cancelled)));
}
