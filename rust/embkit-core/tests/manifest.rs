//! Manifests: golden text, every flipped bit, every truncation, and what is refused.

use embkit_core::{Error, crc32c, manifest};
use serde_json::json;
use std::fs;
use std::path::Path;

#[test]
fn golden_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    let value = json!({"version": 1, "format": "embkit.store", "é": [1.5, -0.0, 1e300, 5e-324, 1e16, 9.5e15, 1e15, 123456789.125, 1e-4, 0.00012, 9.9e-5, 0.1, -1e-7],
        "a": {"z": null, "b": true}, "embkit": "1.2.3", "n": u64::MAX, "e": [], "crc32c": "ignored", "o": {}, "q": "\"\n\u{1}/"});
    manifest::write(&path, &value).unwrap();
    let rest = r#"{"a":{"b":true,"z":null},"e":[],"embkit":"1.2.3","format":"embkit.store","n":18446744073709551615,"o":{},"q":"\"\n\u0001/","version":1,"é":[1.5,-0.0,1e+300,5e-324,1e+16,9500000000000000.0,1000000000000000.0,123456789.125,0.0001,0.00012,9.9e-05,0.1,-1e-07]}"#;
    let crc = crc32c(rest.as_bytes());
    let want = rest.replacen("\"e\":[]", &format!("\"crc32c\":\"{crc:08x}\",\"e\":[]"), 1) + "\n";
    assert_eq!(fs::read_to_string(&path).unwrap(), want);
    let back = manifest::read(&path).unwrap();
    assert_eq!(back["n"], u64::MAX);
    assert_eq!(back["é"][3], 5e-324);
    // Writing what was read changes nothing.
    manifest::write(&path, &back).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), want);
}

/// P6.
#[test]
fn test_flip_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.json");
    let value = json!({"format": "embkit.checkpoint", "version": 1, "step": 100, "loss": 0.125,
        "files": {"model.safetensors": {"length": 123456}}, "seed": "é"});
    manifest::write(&path, &value).unwrap();
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            let got = manifest::check(&path, &bad);
            assert!(matches!(got, Err(Error::Corrupt { .. })), "byte {at} bit {bit}");
        }
        let got = manifest::check(&path, &good[..at]);
        assert!(matches!(got, Err(Error::Corrupt { .. })), "cut at {at}");
    }
    // White space is valid JSON and still not what was written.
    for at in 0..=good.len() {
        let mut bad = good.clone();
        bad.insert(at, b' ');
        assert!(manifest::check(&path, &bad).is_err(), "space at {at}");
    }
}

#[test]
fn what_would_not_survive_is_refused() {
    for text in
        ["{\"a\":18446744073709551616}", "[-9223372036854775809]", "[1,99999999999999999999]"]
    {
        assert!(matches!(manifest::parse(text), Err(Error::Usage { .. })), "{text}");
    }
    for text in ["NaN", "Infinity", "{\"a\":-Infinity}", "[1e999]", "{", "", "-"] {
        assert!(matches!(manifest::parse(text), Err(Error::Usage { .. })), "{text}");
    }
    let odd = r#"{"a\"99999999999999999999":"\\","b":"99999999999999999999","c":[18446744073709551615,-9223372036854775808,1e25]}"#;
    assert!(manifest::parse(odd).is_ok());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    assert!(matches!(manifest::write(&path, &json!([1])), Err(Error::Usage { .. })));
    let huge = json!({"a": "x".repeat(17 << 20)});
    assert!(matches!(manifest::write(&path, &huge), Err(Error::Usage { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    assert!(matches!(manifest::read(&path), Err(Error::Io { .. })));
    fs::write(&path, "x".repeat(17 << 20)).unwrap();
    assert!(matches!(manifest::read(&path), Err(Error::Corrupt { .. })));
}

#[test]
fn kinds_and_versions() {
    let path = Path::new("store/manifest.json");
    let value = json!({"format": "embkit.store", "version": 3, "embkit": "2.5.0"});
    assert_eq!(manifest::expect(path, &value, "embkit.store", 3).unwrap(), 3);
    assert!(matches!(
        manifest::expect(path, &value, "embkit.records", 3),
        Err(Error::Usage { .. })
    ));
    let Err(e) = manifest::expect(path, &value, "embkit.store", 2) else { panic!() };
    assert!(matches!(e, Error::Version { .. }));
    assert!(e.to_string().contains("needs embkit 2.5.0 or newer"), "{e}");
    for version in [json!(0), json!("1"), json!(1.5), json!(-1), json!(1u64 << 40), json!(null)] {
        let value = json!({"format": "embkit.store", "version": version});
        assert!(matches!(
            manifest::expect(path, &value, "embkit.store", 1),
            Err(Error::Corrupt { .. })
        ));
    }
}

#[test]
fn newer_ones_are_refused_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("manifest.json");
    manifest::write(&path, &json!({"format": "embkit.store", "version": 2, "embkit": "9.9.9"}))
        .unwrap();
    let Err(e) = manifest::read(&path) else { panic!() };
    assert!(matches!(e, Error::Version { .. }) && e.to_string().contains("9.9.9"), "{e}");
    manifest::write(&path, &json!({"format": "embkit.store", "version": 1})).unwrap();
    assert_eq!(manifest::read(&path).unwrap()["embkit"], "0.1.0");
    manifest::write(&path, &json!({"format": "other", "version": 2})).unwrap();
    manifest::read(&path).unwrap();
}

#[test]
fn names_stay_inside() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("tokenizer")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
    let good = manifest::inside(dir.path(), "tokenizer/tokenizer.json").unwrap();
    assert_eq!(good, dir.path().join("tokenizer/tokenizer.json"));
    for name in [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "",
        ".",
        "a//b",
        "a/",
        "link",
        "link/passwd",
        "a\\b",
        "a\0",
    ] {
        assert!(matches!(manifest::inside(dir.path(), name), Err(Error::Corrupt { .. })), "{name}");
    }
}
