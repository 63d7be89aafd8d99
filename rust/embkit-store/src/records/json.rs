//! One line of JSON as the columns of a row.
//!
//! Oddity: the `NaN` and `Infinity` that Python's `json` writes, though not JSON, are read as
//! numbers so that they are reported as what they are.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::columns::{Place, Row};
use super::faults::RowFault;
use super::value::Value;

/// The columns of a line. Errors: not JSON, not an object.
pub(crate) fn row(text: &str) -> Result<Row<'_>, RowFault> {
    serde_json::from_str(text).map_err(|e| match e.is_data() {
        true => RowFault::NotAnObject,
        false => RowFault::NotJson,
    })
}

impl<'de: 'a, 'a> Deserialize<'de> for Row<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Columns;
        impl<'de> Visitor<'de> for Columns {
            type Value = Row<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Row<'de>, A::Error> {
                let mut row = Row::default();
                while let Some(Name(name)) = map.next_key()? {
                    let value: &RawValue = map.next_value()?;
                    // A null is an absent value: exports of tables write it for every empty cell.
                    if value.get() != "null" {
                        row.set(Place::of(&name), name, Value::Json(value));
                    }
                }
                row.numbered.sort_by_key(|(n, _)| *n);
                Ok(row)
            }
        }
        deserializer.deserialize_map(Columns)
    }
}

/// A key, borrowed from the line unless it has escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Key;
        impl<'de> Visitor<'de> for Key {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a column name")
            }

            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(v)))
            }

            fn visit_str<E>(self, v: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(v.to_owned())))
            }
        }
        deserializer.deserialize_str(Key)
    }
}

/// Replaces `NaN`, `Infinity` and `-Infinity` outside strings by a number beyond every float.
/// `None` when there are none, so that the line is simply not JSON.
pub(crate) fn patch_non_finite(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped, mut found) = (false, false, false);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        if !in_string {
            let word = ["NaN", "-Infinity", "Infinity"].into_iter().find(|w| rest.starts_with(w));
            if let Some(word) = word {
                out.push_str("1e999");
                rest = rest.get(word.len()..).unwrap_or_default();
                found = true;
                continue;
            }
        }
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = in_string,
            '"' => in_string = !in_string,
            _ => {}
        }
        out.push(c);
        rest = rest.get(c.len_utf8()..).unwrap_or_default();
    }
    found.then_some(out)
}

/// The column names of a line, sorted; nothing when it is not an object.
pub(crate) fn names(line: &[u8]) -> Vec<String> {
    let row: BTreeMap<String, IgnoredAny> = serde_json::from_slice(line).unwrap_or_default();
    row.into_keys().collect()
}
