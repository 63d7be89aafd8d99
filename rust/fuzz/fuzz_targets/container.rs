//! Containers: the header, ours and foreign, and every read of an open file.
#![no_main]

use embkit_core::container::{Container, Verify};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|input: &[u8]| {
    let bytes = embkit_fuzz::file(input);
    let path = Path::new("x");
    let files = [
        Container::from_bytes(path, &bytes, Verify::Open),
        Container::from_bytes(path, &bytes, Verify::Off),
        Container::foreign_from_bytes(path, &bytes),
    ];
    for file in files.into_iter().flatten() {
        for name in file.names() {
            let _ = file.get(name).map(|view| view.bytes.len());
            let _ = (file.slice::<u64>(name), file.slice::<u16>(name), file.slice::<u8>(name));
        }
        let _ = file.expect("embkit.texts", 1);
    }
});
