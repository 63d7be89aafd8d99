//! Texts as they lie in `raw-*.safetensors`: bytes and offsets, in shards, rows counted across.

use crate::{Error, Job, Result, par, text_id};

/// One shard of texts: text `i` is `bytes[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Copy, Debug)]
pub struct TextShard<'a> {
    /// UTF-8 bytes of all texts, one after the other.
    pub bytes: &'a [u8],
    /// `n + 1` ascending byte positions.
    pub offsets: &'a [u64],
}

impl<'a> TextShard<'a> {
    /// Number of texts (0 for a shard without offsets).
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether the shard holds no text.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of local row `i`, or `None` when the row or its offsets lie outside.
    pub fn get(&self, i: usize) -> Option<&'a [u8]> {
        let start = usize::try_from(*self.offsets.get(i)?).ok()?;
        let end = usize::try_from(*self.offsets.get(i.checked_add(1)?)?).ok()?;
        self.bytes.get(start..end)
    }

    /// Checks that offsets start at 0, ascend, and end at the number of bytes.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| {
            Err(Error::usage(
                what,
                "Pass offsets [0, ..., number of bytes], ascending, one per text plus one",
            ))
        };
        let (Some(first), Some(last)) = (self.offsets.first(), self.offsets.last()) else {
            return bad("a text shard has no offsets".into());
        };
        if *first != 0 || usize::try_from(*last).ok() != Some(self.bytes.len()) {
            let n = self.bytes.len();
            return bad(format!("text offsets run from {first} to {last} over {n} bytes"));
        }
        let pairs = self.offsets.iter().zip(self.offsets.iter().skip(1));
        if let Some(i) = pairs.into_iter().position(|(a, b)| a > b) {
            return bad(format!("text offsets descend at row {i}"));
        }
        Ok(())
    }
}

/// Several shards read as one list of texts; rows are global, in shard order.
#[derive(Clone, Debug)]
pub struct Texts<'a> {
    shards: Vec<TextShard<'a>>,
    starts: Vec<usize>, // first global row of each shard, then the total
}

impl<'a> Texts<'a> {
    /// Checks every shard ([`TextShard::check`]) and counts the rows.
    pub fn new(shards: &[TextShard<'a>]) -> Result<Texts<'a>> {
        let mut starts = Vec::with_capacity(shards.len() + 1);
        let mut total = 0usize;
        for shard in shards {
            shard.check()?;
            starts.push(total);
            total += shard.len();
        }
        starts.push(total);
        Ok(Texts { shards: shards.to_vec(), starts })
    }

    /// Number of texts in all shards.
    pub fn len(&self) -> usize {
        self.starts.last().copied().unwrap_or(0)
    }

    /// Whether there is no text at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shard and local row of a global row.
    pub fn locate(&self, row: usize) -> Option<(usize, usize)> {
        if row >= self.len() {
            return None;
        }
        // The last start that is not after `row`; empty shards share a start and are skipped.
        let shard = self.starts.partition_point(|&s| s <= row) - 1;
        Some((shard, row - self.starts.get(shard)?))
    }

    /// Bytes of a global row, or `None` when there is no such row.
    pub fn try_get(&self, row: usize) -> Option<&'a [u8]> {
        let (shard, local) = self.locate(row)?;
        self.shards.get(shard)?.get(local)
    }

    /// Bytes of a global row.
    ///
    /// # Panics
    /// When `row >= self.len()`, as indexing a slice does: check rows that come from a file first.
    pub fn get(&self, row: usize) -> &'a [u8] {
        match self.try_get(row) {
            Some(bytes) => bytes,
            None => panic!("text row {row} of {}", self.len()),
        }
    }

    /// Text of a global row; [`Error::Usage`] when the row does not exist or is not UTF-8.
    pub fn str(&self, row: usize) -> Result<&'a str> {
        let bytes = self.try_get(row).ok_or_else(|| {
            Error::usage(format!("text row {row} of {}", self.len()), "Pass rows below the count")
        })?;
        std::str::from_utf8(bytes).map_err(|e| {
            Error::usage(format!("text row {row} is not UTF-8 ({e})"), "Pass validated records")
        })
    }

    /// [`text_id`] of every row, on `threads` threads (0: all).
    pub fn ids(&self, threads: usize, job: &Job) -> Result<Vec<u64>> {
        let parts = par::try_map_blocks(self.len(), 4096, threads, |rows| {
            job.check()?;
            job.advance(rows.len() as u64);
            Ok(rows.map(|row| text_id(self.get(row))).collect::<Vec<u64>>())
        })?;
        Ok(parts.concat())
    }

    /// Bytes of all rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a [u8]> + '_ {
        self.shards.iter().flat_map(|s| (0..s.len()).filter_map(|i| s.get(i)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_global_across_shards_and_empty_shards() {
        let a = TextShard { bytes: b"onetwo", offsets: &[0, 3, 6] };
        let none = TextShard { bytes: b"", offsets: &[0] };
        let b = TextShard { bytes: b"\xffx", offsets: &[0, 0, 1, 2] };
        let texts = Texts::new(&[none, a, none, none, b, none]).unwrap();
        let naive: Vec<&[u8]> = vec![b"one", b"two", b"", b"\xff", b"x"];
        assert_eq!(texts.len(), 5);
        assert_eq!(texts.iter().collect::<Vec<_>>(), naive);
        for (row, want) in naive.iter().enumerate() {
            assert_eq!(texts.get(row), *want);
        }
        assert_eq!(texts.locate(2), Some((4, 0)));
        assert_eq!(texts.try_get(5), None);
        assert_eq!(texts.str(0).unwrap(), "one");
        assert!(matches!(texts.str(3), Err(Error::Usage { .. })));
        assert!(matches!(texts.str(5), Err(Error::Usage { .. })));
        assert!(Texts::new(&[]).unwrap().is_empty());
    }

    #[test]
    fn bad_offsets_are_refused_and_never_read() {
        for offsets in [&[][..], &[1, 3], &[0, 2], &[0, 4], &[0, 2, 1, 3], &[0, u64::MAX]] {
            let shard = TextShard { bytes: b"abc", offsets };
            assert!(shard.check().is_err(), "{offsets:?}");
            assert!(Texts::new(&[shard]).is_err());
            for i in 0..4 {
                shard.get(i); // never panics
            }
        }
    }

    #[test]
    #[should_panic(expected = "text row 1 of 1")]
    fn a_row_outside_panics_like_a_slice() {
        Texts::new(&[TextShard { bytes: b"a", offsets: &[0, 1] }]).unwrap().get(1);
    }
}
