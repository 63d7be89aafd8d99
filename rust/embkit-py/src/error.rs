//! Errors of the core as Python exceptions, kind by kind.

use embkit_core::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyType};
use std::path::Path;

pyo3::import_exception!(embkit.errors, UsageError);
pyo3::import_exception!(embkit.errors, CorruptError);
pyo3::import_exception!(embkit.errors, FormatError);

/// EIO: for failures that the operating system gave no number.
const EIO: i32 = 5;

/// The exception for `error`.
pub(crate) fn to_py(py: Python, error: Error) -> PyErr {
    let made = match error {
        Error::Corrupt { path, what, fix } => {
            let subject = if path.is_dir() { "This directory " } else { "This file " };
            make(&py.get_type::<CorruptError>(), sentence(subject, &what), Some(&path), fix)
        }
        Error::Version { path, found, supported } => make(
            &py.get_type::<FormatError>(),
            format!(
                "This file is {found}; this is embkit {}, which reads {supported}.",
                env!("CARGO_PKG_VERSION")
            ),
            Some(&path),
            "install the newer embkit, or write the file again with this one".into(),
        ),
        Error::Usage { what, fix } => {
            make(&py.get_type::<UsageError>(), sentence("", &what), None, fix)
        }
        Error::Io { path, source } => {
            let errno = source.raw_os_error().unwrap_or(EIO);
            let text = match source.raw_os_error() {
                // Rust adds " (os error 2)", Python "[Errno 2]": once is enough.
                Some(n) => source.to_string().replace(&format!(" (os error {n})"), ""),
                None => source.to_string(),
            };
            return PyOSError::new_err((errno, text, path.into_os_string()));
        }
        Error::Cancelled => return PyKeyboardInterrupt::new_err(()),
    };
    made.unwrap_or_else(|e| e)
}

/// A usage error of the bindings themselves.
pub(crate) fn usage(py: Python, what: &str, fix: &str) -> PyErr {
    to_py(py, Error::usage(what, fix))
}

/// `EmbkitError(what, where=path, fix=fix)`.
fn make(
    class: &Bound<'_, PyType>,
    what: String,
    path: Option<&Path>,
    fix: String,
) -> PyResult<PyErr> {
    let py = class.py();
    let mut kwargs = vec![("fix", fix.into_pyobject(py)?.into_any())];
    if let Some(path) = path {
        // As text: `where` is for people, and a PathBuf would become a pathlib.Path.
        kwargs.push(("where", path.display().to_string().into_pyobject(py)?.into_any()));
    }
    let kwargs = kwargs.into_py_dict(py)?;
    Ok(PyErr::from_value(class.call((what,), Some(&kwargs))?))
}

/// The core's messages begin with the fault ("has no tensor 'x'"); the path is said elsewhere.
fn sentence(subject: &str, what: &str) -> String {
    let mut text = format!("{subject}{what}");
    if !text.ends_with(['.', '!', '?']) {
        text.push('.');
    }
    // A capital, but not for the name of an argument ("cu_seqlens has ...").
    let word = text.split([' ', ':']).next().unwrap_or_default();
    if word.chars().all(|c| c.is_ascii_lowercase())
        && let Some(first) = text.get_mut(..1)
    {
        first.make_ascii_uppercase();
    }
    text
}
