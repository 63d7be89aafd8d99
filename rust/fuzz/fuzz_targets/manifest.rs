//! Manifests: what is accepted is canonical, and its names stay inside.
#![no_main]

use embkit_core::manifest;
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|input: &[u8]| {
    let path = Path::new("manifest.json");
    if let Ok(value) = manifest::check(path, input) {
        assert_eq!(format!("{}\n", manifest::canonical(&value)).as_bytes(), input);
    }
    if let Ok(text) = std::str::from_utf8(input) {
        if let Ok(inner) = manifest::inside(Path::new("/nowhere"), text) {
            assert!(inner.starts_with("/nowhere"));
            assert!(inner.components().all(|c| c != std::path::Component::ParentDir));
        }
        if let Ok(value) = manifest::parse(text) {
            // What can be written reads back as it is.
            let again = manifest::parse(&manifest::canonical(&value)).expect("canonical JSON");
            assert_eq!(manifest::canonical(&again), manifest::canonical(&value));
        }
    }
});
