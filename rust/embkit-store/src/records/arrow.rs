//! Arrow batches as rows: each cell becomes a [`Value`], nothing is copied before it is needed.
//!
//! Oddity: batches come from another library through the C interface, which promises neither
//! UTF-8 nor sound inner offsets. So texts are taken as bytes, checked when they are decoded, and
//! every position is checked against its buffer.

use arrow_array::cast::AsArray;
use arrow_array::types::*;
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, RecordBatch};
use arrow_buffer::{ArrowNativeType, Buffer, NullBuffer, ScalarBuffer};
use arrow_schema::DataType;

use super::value::Value;

/// One batch of rows.
pub(crate) struct Batch {
    pub(crate) rows: usize,
    pub(crate) names: Vec<String>,
    pub(crate) columns: Vec<Column>,
}

/// An array that can be read cell by cell.
#[derive(Debug)]
pub(crate) struct Column {
    nulls: Option<NullBuffer>,
    data: Data,
}

#[derive(Debug)]
enum Data {
    /// Texts or bytes: where each begins and the last ends.
    Bytes(Vec<usize>, Buffer),
    /// Texts as views: length, then the text itself, or its buffer and place.
    Views(ScalarBuffer<u128>, Vec<Buffer>),
    Whole(Vec<i128>),
    Float(Vec<f64>),
    /// Index of each cell in the dictionary.
    Dictionary(Vec<Option<usize>>, Box<Column>),
    List(Vec<usize>, Box<Column>),
    Null,
    Other,
}

/// The cells of a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cells<'a> {
    column: &'a Column,
    start: usize,
    end: usize,
}

impl<'a> Cells<'a> {
    /// The cells, `None` for nulls.
    pub(crate) fn iter(self) -> impl Iterator<Item = Option<Value<'a>>> {
        (self.start..self.end).map(move |i| self.column.value(i))
    }
}

impl Batch {
    pub(crate) fn new(batch: &RecordBatch) -> Self {
        Self {
            rows: batch.num_rows(),
            names: batch.schema().fields().iter().map(|f| f.name().clone()).collect(),
            columns: batch.columns().iter().map(Column::new).collect(),
        }
    }

    /// The beginning of a row as JSON, for a report: what is there, in the columns' order.
    pub(crate) fn excerpt(&self, row: usize, chars: usize) -> String {
        let mut out = String::from("{");
        for (name, column) in self.names.iter().zip(&self.columns) {
            if let Some(value) = column.value(row) {
                let comma = if out.len() > 1 { ", " } else { "" };
                out += &format!("{comma}{}: {}", quoted(name.as_bytes()), shown(value, chars));
            }
            if out.chars().count() > chars {
                return out;
            }
        }
        out + "}"
    }
}

fn shown(value: Value, chars: usize) -> String {
    match value {
        Value::Text(bytes) => quoted(bytes.get(..4 * chars).unwrap_or(bytes)),
        Value::Whole(n) => n.to_string(),
        Value::Float(x) => format!("{x:?}"),
        Value::List(cells) => {
            let some = cells.iter().take(chars);
            let some: Vec<String> =
                some.map(|v| v.map_or("null".into(), |v| shown(v, chars))).collect();
            format!("[{}]", some.join(", "))
        }
        Value::Json(_) | Value::Other => "...".into(),
    }
}

fn quoted(text: &[u8]) -> String {
    serde_json::Value::from(String::from_utf8_lossy(text)).to_string()
}

impl Column {
    fn new(array: &ArrayRef) -> Self {
        let data = match array.data_type() {
            DataType::Utf8 => {
                bytes(array.as_string::<i32>().offsets(), array.as_string::<i32>().values())
            }
            DataType::LargeUtf8 => {
                bytes(array.as_string::<i64>().offsets(), array.as_string::<i64>().values())
            }
            // Texts that lack the mark of being texts, as older Parquet writers leave them.
            DataType::Binary => {
                bytes(array.as_binary::<i32>().offsets(), array.as_binary::<i32>().values())
            }
            DataType::LargeBinary => {
                bytes(array.as_binary::<i64>().offsets(), array.as_binary::<i64>().values())
            }
            DataType::Utf8View => {
                let array = array.as_string_view();
                Data::Views(array.views().clone(), array.data_buffers().to_vec())
            }
            DataType::Int8 => whole::<Int8Type>(array),
            DataType::Int16 => whole::<Int16Type>(array),
            DataType::Int32 => whole::<Int32Type>(array),
            DataType::Int64 => whole::<Int64Type>(array),
            DataType::UInt8 => whole::<UInt8Type>(array),
            DataType::UInt16 => whole::<UInt16Type>(array),
            DataType::UInt32 => whole::<UInt32Type>(array),
            DataType::UInt64 => whole::<UInt64Type>(array),
            DataType::Float16 => {
                float(array.as_primitive::<Float16Type>().values().iter().map(|x| x.to_f64()))
            }
            DataType::Float32 => {
                float(array.as_primitive::<Float32Type>().values().iter().map(|x| f64::from(*x)))
            }
            DataType::Float64 => {
                float(array.as_primitive::<Float64Type>().values().iter().copied())
            }
            DataType::Dictionary(_, _) => {
                let array = array.as_any_dictionary();
                let keys = Column::new(&arrow_array::make_array(array.keys().to_data()));
                let keys = (0..array.len()).map(|i| match keys.value(i) {
                    Some(Value::Whole(n)) => usize::try_from(n).ok(),
                    _ => None,
                });
                Data::Dictionary(keys.collect(), Box::new(Column::new(array.values())))
            }
            DataType::List(_) => {
                let array = array.as_list::<i32>();
                list(ends(array.offsets()), array.values())
            }
            DataType::LargeList(_) => {
                let array = array.as_list::<i64>();
                list(ends(array.offsets()), array.values())
            }
            DataType::FixedSizeList(_, size) => {
                let (array, size) = (array.as_fixed_size_list(), *size as usize);
                list((0..=array.len()).map(|i| i * size).collect(), array.values())
            }
            DataType::Null => Data::Null,
            _ => Data::Other,
        };
        Self { nulls: array.nulls().cloned(), data }
    }

    /// The cell of a row, or `None` when it is null.
    pub(crate) fn value(&self, row: usize) -> Option<Value<'_>> {
        if self.nulls.as_ref().is_some_and(|n| row >= n.len() || n.is_null(row)) {
            return None;
        }
        match &self.data {
            Data::Bytes(ends, bytes) => {
                let (start, end) = (*ends.get(row)?, *ends.get(row + 1)?);
                Some(bytes.as_slice().get(start..end).map_or(Value::Other, Value::Text))
            }
            Data::Views(views, buffers) => {
                Some(view(views.get(row)?, buffers).map_or(Value::Other, Value::Text))
            }
            Data::Whole(values) => values.get(row).copied().map(Value::Whole),
            Data::Float(values) => values.get(row).copied().map(Value::Float),
            Data::Dictionary(keys, values) => values.value((*keys.get(row)?)?),
            Data::List(ends, column) => {
                let (start, end) = (*ends.get(row)?, *ends.get(row + 1)?);
                Some(Value::List(Cells { column, start, end }))
            }
            Data::Null => None,
            Data::Other => Some(Value::Other),
        }
    }
}

fn bytes<O: ArrowNativeType>(offsets: &[O], values: &Buffer) -> Data {
    Data::Bytes(ends(offsets), values.clone())
}

fn ends<O: ArrowNativeType>(offsets: &[O]) -> Vec<usize> {
    offsets.iter().map(|o| o.as_usize()).collect()
}

/// Lists over the part of `values` that they use: a slice of a table brings the values of all.
fn list(ends: Vec<usize>, values: &ArrayRef) -> Data {
    let (Some(first), Some(last)) = (ends.first().copied(), ends.last().copied()) else {
        return Data::Null;
    };
    if first > last || last > values.len() {
        return Data::Other;
    }
    let used = Column::new(&values.slice(first, last - first));
    Data::List(ends.iter().map(|end| end.saturating_sub(first)).collect(), Box::new(used))
}

fn whole<T: ArrowPrimitiveType>(array: &ArrayRef) -> Data
where
    T::Native: Into<i128>,
{
    Data::Whole(array.as_primitive::<T>().values().iter().map(|n| (*n).into()).collect())
}

fn float(values: impl Iterator<Item = f64>) -> Data {
    Data::Float(values.collect())
}

/// The bytes that a view stands for: up to 12 in itself, others in a buffer.
fn view<'a>(view: &'a u128, buffers: &'a [Buffer]) -> Option<&'a [u8]> {
    let part = |at: u32| (*view >> at) as u32 as usize;
    let len = part(0);
    if len <= 12 {
        return bytemuck::bytes_of(view).get(4..4 + len);
    }
    let (buffer, start) = (buffers.get(part(64))?, part(96));
    buffer.as_slice().get(start..start.checked_add(len)?)
}
