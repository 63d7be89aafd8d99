//! Element types and their Rust counterparts.

use crate::{Error, Result};

/// Element types, with the names the safetensors header uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, clippy::upper_case_acronyms)]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    F8_E4M3,
    F8_E5M2,
    U16,
    I16,
    F16,
    BF16,
    U32,
    I32,
    F32,
    U64,
    I64,
    F64,
}

use Dtype::*;
const DTYPES: [Dtype; 15] =
    [BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, BF16, U32, I32, F32, U64, I64, F64];

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            BOOL | U8 | I8 | F8_E4M3 | F8_E5M2 => 1,
            U16 | I16 | F16 | BF16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 => 8,
        }
    }

    /// The name in the header, such as `"U16"`.
    pub fn name(self) -> &'static str {
        match self {
            BOOL => "BOOL",
            U8 => "U8",
            I8 => "I8",
            F8_E4M3 => "F8_E4M3",
            F8_E5M2 => "F8_E5M2",
            U16 => "U16",
            I16 => "I16",
            F16 => "F16",
            BF16 => "BF16",
            U32 => "U32",
            I32 => "I32",
            F32 => "F32",
            U64 => "U64",
            I64 => "I64",
            F64 => "F64",
        }
    }

    /// The type called `name`.
    pub(crate) fn find(name: &str) -> Option<Dtype> {
        DTYPES.into_iter().find(|d| d.name() == name)
    }

    /// The type called `name`; [`Error::Usage`] lists the known ones otherwise.
    pub fn parse(name: &str) -> Result<Dtype> {
        Dtype::find(name).ok_or_else(|| {
            let known: Vec<_> = DTYPES.iter().map(|d| d.name()).collect();
            Error::usage(
                format!("unknown dtype '{name}'"),
                format!("Use one of {}", known.join(", ")),
            )
        })
    }
}

/// A Rust type that a tensor can be read as in place.
pub trait Element: bytemuck::Pod {
    /// The header's name for it.
    const DTYPE: Dtype;
}
macro_rules! element {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: Dtype = $d; })* };
}
element!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32,
         u64 => U64, i64 => I64, f64 => F64);
