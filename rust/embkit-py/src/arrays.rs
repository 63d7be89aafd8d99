//! numpy arrays in and out. The only `unsafe` of the crate is the view on a mapped file.

use crate::error::usage;
use embkit_core::container::{Container, Dtype, View};
use embkit_core::{TextShard, container};
use numpy::ndarray::ArrayView1;
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::Arc;

/// What an argument `shards` is: `list[tuple[u8[bytes], u64[n + 1]]]`.
pub(crate) type PyShards<'py> = Vec<(PyReadonlyArray1<'py, u8>, PyReadonlyArray1<'py, u64>)>;

/// The shards in place.
pub(crate) fn shards<'a>(py: Python, from: &'a PyShards) -> PyResult<Vec<TextShard<'a>>> {
    from.iter()
        .map(|(bytes, offsets)| {
            Ok(TextShard {
                bytes: slice(py, bytes, "text")?,
                offsets: slice(py, offsets, "text offsets")?,
            })
        })
        .collect()
}

/// The elements of a contiguous array in place.
pub(crate) fn slice<'a, T: Element>(
    py: Python,
    array: &'a PyReadonlyArray1<T>,
    name: &str,
) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|_| {
        let what = format!("the array '{name}' is not contiguous");
        usage(py, &what, "Pass numpy.ascontiguousarray of it")
    })
}

/// A new array from a vector, without copying.
pub(crate) fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Bound<'_, PyArray1<T>> {
    PyArray1::from_vec(py, values)
}

/// Keeps a mapped file alive for as long as an array looks into it.
#[pyclass(frozen)]
struct Mapped {
    _file: Arc<Container>,
}

/// A tensor of a mapped file as a read-only array that keeps the map alive. BF16 and F16 come as
/// `uint16`, the two F8 types as `uint8`; tensors that a foreign file does not align are copied.
pub(crate) fn tensor<'py>(
    py: Python<'py>,
    file: &Arc<Container>,
    view: View,
) -> PyResult<Bound<'py, PyAny>> {
    let aligned = view.bytes.as_ptr().addr().is_multiple_of(view.dtype.size());
    let bytes = if aligned {
        let owner = Bound::new(py, Mapped { _file: file.clone() })?.into_any();
        let bytes = ArrayView1::from(view.bytes);
        // SAFETY: `view.bytes` lies in the map (or, for an empty file, in the buffer) that `file`
        // owns. `owner`, the array's base, holds `file`, which never changes or moves its bytes,
        // and the array is made read-only before anyone sees it: numpy lets nobody undo that,
        // because the base offers no writable buffer.
        unsafe { PyArray1::borrow_from_array(&bytes, owner) }
    } else {
        array(py, view.bytes.to_vec())
    };
    let bytes = bytes.readwrite().make_nonwriteable();
    let name = match view.dtype {
        Dtype::BOOL => "bool",
        Dtype::U8 | Dtype::F8_E4M3 | Dtype::F8_E5M2 => "uint8",
        Dtype::I8 => "int8",
        Dtype::U16 | Dtype::F16 | Dtype::BF16 => "uint16",
        Dtype::I16 => "int16",
        Dtype::U32 => "uint32",
        Dtype::I32 => "int32",
        Dtype::F32 => "float32",
        Dtype::U64 => "uint64",
        Dtype::I64 => "int64",
        Dtype::F64 => "float64",
    };
    let typed = bytes.call_method1("view", (name,))?;
    typed.call_method1("reshape", (view.shape.to_vec(),))
}

/// `{"length", "header_crc", "crc_crc"}`: what a manifest records of a file.
pub(crate) fn info<'py>(
    py: Python<'py>,
    info: &container::FileInfo,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("length", info.length)?;
    dict.set_item("header_crc", info.header_crc)?;
    dict.set_item("crc_crc", info.crc_crc)?;
    Ok(dict)
}
