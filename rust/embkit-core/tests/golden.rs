//! The files in tests/golden are what released versions of embkit wrote: today's reader reads them,
//! today's writer writes the same bytes, and the next version is refused by name.

mod common;

use common::{build, parts, reseal};
use embkit_core::container::{Container, Tensor, Verify, write};
use embkit_core::{Error, manifest};
use std::fs;
use std::path::{Path, PathBuf};

fn golden(suffix: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_string_lossy().ends_with(suffix))
        .collect();
    found.sort();
    found
}

#[test]
fn containers_are_read_and_written_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let files = golden("-v1.safetensors");
    assert!(files.len() >= 9, "{files:?}");
    for file in files {
        let c = Container::open(&file, Verify::Open).unwrap();
        let views: Vec<_> = c.names().map(|n| (n, c.get(n).unwrap())).collect();
        assert!(!views.is_empty());
        let tensors: Vec<Tensor> = views
            .iter()
            .map(|(name, v)| Tensor {
                name,
                dtype: v.dtype,
                shape: v.shape.to_vec(),
                bytes: v.bytes,
            })
            .collect();
        let mut metadata = c.metadata().clone();
        metadata.remove("header_crc32c");
        let copy = dir.path().join("copy");
        let info = write(&copy, &tensors, &metadata).unwrap();
        let bytes = fs::read(&file).unwrap();
        assert!(fs::read(&copy).unwrap() == bytes, "{}: other bytes", file.display());
        c.expect_info(info).unwrap();

        let (json, data) = parts(&bytes);
        let json = json.replacen(r#""version":"1""#, r#""version":"2""#, 1);
        let newer =
            reseal(&build(&json.replacen(r#""embkit":"0.1.0""#, r#""embkit":"7.8.9""#, 1), &data));
        let Err(e) = Container::from_bytes(&file, &newer, Verify::Open) else { panic!("opened") };
        let said = e.to_string();
        assert!(matches!(e, Error::Version { .. }) && said.contains("7.8.9"), "{said}");
    }
}

#[test]
fn manifests_are_read_and_written_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let files = golden("-v1.json");
    assert!(files.len() >= 2, "{files:?}");
    for file in files {
        let value = manifest::read(&file).unwrap();
        let copy = dir.path().join("copy.json");
        manifest::write(&copy, &value).unwrap();
        assert_eq!(fs::read_to_string(&copy).unwrap(), fs::read_to_string(&file).unwrap());
        let mut newer = value.clone();
        newer["version"] = 2.into();
        newer["embkit"] = "7.8.9".into();
        manifest::write(&copy, &newer).unwrap();
        let Err(e) = manifest::read(&copy) else { panic!("read") };
        assert!(matches!(e, Error::Version { .. }) && e.to_string().contains("7.8.9"), "{e}");
    }
}
