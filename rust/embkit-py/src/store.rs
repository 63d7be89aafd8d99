//! `Store`: token shards as one table of rows, gathered into the caller's buffers.

use crate::arrays::{array, slice};
use crate::door::short;
use crate::error::usage;
use embkit_core::container::{FileInfo, Verify};
use embkit_store::read;
use embkit_store::read::{Flag, TokenId};
use numpy::{Element, PyArray1, PyArrayMethods, PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// An open token store; may be read from several threads at once.
#[pyclass(frozen)]
pub(crate) struct Store {
    pub(crate) inner: Arc<read::Store>,
}

type Rows<'py> = PyReadonlyArray1<'py, u64>;

#[pymethods]
impl Store {
    #[new]
    #[pyo3(signature = (dir, verify="first-touch", files=None, read_ahead=true))]
    fn new(
        py: Python,
        dir: PathBuf,
        verify: &str,
        files: Option<BTreeMap<String, (u64, u32, u32)>>,
        read_ahead: bool,
    ) -> PyResult<Store> {
        short(py, || {
            let info = |(length, header_crc, crc_crc)| FileInfo { length, header_crc, crc_crc };
            let files: Option<BTreeMap<String, FileInfo>> =
                files.map(|f| f.into_iter().map(|(name, one)| (name, info(one))).collect());
            let verify = Verify::parse(verify)?;
            let mut store = read::Store::open_recorded(&dir, verify, files.as_ref())?;
            store.read_ahead(read_ahead);
            Ok(Store { inner: Arc::new(store) })
        })
    }

    /// Number of rows.
    #[getter]
    fn rows(&self) -> u64 {
        self.inner.rows()
    }

    /// Number of tokens.
    #[getter]
    fn tokens(&self) -> u64 {
        self.inner.tokens()
    }

    /// Number of shards.
    #[getter]
    fn shards(&self) -> usize {
        self.inner.shards()
    }

    /// Tokens of each row, u32.
    fn lengths<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u32>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.lengths(rows))?))
    }

    /// Identity of each row's text, u64.
    fn text_id<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.text_id(rows))?))
    }

    /// Near-duplicate cluster of each row's text, u64.
    fn cluster<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u64>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.cluster(rows))?))
    }

    /// Role of each row, u8: 0 query, 1 passage, 2 both.
    fn role<'py>(&self, py: Python<'py>, rows: Rows<'py>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.role(rows))?))
    }

    /// Source of each row, u16.
    fn source<'py>(&self, py: Python<'py>, rows: Rows<'py>) -> PyResult<Bound<'py, PyArray1<u16>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.source(rows))?))
    }

    /// Tokens of each row's prompt, u16.
    fn prompt_len<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
    ) -> PyResult<Bound<'py, PyArray1<u16>>> {
        let rows = slice(py, &rows, "rows")?;
        Ok(array(py, short(py, || self.inner.prompt_len(rows))?))
    }

    /// Text of a row, without its prompt.
    fn text(&self, py: Python, row: u64) -> PyResult<String> {
        short(py, || self.inner.text(row).map(str::to_owned))
    }

    /// Pack rows into `out_tokens` and their bounds into `out_cu_seqlens`; returns the tokens.
    fn gather<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
        out_tokens: &Bound<'py, PyAny>,
        out_cu_seqlens: PyReadwriteArray1<'py, i32>,
    ) -> PyResult<usize> {
        let rows = slice(py, &rows, "rows")?;
        if let Ok(tokens) = out_tokens.cast::<PyArray1<i64>>() {
            self.pack(py, rows, tokens.try_readwrite()?, out_cu_seqlens)
        } else if let Ok(tokens) = out_tokens.cast::<PyArray1<i32>>() {
            self.pack(py, rows, tokens.try_readwrite()?, out_cu_seqlens)
        } else {
            Err(usage(py, "out_tokens has an unknown type", "Pass a 1-D int64 or int32 array"))
        }
    }

    /// Write rows side by side to the front of `out_ids` and `out_mask`; returns their width.
    fn gather_padded<'py>(
        &self,
        py: Python<'py>,
        rows: Rows<'py>,
        out_ids: &Bound<'py, PyAny>,
        out_mask: &Bound<'py, PyAny>,
        pad_id: i32,
    ) -> PyResult<usize> {
        let rows = slice(py, &rows, "rows")?;
        if let Ok(ids) = out_ids.cast::<PyArray1<i64>>() {
            self.pad(py, rows, ids.try_readwrite()?, out_mask, i64::from(pad_id))
        } else if let Ok(ids) = out_ids.cast::<PyArray1<i32>>() {
            self.pad(py, rows, ids.try_readwrite()?, out_mask, pad_id)
        } else {
            Err(usage(py, "out_ids has an unknown type", "Pass a 1-D int64 or int32 array"))
        }
    }

    fn __repr__(&self) -> String {
        let (dir, rows) = (self.inner.dir().display(), self.inner.rows());
        format!("Store('{dir}', rows={rows}, tokens={})", self.inner.tokens())
    }
}

const CONTIGUOUS: &str = "Pass C-contiguous arrays";

impl Store {
    fn pack<T: TokenId + Element + Send>(
        &self,
        py: Python,
        rows: &[u64],
        mut tokens: PyReadwriteArray1<T>,
        mut cu_seqlens: PyReadwriteArray1<i32>,
    ) -> PyResult<usize> {
        let (Ok(tokens), Ok(bounds)) = (tokens.as_slice_mut(), cu_seqlens.as_slice_mut()) else {
            return Err(usage(py, "an output array is not contiguous", CONTIGUOUS));
        };
        short(py, || self.inner.gather(rows, tokens, bounds))
    }

    fn pad<T: TokenId + Element>(
        &self,
        py: Python,
        rows: &[u64],
        mut ids: PyReadwriteArray1<T>,
        mask: &Bound<'_, PyAny>,
        pad: T,
    ) -> PyResult<usize> {
        let Ok(ids) = ids.as_slice_mut() else {
            return Err(usage(py, "out_ids is not contiguous", CONTIGUOUS));
        };
        let store = self.inner.as_ref();
        if let Ok(mask) = mask.cast::<PyArray1<i64>>() {
            fill(py, store, rows, ids, mask.try_readwrite()?, pad)
        } else if let Ok(mask) = mask.cast::<PyArray1<i32>>() {
            fill(py, store, rows, ids, mask.try_readwrite()?, pad)
        } else if let Ok(mask) = mask.cast::<PyArray1<u8>>() {
            fill(py, store, rows, ids, mask.try_readwrite()?, pad)
        } else if let Ok(mask) = mask.cast::<PyArray1<bool>>() {
            fill(py, store, rows, ids, mask.try_readwrite()?, pad)
        } else {
            let fix = "Pass a 1-D int64, int32, uint8 or bool array";
            Err(usage(py, "out_mask has an unknown type", fix))
        }
    }
}

fn fill<T: TokenId, M: Element + Flag>(
    py: Python,
    store: &read::Store,
    rows: &[u64],
    ids: &mut [T],
    mut mask: PyReadwriteArray1<M>,
    pad: T,
) -> PyResult<usize> {
    let Ok(mask) = mask.as_slice_mut() else {
        return Err(usage(py, "out_mask is not contiguous", CONTIGUOUS));
    };
    short(py, move || store.gather_padded(rows, ids, mask, pad))
}
