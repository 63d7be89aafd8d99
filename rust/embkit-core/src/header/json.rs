//! The header's JSON into entries, with memory bounded by the header's own size.
//!
//! Oddity: there is no `derive` here. Serde's ready-made visitors quote what they did not expect,
//! and a file can hold a string of 16 MiB wherever a number was due; ours answer in a few words
//! (and ask for "any", because a deserializer asked for a number quotes the string by itself).

use super::{Entry, MAX_METADATA, MAX_NAME, MAX_RANK};
use crate::container::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// The header as it stands; positions still count from the data section.
pub(super) struct Raw {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) entries: Vec<Entry>,
}

/// Room for this many entries, taken at once: growing would hold the old and the new list.
pub(super) struct RawSeed {
    pub(super) entries: usize,
}

/// What each visitor here has in common: its name, and a short answer to a string.
macro_rules! expects {
    ($what:expr) => {
        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str($what)
        }
        fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
            Err(E::custom(concat!("a string instead of ", $what)))
        }
    };
}

impl<'de> DeserializeSeed<'de> for RawSeed {
    type Value = Raw;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> Result<Raw, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for RawSeed {
    type Value = Raw;
    expects!("a safetensors header");
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut raw = Raw { metadata: BTreeMap::new(), entries: Vec::with_capacity(self.entries) };
        let mut seen = false;
        while let Some(Name(name)) = map.next_key()? {
            if &*name != "__metadata__" {
                let Tensor { dtype, shape, span: (start, end) } = map.next_value()?;
                raw.entries.push(Entry { name, dtype, shape, start, end });
            } else if std::mem::replace(&mut seen, true) {
                return Err(A::Error::custom("__metadata__ twice"));
            } else {
                raw.metadata = map.next_value::<Metadata>()?.0;
            }
        }
        Ok(raw)
    }
}

/// A tensor's name.
struct Name(Box<str>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Name, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Name;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a name")
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<Name, E> {
                if name.len() > MAX_NAME {
                    return Err(E::custom("a name of more than 512 bytes"));
                }
                Ok(Name(name.into()))
            }
        }
        d.deserialize_str(V)
    }
}

/// The three fields of a tensor.
struct Tensor {
    dtype: Dtype,
    shape: Box<[usize]>,
    span: (usize, usize),
}

impl<'de> Deserialize<'de> for Tensor {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Tensor, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Tensor;
            expects!("a tensor's dtype, shape and data_offsets");
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tensor, A::Error> {
                let (mut dtype, mut shape, mut span) = (None, None, None);
                while let Some(Name(key)) = map.next_key()? {
                    let again = match &*key {
                        "dtype" => dtype.replace(map.next_value::<Type>()?.0).is_some(),
                        "shape" => shape.replace(map.next_value::<Numbers<MAX_RANK>>()?).is_some(),
                        "data_offsets" => span.replace(map.next_value::<Numbers<2>>()?).is_some(),
                        _ => return Err(A::Error::custom(format!("unknown field `{key}`"))),
                    };
                    if again {
                        return Err(A::Error::custom(format!("`{key}` given twice")));
                    }
                }
                match (dtype, shape, span) {
                    (Some(dtype), Some(shape), Some(Numbers { values: [a, b], count: 2 })) => {
                        let shape = shape.values.iter().copied().take(shape.count).collect();
                        Ok(Tensor { dtype, shape, span: (a, b) })
                    }
                    _ => Err(A::Error::custom("a tensor without dtype, shape or two data_offsets")),
                }
            }
        }
        d.deserialize_any(V)
    }
}

/// The name of a dtype.
struct Type(Dtype);

impl<'de> Deserialize<'de> for Type {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Type, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Type;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a dtype")
            }
            fn visit_str<E: Error>(self, name: &str) -> Result<Type, E> {
                let short: String = name.chars().take(16).collect();
                Dtype::find(name).map(Type).ok_or_else(|| E::custom(format!("dtype `{short}`")))
            }
        }
        d.deserialize_str(V)
    }
}

/// Up to `N` numbers, kept inline: a rank of a million must not cost a megabyte.
struct Numbers<const N: usize> {
    values: [usize; N],
    count: usize,
}

impl<'de, const N: usize> Deserialize<'de> for Numbers<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V<const N: usize>;
        impl<'de, const N: usize> Visitor<'de> for V<N> {
            type Value = Numbers<N>;
            expects!("a list of numbers");
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Numbers<N>, A::Error> {
                let mut out = Numbers { values: [0; N], count: 0 };
                while let Some(Number(value)) = seq.next_element()? {
                    let slot = out.values.get_mut(out.count);
                    let long = || A::Error::custom(format!("a list of more than {N} numbers"));
                    *slot.ok_or_else(long)? = value;
                    out.count += 1;
                }
                Ok(out)
            }
        }
        d.deserialize_any(V)
    }
}

/// One size or position.
struct Number(usize);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Number, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Number;
            expects!("a size");
            fn visit_u64<E: Error>(self, v: u64) -> Result<Number, E> {
                usize::try_from(v).map(Number).map_err(|_| E::custom("a size beyond this machine"))
            }
        }
        d.deserialize_any(V)
    }
}

struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Metadata, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Metadata;
            expects!("a map of strings to strings");
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((Name(key), value)) = map.next_entry::<Name, String>()? {
                    if out.len() == MAX_METADATA {
                        return Err(A::Error::custom("more than 64 metadata keys"));
                    }
                    if out.insert(key.into(), value).is_some() {
                        return Err(A::Error::custom("a metadata key twice"));
                    }
                }
                Ok(Metadata(out))
            }
        }
        d.deserialize_any(V)
    }
}
