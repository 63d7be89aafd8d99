//! Records: lines, plain and packed.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::time::Duration;

use embkit_core::Job;
use embkit_store::records::{Input, RecordsBuilder};

use crate::mutate::{Rng, cpu, measured, mutants, mutate_json};
use crate::{Reached, scratch};

const LINES: [&str; 6] = [
    r#"{"query":"capital of france","positive":["Paris is the capital","It is Paris"],"negative":["Rome"],"neg_scores":[0.5],"weight":1.5,"id":"a"}"#,
    r#"{"query":"naïve café","positive":"a place","title":"t","score":0.25}"#,
    r#"{"sentence1":"a cat sits","sentence2":"a cat is sitting","score":4.5}"#,
    r#"{"sentence1":"a dog runs","sentence2":"stocks fell","score":0}"#,
    r#"{"text":"the battery died","label":"bad"}"#,
    r#"{"text":"works like a charm","label":3,"extra":{"a":[1,{"b":null}]}}"#,
];

/// A few lines of one kind, one of them changed.
fn mutate_lines(rng: &mut Rng) -> Vec<u8> {
    let kind = rng.below(3) * 2;
    let mut lines: Vec<String> = (0..2 + rng.below(4))
        .map(|i| LINES[if rng.below(40) == 0 { rng.below(6) } else { kind + i % 2 }].to_owned())
        .collect();
    for _ in 0..1 + rng.below(2) {
        let at = rng.below(lines.len());
        lines[at] = match rng.below(9) {
            0 => {
                // A value of another type, or none, or a blank one, or a score that is no number.
                let odd =
                    ["null", "7", "\" \\t\"", "[]", "[null]", "{}", "true", "1e999", "[[\"x\"]]"];
                let colons: Vec<usize> = lines[at].match_indices("\":").map(|(i, _)| i).collect();
                let Some(colon) = colons.get(rng.below(colons.len())) else { continue };
                let after = &lines[at][colon + 2..];
                let tail = after.find(",\"").map_or("}", |i| &after[i..]);
                format!("{}\":{}{tail}", &lines[at][..*colon], rng.pick(&odd))
            }
            1 => rng.pick(&["[1,2]", "\"text\"", "7", "{}", " ", "null", "{\"q\":1}"]).to_string(),
            2 => lines[at].replacen('"', "\u{feff}\"", 1),
            3 => format!("{}{}", "x".repeat(rng.below(3000)), lines[at]),
            4 => lines[at].replace("0.", "-").replace("4.5", "1e40"),
            _ => mutate_json(rng, &lines[at]),
        };
    }
    if rng.below(16) == 0 {
        for line in &mut lines {
            *line = ["\"query", "\"text", "\"sentence1"]
                .iter()
                .fold(line.clone(), |l, c| l.replace(c, "\"q"));
        }
    }
    if rng.below(16) == 0 {
        lines = vec![" ".repeat(rng.below(3))];
    }
    let end = *rng.pick(&["\n", "\n", "\n", "\r\n", "\n\n", "\r"]);
    let mut bytes = lines.join(end).into_bytes();
    if rng.below(6) == 0 && !bytes.is_empty() {
        let at = rng.below(bytes.len());
        bytes[at] = *rng.pick(&[0xff, 0, 0xc3, b'"', b'\\', b'\n', 0xed]);
    }
    bytes
}

fn packed(rng: &mut Rng, plain: &[u8]) -> (&'static str, Vec<u8>) {
    let gzip = |plain: &[u8]| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        out.write_all(plain).unwrap();
        out.finish().unwrap()
    };
    let (name, mut bytes) = match rng.below(2) {
        0 => ("x.jsonl.zst", zstd::encode_all(plain, 1).unwrap()),
        _ => ("x.jsonl.gz", gzip(plain)),
    };
    match rng.below(4) {
        0 => {}
        1 => bytes.truncate(rng.below(bytes.len())),
        2 => bytes = plain.to_vec(),
        _ => {
            let at = 4 + rng.below(bytes.len() - 4);
            bytes[at] ^= 1 << rng.below(8);
        }
    }
    (name, bytes)
}

#[test]
fn fuzz_records() {
    let files = [
        "the file is empty",
        "wrong columns",
        "truncated zstd stream",
        "corrupt zstd stream",
        "truncated gzip stream",
        "corrupt gzip stream",
        "the content is not zstd",
        "the content is not gzip",
        "rows from another source",
    ];
    let rows = [
        "invalid UTF-8",
        "line too long",
        "not JSON",
        "not an object",
        "missing column",
        "wrong type",
        "blank text",
        "non-finite score",
        "mixed kind",
    ];
    let mut reached = Reached::new(&files);
    let mut reasons: BTreeMap<&str, u64> = rows.map(|r| (r, 0)).into();
    let total = mutants(20_000);
    let (mut worst, mut slowest) = (0_f64, Duration::ZERO);
    let dir = scratch();
    for mutant in 0..total {
        let mut rng = Rng(mutant);
        let plain = mutate_lines(&mut rng);
        let mut file = None;
        if rng.below(4) == 0 {
            let (name, bytes) = packed(&mut rng, &plain);
            fs::write(dir.path().join(name), &bytes).unwrap();
            file = Some(dir.path().join(name));
        }
        let input = |source| Input { source, task: "t", kind: None };
        let read = || {
            let mut builder = RecordsBuilder::new(1000);
            let job = Job::new();
            if mutant % 8 == 0 {
                builder.add_lines(
                    &job,
                    LINES[mutant as usize / 8 % 6].as_bytes(),
                    input("first"),
                )?;
            }
            match &file {
                Some(path) => builder.add_jsonl(&job, path, input("s"))?,
                None => builder.add_lines(&job, &plain, input("s"))?,
            }
            builder.finish()
        };
        let start = cpu();
        let (result, held) = measured(read);
        slowest = slowest.max(cpu() - start);
        // Packed files come with the decoder's fixed window, which is not what is limited.
        if file.is_none() {
            let input = plain.len().max(4096);
            worst = worst.max(held as f64 / input as f64);
            assert!(held <= 4 * input, "mutant {mutant}: {held} bytes held for {input}");
        }
        let result = result.map(|records| {
            for (i, report) in records.reports.iter().enumerate() {
                assert_eq!(report.read, report.kept + report.rejected, "mutant {mutant}");
                assert_eq!(records.examples[i].query.len() as u64, report.kept);
                for (reason, n) in &report.reasons {
                    let known = reasons.iter_mut().find(|(r, _)| reason.starts_with(**r));
                    *known.unwrap_or_else(|| panic!("unknown reason {reason}")).1 += n;
                }
            }
            let texts = records.text_id.len() as u64;
            for table in &records.examples {
                let named = table.query.iter().chain(&table.positive).chain(&table.negative);
                assert!(named.into_iter().all(|row| *row < texts), "mutant {mutant}");
            }
            std::str::from_utf8(&records.text).unwrap();
        });
        reached.count(mutant, result);
    }
    println!("{reasons:#?}");
    for (reason, n) in reasons {
        assert!(n * 1000 >= total, "'{reason}' reached only {n} times in {total}");
    }
    reached.finish(total, worst, slowest);
}
