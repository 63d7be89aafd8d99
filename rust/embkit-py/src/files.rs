//! Checksums, publishing, manifests, containers, permutation.

use crate::arrays::{array, info, tensor};
use crate::door::short;
use crate::error::{to_py, usage};
use embkit_core::container::{self, Container, Dtype, Tensor, Verify};
use embkit_core::permute::Feistel;
use embkit_core::{manifest, par, publish};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyDict;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// CRC-32C of bytes.
#[pyfunction]
pub(crate) fn crc32c(py: Python, data: PyBackedBytes) -> u32 {
    py.detach(|| embkit_core::crc32c(&data))
}

/// BLAKE3 of bytes, 64 hex digits.
#[pyfunction]
pub(crate) fn blake3(py: Python, data: PyBackedBytes) -> String {
    py.detach(|| embkit_core::blake3_hex(&data))
}

/// BLAKE3 of a file's content, 64 hex digits.
#[pyfunction]
pub(crate) fn blake3_file(py: Python, path: PathBuf) -> PyResult<String> {
    short(py, || embkit_core::blake3_file(&path))
}

/// Write a file that is whole or absent: temp, fsync, rename, fsync of the directory.
#[pyfunction]
pub(crate) fn publish_file(py: Python, path: PathBuf, data: PyBackedBytes) -> PyResult<()> {
    short(py, || publish::publish_file(&path, &data))
}

/// Move a finished directory to its final name, durably, replacing what is there.
#[pyfunction]
#[pyo3(signature = (tmp, r#final))]
pub(crate) fn publish_dir(py: Python, tmp: PathBuf, r#final: PathBuf) -> PyResult<()> {
    short(py, || publish::publish_dir(&tmp, &r#final))
}

/// Remove what dead writers left in a directory; returns how many.
#[pyfunction]
pub(crate) fn sweep_tmp(py: Python, dir: PathBuf) -> PyResult<usize> {
    short(py, || publish::sweep_tmp(&dir))
}

/// A fresh temporary name beside a path, which `sweep_tmp` recognises.
#[pyfunction]
pub(crate) fn temp_path(py: Python, path: PathBuf) -> PyResult<String> {
    let temp = short(py, || publish::temp_path(&path))?;
    Ok(temp.to_string_lossy().into_owned())
}

/// Publish a JSON object in canonical form, with its own checksum.
#[pyfunction]
pub(crate) fn write_manifest(py: Python, path: PathBuf, json: &str) -> PyResult<()> {
    short(py, || manifest::write(&path, &manifest::parse(json)?))
}

/// Read and verify what `write_manifest` wrote; returns canonical JSON.
#[pyfunction]
pub(crate) fn read_manifest(py: Python, path: PathBuf) -> PyResult<String> {
    short(py, || Ok(manifest::canonical(&manifest::read(&path)?)))
}

/// Publish a container file.
#[pyfunction]
pub(crate) fn write_tensors<'py>(
    py: Python<'py>,
    path: PathBuf,
    tensors: Vec<(String, String, Vec<usize>, Bound<'py, PyAny>)>,
    metadata: BTreeMap<String, String>,
) -> PyResult<Bound<'py, PyDict>> {
    // Bytes of each array as numpy sees them: no copy when it is contiguous.
    let numpy = py.import("numpy")?;
    let bytes: Vec<PyReadonlyArray1<u8>> = tensors
        .iter()
        .map(|(_, _, _, data)| {
            let whole = numpy.call_method1("ascontiguousarray", (data,))?;
            let flat = whole.call_method1("reshape", (-1,))?.call_method1("view", ("uint8",))?;
            flat.extract()
        })
        .collect::<PyResult<_>>()?;
    let mut parts = Vec::with_capacity(tensors.len());
    for ((name, dtype, shape, _), bytes) in tensors.iter().zip(&bytes) {
        let dtype = Dtype::parse(dtype).map_err(|e| to_py(py, e))?;
        let bytes = crate::arrays::slice(py, bytes, name)?;
        parts.push(Tensor { name, dtype, shape: shape.clone(), bytes });
    }
    let written = short(py, || container::write(&path, &parts, &metadata))?;
    info(py, &written)
}

/// Map a container file: `({name: (dtype, array)}, metadata)`.
#[pyfunction]
#[pyo3(signature = (path, verify="first-touch"))]
pub(crate) fn open_tensors<'py>(
    py: Python<'py>,
    path: PathBuf,
    verify: &str,
) -> PyResult<(Bound<'py, PyDict>, BTreeMap<String, String>)> {
    let file = short(py, || {
        if verify == "foreign" {
            return Container::open_foreign(&path);
        }
        let file = Container::open(&path, Verify::parse(verify)?)?;
        // An array that Python holds can be touched anywhere at any time without asking us: the
        // first touch is handing it out.
        if verify == "first-touch" {
            file.verify_all()?;
        }
        Ok(file)
    })?;
    let file = Arc::new(file);
    let out = PyDict::new(py);
    for name in file.names() {
        let view = file.get_untouched(name).map_err(|e| to_py(py, e))?;
        out.set_item(name, (view.dtype.name(), tensor(py, &file, view)?))?;
    }
    Ok((out, file.metadata().clone()))
}

/// Length and checksums of a container file, header verified.
#[pyfunction]
pub(crate) fn file_info(py: Python<'_>, path: PathBuf) -> PyResult<Bound<'_, PyDict>> {
    let file = short(py, || Container::open(&path, Verify::Off))?;
    let found = file.info().ok_or_else(|| usage(py, "not an embkit file", "Give one"))?;
    info(py, &found)
}

/// Positions `start..start + count` of the keyed permutation of `[0, n)`.
#[pyfunction]
pub(crate) fn permute(
    py: Python<'_>,
    n: u64,
    key: u64,
    start: u64,
    count: u64,
) -> PyResult<Bound<'_, PyArray1<u64>>> {
    if start.checked_add(count).is_none_or(|end| end > n) {
        let what = format!("positions {start}..{start} + {count} of a permutation of {n}");
        return Err(usage(py, &what, "Ask for positions below n"));
    }
    let values = py.detach(|| {
        let order = Feistel::new(n, key);
        let blocks = par::map_blocks(count as usize, 1 << 16, 0, |range| {
            order.range(start + range.start as u64, range.len() as u64)
        });
        blocks.concat()
    });
    Ok(array(py, values))
}
