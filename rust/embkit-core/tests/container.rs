//! The container against golden bytes, a round trip, every flipped bit, every truncation, and one
//! handmade file for each thing that can be wrong.

mod common;

use common::{build, message, meta, parts, reseal};
use embkit_core::container::{Container, Dtype, Tensor, Verify, write};
use embkit_core::{Error, crc32c};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const NAME: &str = "x.safetensors";

fn open(bytes: &[u8]) -> Result<Container, Error> {
    Container::from_bytes(Path::new(NAME), bytes, Verify::Open)
}

/// A small file with every element size and a `pad`.
fn small() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let tensors = [
        Tensor::vector("text", b"hello"),
        Tensor::vector("offsets", &[0u64, 2, 5]),
        Tensor::shaped("score", &[2, 1], &[0.5f32, f32::NAN]),
        Tensor::vector("task", &[7u16]),
    ];
    let info = write(&path, &tensors, &meta("embkit.test", 1)).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(info.length, bytes.len() as u64);
    bytes
}

#[test]
fn golden_bytes() {
    let mut json = String::from(
        r#"{"__metadata__":{"header_crc32c":"00000000","embkit":"0.1.0","format":"embkit.test","version":"1"},"#,
    );
    json += r#""offsets":{"dtype":"U64","shape":[3],"data_offsets":[0,24]},"#;
    json += r#""score":{"dtype":"F32","shape":[2,1],"data_offsets":[24,32]},"#;
    json += r#""task":{"dtype":"U16","shape":[1],"data_offsets":[32,34]},"#;
    json += r#""text":{"dtype":"U8","shape":[5],"data_offsets":[34,39]},"#;
    json += r#""pad":{"dtype":"U8","shape":[1],"data_offsets":[39,40]},"#;
    json += r#""crc":{"dtype":"U32","shape":[1],"data_offsets":[40,44]}}"#;
    let mut data = Vec::new();
    for v in [0u64, 2, 5] {
        data.extend(v.to_le_bytes());
    }
    data.extend([0, 0, 0, 0x3f, 0, 0, 0xc0, 0x7f, 7, 0]);
    data.extend(b"hello\0");
    data.extend(crc32c(&data).to_le_bytes());
    let mut want = 4088u64.to_le_bytes().to_vec();
    want.extend(json.bytes().chain(std::iter::repeat_n(b' ', 4088 - json.len())));
    let crc = crc32c(&want); // the digits are zeros here
    want.splice(8 + 34..8 + 42, format!("{crc:08x}").into_bytes());
    want.extend(data);
    assert_eq!(small(), want);
}

#[test]
fn reads_back_what_was_written_in_place() {
    let c = open(&small()).unwrap();
    assert_eq!(c.names().collect::<Vec<_>>(), ["offsets", "score", "task", "text"]);
    assert_eq!(c.slice::<u64>("offsets").unwrap(), [0, 2, 5]);
    assert_eq!(c.slice::<u8>("text").unwrap(), b"hello");
    assert_eq!(c.get("score").unwrap().shape, [2, 1]);
    assert!(c.slice::<f32>("score").unwrap()[1].is_nan());
    assert_eq!(c.metadata()["format"], "embkit.test");
    assert_eq!(c.expect("embkit.test", 1).unwrap(), 1);
    assert!(c.has("crc") && !c.has("no"));
    let foreign = Container::foreign_from_bytes(Path::new(NAME), &small()).unwrap();
    assert_eq!(foreign.names().count(), 6);
    assert_eq!(foreign.info(), None);
}

/// P6.
#[test]
fn test_flip_every_byte() {
    let bytes = small();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            match open(&bad) {
                Err(Error::Corrupt { .. }) => {}
                Err(e) => panic!("byte {at} bit {bit}: {e}"),
                Ok(_) => panic!("byte {at} bit {bit} was not seen"),
            }
        }
    }
}

#[test]
fn every_truncation_and_every_zeroed_or_swapped_sector_is_seen() {
    let bytes = small();
    for n in 0..bytes.len() {
        assert!(matches!(open(&bytes[..n]), Err(Error::Corrupt { .. })), "cut at {n}");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert!(open(&longer).is_err());
    let sectors = bytes.len().div_ceil(512);
    for s in 0..sectors {
        let mut bad = bytes.clone();
        let end = bad.len().min((s + 1) * 512);
        bad[s * 512..end].fill(0);
        assert!(bad == bytes || open(&bad).is_err(), "sector {s} zeroed");
        for t in 0..s {
            let mut bad = bytes.clone();
            let n = 512.min(bad.len() - s * 512);
            let (a, b) = bad.split_at_mut(s * 512);
            a[t * 512..t * 512 + n].swap_with_slice(&mut b[..n]);
            assert!(bad == bytes || open(&bad).is_err(), "sectors {s} and {t} swapped");
        }
    }
}

/// P6 for a file of many blocks: random flips, 10^5 of them in full.
#[test]
fn test_flip_larger_files() {
    let values: Vec<u64> = (0..60_000).map(|i| i * i).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    write(&path, &[Tensor::vector("v", &values)], &meta("embkit.test", 1)).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let flips = if std::env::var_os("EMBKIT_TEST_FULL").is_some() { 100_000 } else { 1000 };
    let mut state = 1u64;
    for _ in 0..flips {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (state >> 33) as usize % bytes.len();
        let bit = 1 << (state >> 30 & 7);
        bytes[at] ^= bit;
        assert!(matches!(open(&bytes), Err(Error::Corrupt { .. })), "byte {at} ^ {bit}");
        bytes[at] ^= bit;
    }
    open(&bytes).unwrap();
}

/// Larger files: random flips, found at open or on the first touch of the tensor they hit.
#[test]
fn first_touch_verifies_what_is_touched_and_only_that() {
    let a: Vec<u64> = (0..40_000).collect();
    let b = vec![3u8; 200_001];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let info =
        write(&path, &[Tensor::vector("b", &b), Tensor::vector("a", &a)], &meta("embkit.test", 1))
            .unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 1000; // inside the last block, which holds the end of "b" only
    bytes[at] ^= 16;
    std::fs::write(&path, &bytes).unwrap();

    assert!(Container::open(&path, Verify::Open).is_err());
    let off = Container::open(&path, Verify::Off).unwrap();
    assert_eq!(off.slice::<u8>("b").unwrap().len(), b.len());
    let c = Container::open(&path, Verify::FirstTouch).unwrap();
    c.expect_info(info).unwrap();
    assert_eq!(c.slice::<u64>("a").unwrap(), a);
    assert_eq!(c.slice_untouched::<u8>("b").unwrap().len(), b.len());
    c.verify_range("b", 0..100_000).unwrap();
    c.verify_range("b", 200_001..200_001).unwrap();
    let said = message(c.slice::<u8>("b"));
    assert!(said.contains("do not match their checksum") && said.contains(NAME), "{said}");
    assert!(c.verify_range("b", 199_000..199_500).is_err());
    assert!(matches!(c.verify_range("b", 0..200_002), Err(Error::Usage { .. })));
    assert!(c.verify_all().is_err());
}

#[test]
fn each_fault_has_its_own_message() {
    let good = small();
    let (json, data) = parts(&good);
    let edit = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        reseal(&build(&json.replacen(from, to, 1), &data))
    };
    let cut_header = {
        let mut b = good.clone();
        b.truncate(100);
        b
    };
    let huge_header = {
        let mut b = good.clone();
        b[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        b
    };
    let unaligned_data = {
        let mut b = ((json.len()) as u64).to_le_bytes().to_vec();
        b.extend(json.bytes());
        b.extend(&data);
        reseal(&b)
    };
    // One byte of "text" moves before "task".
    let unaligned_task = {
        let from = r#"[32,34]},"text":{"dtype":"U8","shape":[5],"data_offsets":[34,39]}"#;
        let to = r#"[33,35]},"text":{"dtype":"U8","shape":[1],"data_offsets":[32,33]}"#;
        let json = json.replacen(from, to, 1).replacen(
            r#""shape":[1],"data_offsets":[39,40]"#,
            r#""shape":[5],"data_offsets":[35,40]"#,
            1,
        );
        reseal(&build(&json, &data))
    };
    let pad = r#""pad":{"dtype":"U8","shape":[1],"data_offsets":[39,40]},"#;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "too short for a header length"),
        (b"1234567".to_vec(), "too short for a header length"),
        (huge_header, "claims a header of 1099511627776 bytes"),
        (cut_header, "ends inside its header"),
        (build("{\"a\":", &[]), "not safetensors JSON"),
        (edit(r#""shape":[3]"#, r#""shape":[1,1,1,1,1,1,1,1,3]"#), "a list of more than 8 numbers"),
        (edit(r#""shape":[3]"#, r#""shape":[-3]"#), "not safetensors JSON"),
        (edit("\"U64\"", "\"U65\""), "dtype `U65`"),
        (edit("\"shape\"", "\"shapes\""), "unknown field `shapes`"),
        (edit("[0,24]", "[0,99]"), "tensor 'offsets' spans bytes 0..99"),
        (edit("[0,24]", "[24,0]"), "tensor 'offsets' spans bytes 24..0"),
        (edit("[0,24]", "[0,18446744073709551615]"), "spans bytes"),
        (edit(r#""shape":[3]"#, r#""shape":[4]"#), "needs 32 bytes for its shape but spans 24"),
        (edit(r#""shape":[3]"#, r#""shape":[4294967296,4294967296]"#), "size overflows"),
        (edit(pad, ""), "tensors must follow each other"),
        (
            edit(r#","crc":{"dtype":"U32","shape":[1],"data_offsets":[40,44]}"#, ""),
            "4 bytes after its last tensor",
        ),
        (edit("\"task\"", "\"text\""), "tensor 'text' twice"),
        (edit("\"embkit\":", "\"version\":"), "a metadata key twice"),
        (
            build(&json.replacen("header_crc32c", "header_crc32d", 1), &data),
            "no embkit header checksum",
        ),
        (
            build(&json.replacen("0.1.0", "0.1.1", 1), &data),
            "header that does not match its checksum",
        ),
        (unaligned_data, "not a multiple of 4096"),
        (unaligned_task, "tensor 'task' at unaligned byte 4129"),
        (edit("\"crc\"", "\"crd\""), "has no tensor 'crc'"),
        (edit(r#""crc":{"dtype":"U32","#, r#""crc":{"dtype":"I32","#), "not the last one, U32 [1]"),
        (
            edit(r#""crc":{"dtype":"U32","shape":[1]"#, r#""crc":{"dtype":"U32","shape":[1,1]"#),
            "not the last one, U32 [1]",
        ),
        (
            {
                let mut b = good.clone();
                b[4096] ^= 1;
                b
            },
            "bytes 4096..4136 do not match their checksum",
        ),
    ];
    for (bytes, want) in cases {
        let Err(e) = open(&bytes) else { panic!("accepted, wanted '{want}'") };
        assert!(matches!(e, Error::Corrupt { .. }), "{e}");
        let said = e.to_string();
        assert!(said.starts_with(NAME) && said.contains(want), "'{said}' lacks '{want}'");
        assert!(said.contains("estore"), "'{said}' does not say what to do");
    }
    // The same edits without a fault open: the helper itself is right.
    open(&edit("0.1.0", "0.1.1")).unwrap();
}

#[test]
fn newer_versions_and_other_kinds_are_refused_by_name() {
    let good = small();
    let (json, data) = parts(&good);
    let newer =
        json.replacen(r#""version":"1""#, r#""version":"2""#, 1).replacen("0.1.0", "9.8.7", 1);
    let Err(e) = open(&reseal(&build(&newer, &data))) else { panic!("opened") };
    assert!(matches!(e, Error::Version { .. }));
    let said = e.to_string();
    assert!(
        said.contains("embkit.test version 2") && said.contains("embkit 9.8.7 or newer"),
        "{said}"
    );
    let c = open(&good).unwrap();
    assert!(matches!(c.expect("embkit.other", 1), Err(Error::Usage { .. })));
    assert!(matches!(c.expect("embkit.test", 0), Err(Error::Version { .. })));
    for bad in ["0", "x", "-1", "99999999999999999999"] {
        let json = json.replacen(r#""version":"1""#, &format!(r#""version":"{bad}""#), 1);
        let got = open(&reseal(&build(&json, &data)));
        assert!(matches!(got, Err(Error::Corrupt { .. })), "{bad}");
    }
}

#[test]
fn wrong_use_is_told_apart_from_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let ok = meta("embkit.test", 1);
    let v = [1u8, 2];
    let name = "n".repeat(513);
    let t = |name| Tensor::vector(name, &v);
    let long = Tensor { name: "a", dtype: Dtype::U16, shape: vec![2], bytes: &v };
    let rank =
        Tensor { name: "a", dtype: Dtype::U8, shape: vec![1, 1, 1, 1, 1, 1, 1, 1, 2], bytes: &v };
    let huge = Tensor { name: "a", dtype: Dtype::U8, shape: vec![usize::MAX, 2], bytes: &v };
    for tensors in [
        vec![t("a"), t("a")],
        vec![t("crc")],
        vec![t("pad")],
        vec![t("__metadata__")],
        vec![t("")],
        vec![t(&name)],
        vec![long],
        vec![rank],
        vec![huge],
    ] {
        assert!(matches!(write(&path, &tensors, &ok), Err(Error::Usage { .. })));
    }
    let mut reserved = ok.clone();
    reserved.insert("header_crc32c".into(), "00000000".into());
    let many: BTreeMap<_, _> =
        ok.clone().into_iter().chain((0..62).map(|i| (i.to_string(), String::new()))).collect();
    let mut long = ok.clone();
    long.insert("x".into(), "y".repeat(17 << 20));
    for metadata in [BTreeMap::new(), meta("embkit.test", 0), reserved, many, long] {
        assert!(matches!(write(&path, &[t("a")], &metadata), Err(Error::Usage { .. })));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing may be left");
    assert!(matches!(Container::open(&path, Verify::Open), Err(Error::Io { .. })));
    assert!(matches!(Container::open(dir.path(), Verify::Open), Err(Error::Usage { .. })));
    assert!(matches!(Verify::parse("maybe"), Err(Error::Usage { .. })));
    assert_eq!(Verify::parse("off").unwrap(), Verify::Off);
    let said = message(Dtype::parse("int8"));
    assert!(said.contains("BOOL, U8, I8") && said.contains("'int8'"), "{said}");
    assert_eq!(Dtype::parse("BF16").unwrap().size(), 2);

    write(&path, &[t("a")], &ok).unwrap();
    let c = Container::open(&path, Verify::FirstTouch).unwrap();
    assert!(message(c.slice::<u8>("b")).contains("no tensor 'b' (it has: a)"));
    assert!(message(c.slice::<u16>("a")).contains("'a' as U8, not U16"));
    let mut other = c.info().unwrap();
    other.crc_crc ^= 1;
    assert!(matches!(c.expect_info(other), Err(Error::Corrupt { .. })));
}

/// safetensors #762: saving over the file that is mapped gave zeros.
#[test]
fn a_file_may_be_saved_over_itself() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(NAME);
    let v: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
    write(&path, &[Tensor::vector("v", &v)], &meta("embkit.test", 1)).unwrap();
    let first = Container::open(&path, Verify::FirstTouch).unwrap();
    let again = first.slice::<f32>("v").unwrap();
    write(&path, &[Tensor::vector("v", again)], &meta("embkit.test", 1)).unwrap();
    assert_eq!(first.slice::<f32>("v").unwrap(), v);
    assert_eq!(Container::open(&path, Verify::Open).unwrap().slice::<f32>("v").unwrap(), v);
}

/// A file as other programs write it: no alignment, no checksums.
#[test]
fn foreign_files_are_read() {
    let json = r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},"b":{"dtype":"BOOL","shape":[1],"data_offsets":[0,1]}}"#;
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.bytes());
    file.extend([1, 0, 0, 0x80, 0x3f]);
    let c = Container::foreign_from_bytes(Path::new(NAME), &file).unwrap();
    assert_eq!(c.get("w").unwrap().bytes, 1f32.to_le_bytes());
    assert!(message(c.slice::<f32>("w")).contains("odd place"));
    assert!(matches!(open(&file), Err(Error::Corrupt { .. })));
    let bare = [2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'];
    assert_eq!(Container::foreign_from_bytes(Path::new(NAME), &bare).unwrap().names().count(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn round_trip(
        wide in proptest::collection::vec(any::<u64>(), 0..300),
        floats in proptest::collection::vec(any::<u32>(), 0..7),
        halves in proptest::collection::vec(any::<u16>(), 0..200),
        bytes in proptest::collection::vec(any::<u8>(), 0..200_000),
        name in "[^\\x00]{1,20}",
        value in ".{0,50}",
    ) {
        prop_assume!(!["w", "f", "h", "crc", "pad", "__metadata__"].contains(&name.as_str()));
        let floats: Vec<f32> = floats.into_iter().map(f32::from_bits).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let mut tensors = vec![
            Tensor::vector(&name, &bytes),
            Tensor { name: "h", dtype: Dtype::BF16, shape: vec![halves.len()], bytes: bytemuck::cast_slice(&halves) },
            Tensor::vector("w", &wide),
            Tensor::shaped("f", &[1, floats.len()], &floats),
        ];
        let mut metadata = meta("embkit.test", 1);
        metadata.insert(name.clone(), value.clone());
        prop_assume!(metadata.len() == 3 && name != "header_crc32c");
        let info = write(&path, &tensors, &metadata).unwrap();
        let c = Container::open(&path, Verify::Open).unwrap();
        prop_assert_eq!(c.info(), Some(info));
        prop_assert_eq!(c.slice::<u64>("w").unwrap(), &wide);
        prop_assert_eq!(c.slice::<u8>(&name).unwrap(), &bytes);
        prop_assert_eq!(c.get("h").unwrap().bytes, bytemuck::cast_slice::<u16, u8>(&halves));
        prop_assert_eq!(c.get("f").unwrap().bytes, bytemuck::cast_slice::<f32, u8>(&floats));
        prop_assert_eq!(&c.metadata()[&name], &value);
        // The order in which tensors are given does not show.
        tensors.reverse();
        let other = dir.path().join("other");
        write(&other, &tensors, &metadata).unwrap();
        prop_assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&other).unwrap());
    }
}
