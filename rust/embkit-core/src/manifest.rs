//! `manifest.json` and `state.json`: canonical JSON with a checksum of itself.
//!
//! Canonical: what Python's `json.dumps(value, sort_keys=True, separators=(",", ":"),
//! ensure_ascii=False)` prints for finite numbers, and one newline at the end. A reader accepts nothing else, so every flipped bit is seen, even one in a space
//! that was never there.

use crate::{Error, Result, container, crc32c, publish};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// Largest manifest in bytes.
pub const MAX_MANIFEST: usize = 16 << 20;
const CRC: &str = "crc32c";

/// The canonical text of `value`, without newline.
pub fn canonical(value: &Value) -> String {
    let mut out = String::new();
    emit(value, &mut out);
    out
}

// Sorts by itself: serde_json's own order depends on a cargo feature that any crate can switch on.
fn emit(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_unstable_by(|a, b| a.0.cmp(b.0));
            for (i, (key, value)) in entries.into_iter().enumerate() {
                out.push(if i == 0 { '{' } else { ',' });
                out.push_str(&Value::from(key.as_str()).to_string());
                out.push(':');
                emit(value, out);
            }
            out.push_str(if map.is_empty() { "{}" } else { "}" });
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                out.push(if i == 0 { '[' } else { ',' });
                emit(item, out);
            }
            out.push_str(if items.is_empty() { "[]" } else { "]" });
        }
        Value::Number(n) if n.is_f64() => out.push_str(&float(n.as_f64().unwrap_or_default())),
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// A finite float as Python's `repr` has it: shortest digits that read back, in exponent form
/// outside 1e-4 <= |x| < 1e16. Written out, because serde_json's form changed between releases.
fn float(x: f64) -> String {
    let short = format!("{x:e}"); // such as -1.25e-7
    let (mantissa, exponent) = short.split_once('e').unwrap_or((&short, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{x:?}"); // Rust agrees with Python inside this range
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// Parses JSON for [`write`]: [`Error::Usage`] for what would not survive a round trip (integers
/// beyond 64 bits, NaN and infinities, which are not JSON).
pub fn parse(text: &str) -> Result<Value> {
    if let Some(number) = wide_integer(text) {
        return Err(Error::usage(
            format!("the integer {number} does not fit 64 bits"),
            "Store it as a string",
        ));
    }
    serde_json::from_str(text)
        .map_err(|e| Error::usage(format!("not valid JSON ({e})"), "Pass finite numbers only"))
}

/// Writes `value`, an object, with a `crc32c` field over the rest, and publishes it. One with a
/// `format` also gets `embkit` ([`container::SINCE`]) unless it has it.
pub fn write(path: &Path, value: &Value) -> Result<()> {
    let Value::Object(map) = value else {
        return Err(Error::usage("a manifest must be a JSON object", "Pass an object"));
    };
    let mut map = map.clone();
    map.remove(CRC);
    if map.contains_key("format") && !map.contains_key("embkit") {
        map.insert("embkit".into(), container::SINCE.into());
    }
    let crc = checksum(&Value::Object(map.clone()));
    map.insert(CRC.into(), Value::from(crc));
    let mut text = canonical(&Value::Object(map));
    text.push('\n');
    if text.len() > MAX_MANIFEST {
        return Err(Error::usage(
            format!("{}: would have {} bytes, above {MAX_MANIFEST}", path.display(), text.len()),
            "Put long tables into a .safetensors file",
        ));
    }
    publish::publish_file(path, text.as_bytes())
}

/// Reads and checks what [`write`] wrote; the result still has its `crc32c` field.
/// [`Error::Version`] for a format of ours that is newer than [`container::newest`].
pub fn read(path: &Path) -> Result<Value> {
    let length = fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_MANIFEST as u64 {
        return Err(Error::corrupt(path, format!("has {length} bytes, above {MAX_MANIFEST}")));
    }
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    check(path, &bytes)
}

/// [`read`] on bytes that are already in memory; `path` only names them in errors.
pub fn check(path: &Path, bytes: &[u8]) -> Result<Value> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|e| Error::corrupt(path, format!("is not valid JSON ({e})")))?;
    let Value::Object(mut map) = value else {
        return Err(Error::corrupt(path, "is not a JSON object"));
    };
    let stored = map.remove(CRC);
    let Some(Value::String(stored)) = stored else {
        return Err(Error::corrupt(path, "has no checksum (field crc32c)"));
    };
    let rest = Value::Object(map);
    if checksum(&rest) != stored {
        return Err(Error::corrupt(path, "does not match its checksum"));
    }
    let Value::Object(mut map) = rest else { return Err(Error::corrupt(path, "changed kind")) };
    map.insert(CRC.into(), Value::String(stored));
    let value = Value::Object(map);
    if bytes.strip_suffix(b"\n") != Some(canonical(&value).as_bytes()) {
        return Err(Error::corrupt(path, "is not in canonical form: it was edited or damaged"));
    }
    if let Some(format) = value.get("format").and_then(Value::as_str)
        && format.starts_with("embkit.")
    {
        expect(path, &value, format, container::newest(format))?;
    }
    Ok(value)
}

/// Refuses a manifest of another kind or a newer version, as [`container::Container::expect`] does
/// for files: fields `format` (string), `version` (integer), `embkit` (the one it needs).
pub fn expect(path: &Path, value: &Value, format: &str, newest: u32) -> Result<u32> {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    container::expect(path, text("format"), format, newest, || {
        let version = value.get("version").and_then(Value::as_u64);
        (version.and_then(|v| u32::try_from(v).ok()), text("embkit").map(str::to_owned))
    })
}

/// Joins a name from a manifest to its directory. [`Error::Corrupt`] when the name is absolute,
/// has `.`, `..`, backslashes or empty parts, or passes through a symbolic link.
pub fn inside(dir: &Path, name: &str) -> Result<PathBuf> {
    let refuse = |why: &str| Error::corrupt(dir, format!("names the file '{name}', {why}"));
    let mut path = dir.to_owned();
    for part in name.split('/') {
        if part.is_empty() || part == "." || part == ".." || part.contains(['\\', '\0']) {
            return Err(refuse("which is not a plain relative path"));
        }
        path.push(part);
        if fs::symlink_metadata(&path).is_ok_and(|m| m.is_symlink()) {
            return Err(refuse("which passes through a symbolic link"));
        }
    }
    Ok(path)
}

fn checksum(value: &Value) -> String {
    format!("{:08x}", crc32c(canonical(value).as_bytes()))
}

/// The first integer outside a string that neither i64 nor u64 holds.
fn wide_integer(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    let number = |b: &u8| b.is_ascii_digit() || matches!(b, b'-' | b'+' | b'.' | b'e' | b'E');
    let (mut at, mut quoted) = (0, false);
    while let Some(&b) = bytes.get(at) {
        match b {
            b'"' => quoted = !quoted,
            b'\\' if quoted => at += 1,
            b'-' | b'0'..=b'9' if !quoted => {
                let length = bytes.get(at..)?.iter().take_while(|b| number(b)).count();
                let token = text.get(at..at + length)?;
                let digits = token.strip_prefix('-').unwrap_or(token).bytes();
                if digits.into_iter().all(|b| b.is_ascii_digit())
                    && token.parse::<u64>().is_err()
                    && token.parse::<i64>().is_err()
                {
                    return Some(token);
                }
                at += length;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    None
}
