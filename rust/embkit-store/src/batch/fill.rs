//! A batch in one buffer of the caller: every array at an aligned place, so that one copy moves the
//! whole step to a device.

use std::collections::BTreeMap;
use std::time::Instant;

use embkit_core::{Error, Result};

use super::Batch;
use crate::read::{AHEAD, Store, TokenId};

/// Arrays begin at multiples of this many bytes.
const ALIGN: usize = 64;

/// Element type of an array in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldType {
    /// bool, one byte.
    Bool,
    /// u8.
    U8,
    /// i32.
    I32,
    /// i64.
    I64,
    /// f32.
    F32,
}

impl FieldType {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::U8 => 1,
            Self::I32 | Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

/// Which token arrays are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// `tokens` and `mask` in rectangles; otherwise `tokens`, `position_ids` and `cu_seqlens`.
    pub padded: bool,
    /// int64 tokens, masks and positions; otherwise int32.
    pub wide: bool,
    /// Fills up padded rows.
    pub pad_id: i32,
}

/// An array in the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its elements.
    pub dtype: FieldType,
    /// Number of elements.
    pub len: usize,
    /// First byte.
    pub offset: usize,
}

impl Batch {
    /// The arrays of a form, and the bytes of a buffer that holds them.
    ///
    /// `tokens` [P], padded: `mask` [P], packed: `position_ids` [T] and `cu_seqlens` [R + M] (each
    /// micro-batch its own, from 0); then `role` [R], `prompt_len` [R], `query`, `positive`,
    /// `position` [b], `hard` [b, H], their keys, `hard_mask`, `score`, `weight`.
    pub fn layout(&self, form: Form) -> (Vec<Field>, usize) {
        use FieldType::{Bool, F32, I32, I64, U8};
        let ids = if form.wide { I64 } else { I32 };
        let tokens: usize = self.micro.iter().map(|m| m.tokens).sum();
        let (r, b, bh) = (self.rows.len(), self.query.len(), self.hard.len());
        let token_fields = match form.padded {
            true => vec![("tokens", ids, tokens), ("mask", ids, tokens)],
            false => vec![
                ("tokens", ids, tokens),
                ("position_ids", ids, tokens),
                ("cu_seqlens", I32, r + self.micro.len()),
            ],
        };
        let others = [
            ("role", U8, r),
            ("prompt_len", I64, r),
            ("query", I64, b),
            ("positive", I64, b),
            ("hard", I64, bh),
            ("position", I64, b),
            ("query_key", I32, b),
            ("positive_key", I32, b),
            ("hard_key", I32, bh),
            ("hard_mask", Bool, bh),
            ("score", F32, b),
            ("weight", F32, b),
        ];
        let mut offset: usize = 0;
        let mut fields = Vec::new();
        for (name, dtype, len) in token_fields.into_iter().chain(others) {
            fields.push(Field { name, dtype, len, offset });
            offset = (offset + len * dtype.size()).next_multiple_of(ALIGN);
        }
        (fields, offset)
    }

    /// Fills a buffer with the arrays of [`Batch::layout`]; bytes between them stay as they are.
    ///
    /// Errors: `Usage` when the buffer is too small or not aligned to 8 bytes, `Corrupt`.
    pub fn fill(&self, store: &Store, form: Form, buffer: &mut [u8]) -> Result<()> {
        let (fields, size) = self.layout(form);
        if buffer.len() < size || !buffer.as_ptr().addr().is_multiple_of(8) {
            return Err(Error::usage(
                format!("a buffer of {} bytes for a batch of {size}", buffer.len()),
                "Pass at least that many bytes, aligned to 8",
            ));
        }
        let mut parts: BTreeMap<&str, &mut [u8]> = BTreeMap::new();
        let (mut rest, mut at) = (buffer, 0);
        for field in &fields {
            let (_, after) = rest.split_at_mut(field.offset - at);
            let (own, after) = after.split_at_mut(field.len * field.dtype.size());
            parts.insert(field.name, own);
            at = field.offset + field.len * field.dtype.size();
            rest = after;
        }
        let mut take = |name| parts.remove(name).unwrap_or_default();
        store.announce(&self.spans);
        let started = Instant::now();
        match form.wide {
            true => self.fill_tokens::<i64>(store, form, &mut take)?,
            false => self.fill_tokens::<i32>(store, form, &mut take)?,
        }
        store.note(self.tokens, started.elapsed());
        for (role, row) in take("role").iter_mut().zip(&self.rows) {
            *role = store.role_of(*row)?;
        }
        for (len, row) in cast::<i64>(take("prompt_len")).iter_mut().zip(&self.rows) {
            *len = i64::from(store.prompt_len_of(*row)?);
        }
        put(take("query"), &self.query);
        put(take("positive"), &self.positive);
        put(take("hard"), &self.hard);
        put(take("position"), &self.position);
        put(take("query_key"), &self.query_key);
        put(take("positive_key"), &self.positive_key);
        put(take("hard_key"), &self.hard_key);
        let mask = take("hard_mask").iter_mut().zip(&self.hard_mask);
        mask.for_each(|(to, from)| *to = u8::from(*from));
        put(take("score"), &self.score);
        put(take("weight"), &self.weight);
        Ok(())
    }

    fn fill_tokens<'a, T: TokenId + From<bool> + bytemuck::Pod>(
        &self,
        store: &Store,
        form: Form,
        take: &mut impl FnMut(&'static str) -> &'a mut [u8],
    ) -> Result<()> {
        let mut tokens = cast::<T>(take("tokens"));
        if form.padded {
            let mut mask = cast::<T>(take("mask"));
            let pad = T::of(form.pad_id as u32);
            for micro in &self.micro {
                for at in micro.start..micro.start + micro.rows {
                    let Some(span) = self.spans.get(at) else { break };
                    store.prefetch_tokens(self.spans.get(at + AHEAD));
                    let (ids, later) = tokens.split_at_mut(micro.longest);
                    tokens = later;
                    let (flags, later) = mask.split_at_mut(micro.longest);
                    mask = later;
                    store.copy_padded(*span, ids, flags, pad)?;
                }
            }
            return Ok(());
        }
        let mut positions = cast::<T>(take("position_ids"));
        let mut ends = cast::<i32>(take("cu_seqlens")).iter_mut();
        let mut end = |value: usize| {
            if let Some(end) = ends.next() {
                *end = value as i32; // a micro-batch has fewer than 2^31 tokens: rows below 2^32
            }
        };
        for micro in &self.micro {
            end(0);
            let mut at = 0;
            for row in micro.start..micro.start + micro.rows {
                let Some(span) = self.spans.get(row) else { break };
                store.prefetch_tokens(self.spans.get(row + AHEAD));
                let (row, later) = tokens.split_at_mut(span.len());
                store.copy(*span, row)?;
                tokens = later;
                let (row, later) = positions.split_at_mut(span.len());
                row.iter_mut().zip(0..).for_each(|(p, i)| *p = T::of(i));
                positions = later;
                at += span.len();
                end(at);
            }
        }
        Ok(())
    }
}

/// Bytes as elements; the layout aligns them.
fn cast<T: bytemuck::Pod>(bytes: &mut [u8]) -> &mut [T] {
    bytemuck::try_cast_slice_mut(bytes).unwrap_or_default()
}

fn put<T: bytemuck::Pod>(to: &mut [u8], from: &[T]) {
    let from: &[u8] = bytemuck::cast_slice(from);
    to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
}
