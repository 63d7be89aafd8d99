//! The value of one column in one row, from JSON or from Arrow, and what it decodes to.
//!
//! Both sources give the same values and the same faults: an Arrow null is an absent column, a
//! number is what its shortest decimal form reads as, and a type that JSON rows could not hold is a
//! wrong type.

use std::borrow::Cow;

use serde::de::Deserialize;
use serde_json::value::RawValue;

use super::arrow::Cells;
use super::faults::RowFault;

/// A value that is there; decoded only when its column is known.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value<'a> {
    /// Raw JSON, not null.
    Json(&'a RawValue),
    /// A text whose UTF-8 is not checked yet.
    Text(&'a [u8]),
    /// A whole number.
    Whole(i128),
    /// A number with a fraction, or none that is finite.
    Float(f64),
    /// A list.
    List(Cells<'a>),
    /// Of a type that no column takes.
    Other,
}

/// A required text that is not blank.
pub(crate) fn string<'a>(value: Value<'a>, column: &'static str) -> Result<Cow<'a, str>, RowFault> {
    not_blank(text(value, column)?, column)
}

/// A text or a list of texts, none of them blank; nulls in a list are skipped.
pub(crate) fn strings<'a>(
    value: Option<Value<'a>>,
    column: &'static str,
) -> Result<Vec<Cow<'a, str>>, RowFault> {
    optional_strings(value, column)?.into_iter().map(|text| not_blank(text, column)).collect()
}

/// Like [`strings`], but blank texts may stay (a passage without a title is a passage).
pub(crate) fn optional_strings<'a>(
    value: Option<Value<'a>>,
    column: &'static str,
) -> Result<Vec<Cow<'a, str>>, RowFault> {
    match value {
        None => Ok(Vec::new()),
        Some(Value::Json(raw)) if raw.get().starts_with('[') => {
            let list: Vec<Option<&RawValue>> = decode(raw, column)?;
            list.into_iter().flatten().map(|raw| text(Value::Json(raw), column)).collect()
        }
        Some(Value::List(cells)) => cells.iter().flatten().map(|cell| text(cell, column)).collect(),
        Some(value) => Ok(vec![text(value, column)?]),
    }
}

/// A number, or `None` when the column is absent.
pub(crate) fn number(value: Option<Value>, column: &'static str) -> Result<Option<f32>, RowFault> {
    value.map(|value| finite(value, column)).transpose()
}

/// A list of numbers, or `None` when the column is absent or not a list.
pub(crate) fn list_of_numbers(
    value: Option<Value>,
    column: &'static str,
) -> Result<Option<Vec<f32>>, RowFault> {
    match value {
        Some(Value::Json(raw)) if raw.get().starts_with('[') => {
            let list: Vec<&RawValue> = decode(raw, column)?;
            list.into_iter().map(|raw| finite(Value::Json(raw), column)).collect::<Result<_, _>>()
        }
        Some(Value::List(cells)) => cells
            .iter()
            .map(|cell| finite(cell.ok_or(RowFault::WrongType(column))?, column))
            .collect::<Result<_, _>>(),
        _ => return Ok(None),
    }
    .map(Some)
}

/// A class name: a text, or a whole number as its decimal digits (`3` and `3.0` are one class).
pub(crate) fn label(value: Value) -> Result<String, RowFault> {
    let wrong = RowFault::WrongType("label");
    match value {
        Value::Json(raw) if !raw.get().starts_with('"') => {
            let digits = raw.get().strip_suffix(".0").unwrap_or(raw.get());
            digits.parse::<i64>().map(|n| n.to_string()).map_err(|_| wrong)
        }
        Value::Whole(n) => i64::try_from(n).map(|n| n.to_string()).map_err(|_| wrong),
        // From here on a float's decimal form has an exponent, which is no class name.
        Value::Float(x) if x.fract() == 0.0 && x.abs() < 1e16 => Ok((x as i64).to_string()),
        Value::Json(_) | Value::Text(_) => Ok(string(value, "label")?.into_owned()),
        Value::Float(_) | Value::List(_) | Value::Other => Err(wrong),
    }
}

fn text<'a>(value: Value<'a>, column: &'static str) -> Result<Cow<'a, str>, RowFault> {
    match value {
        Value::Json(raw) => {
            let quoted = raw.get().strip_prefix('"').and_then(|r| r.strip_suffix('"'));
            match quoted {
                // Without escapes the text is what stands between the quotes.
                Some(plain) if memchr::memchr(b'\\', plain.as_bytes()).is_none() => {
                    Ok(Cow::Borrowed(plain))
                }
                _ => Ok(Cow::Owned(decode(raw, column)?)),
            }
        }
        Value::Text(bytes) => {
            let text = std::str::from_utf8(bytes).map_err(|_| RowFault::InvalidUtf8)?;
            Ok(Cow::Borrowed(text))
        }
        _ => Err(RowFault::WrongType(column)),
    }
}

fn not_blank<'a>(text: Cow<'a, str>, column: &'static str) -> Result<Cow<'a, str>, RowFault> {
    if text.trim().is_empty() { Err(RowFault::BlankText(column)) } else { Ok(text) }
}

fn decode<'a, T: Deserialize<'a>>(raw: &'a RawValue, column: &'static str) -> Result<T, RowFault> {
    // The raw value was checked to be JSON, except for the surrogates in its strings.
    serde_json::from_str(raw.get()).map_err(|e| match e.is_data() {
        true => RowFault::WrongType(column),
        false => RowFault::NotJson,
    })
}

/// A number as f32; what f32 cannot hold is not finite.
fn finite(value: Value, column: &'static str) -> Result<f32, RowFault> {
    let wrong = || RowFault::WrongType(column);
    let value: f32 = match value {
        Value::Json(raw) => {
            if !raw.get().starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
                return Err(wrong());
            }
            raw.get().parse().map_err(|_| wrong())?
        }
        Value::Whole(n) => n as f32,
        Value::Float(x) => narrow(x),
        _ => return Err(wrong()),
    };
    if value.is_finite() { Ok(value) } else { Err(RowFault::NonFiniteScore(column)) }
}

/// The f32 that the shortest decimal form of a number reads as. Rounding the number itself differs
/// where it lies just beside the middle of two f32.
fn narrow(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x { near } else { x.to_string().parse().unwrap_or(near) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_as_their_decimal_form() {
        let mut seed = 1_u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            for x in [f64::from_bits(seed), (seed >> 11) as f64 / 2_f64.powi(53)] {
                let want: f32 = format!("{x:e}").parse().unwrap();
                assert_eq!(narrow(x).to_bits(), want.to_bits(), "{x:e}");
            }
        }
        assert_eq!(narrow(0.1), 0.1);
        assert!(narrow(1e300).is_infinite());
    }

    #[test]
    fn labels_of_numbers() {
        let float = |x| label(Value::Float(x)).ok();
        assert_eq!(float(3.0).as_deref(), Some("3"));
        assert_eq!(float(-0.0).as_deref(), Some("0"));
        assert_eq!([float(3.5), float(1e16), float(f64::NAN)], [None, None, None]);
        assert_eq!(label(Value::Whole(-1)).unwrap(), "-1");
        assert!(label(Value::Whole(i128::from(u64::MAX))).is_err());
    }
}
