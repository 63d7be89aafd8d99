//! Records: lines of plain text, or a packed file.
#![no_main]

use embkit_core::Job;
use embkit_store::records::{Input, RecordsBuilder};
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::sync::OnceLock;
use tempfile::TempDir;

static WORK: OnceLock<TempDir> = OnceLock::new();

fuzz_target!(|input: &[u8]| {
    let Some((flags, rest)) = input.split_first() else { return };
    let source = Input { source: "s", task: "t", kind: None };
    let mut builder = RecordsBuilder::new(4096);
    let read = if flags % 4 == 0 {
        // By its first bytes: zstd, gzip or plain.
        let path = WORK.get_or_init(embkit_fuzz::scratch).path().join("x.jsonl");
        fs::write(&path, rest).expect("a file");
        builder.add_jsonl(&Job::new(), &path, source)
    } else {
        builder.add_lines(&Job::new(), rest, source)
    };
    if read.is_err() {
        return;
    }
    let Ok(records) = builder.finish() else { return };
    let texts = records.text_id.len() as u64;
    for (table, report) in records.examples.iter().zip(&records.reports) {
        assert_eq!(report.read, report.kept + report.rejected);
        assert!(table.query.iter().chain(&table.positive).all(|row| *row < texts));
    }
});
