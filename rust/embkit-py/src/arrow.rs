//! Arrow data of Python objects through the C stream interface. The only `unsafe` of the bindings
//! beside the numpy views.

use crate::error::usage;
use arrow_array::RecordBatchReader;
use arrow_array::ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// The stream of an object with `__arrow_c_stream__`: a pyarrow table, batch or reader, a polars
/// frame, ...
pub(crate) fn stream(data: &Bound<'_, PyAny>) -> PyResult<impl RecordBatchReader + Send + use<>> {
    let py = data.py();
    if !data.hasattr("__arrow_c_stream__")? {
        let what = format!("a {} is no Arrow stream", data.get_type().name()?);
        return Err(usage(py, &what, "Pass a pyarrow.Table, RecordBatch or RecordBatchReader"));
    }
    let capsule = data.call_method0("__arrow_c_stream__")?;
    let capsule = capsule.cast::<PyCapsule>()?;
    let raw = capsule.pointer_checked(Some(c"arrow_array_stream"))?;
    let raw = raw.as_ptr().cast::<FFI_ArrowArrayStream>();
    // SAFETY: the PyCapsule interface promises that a capsule of this name holds a valid
    // ArrowArrayStream. `from_raw` moves it out and leaves a released one behind, which the
    // capsule's destructor recognises; we hold the GIL, so nobody else moves it at the same time.
    // The producer may be called from any one thread. That texts are UTF-8 and that inner offsets
    // lie inside their buffers is not promised: embkit-store reads bytes and checks both.
    let stream = unsafe { FFI_ArrowArrayStream::from_raw(raw) };
    RecordBatchStreamReader::try_new(stream).map_err(|e| broken(py, &e))
}

fn broken(py: Python, e: &dyn std::fmt::Display) -> PyErr {
    usage(py, &format!("the Arrow stream cannot be read: {e}"), "Pass a table with columns")
}
