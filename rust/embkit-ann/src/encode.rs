//! Vectors in the form that tiles take, and how far a tile's score can be from the true one.
//!
//! int8: a vector `x` becomes `scale * code` with `scale = max |x| / 127`, and the length of what is
//! lost, `|x - scale * code|`, is kept. For a query `q` and a row `p` Cauchy-Schwarz gives
//! `|q.p - q'.p'| <= |q - q'| |p| + |q'| |p - p'|`: a bound that holds for these two vectors, not a
//! guess. A search uses the largest `|p|` and `|p - p'|` of the corpus, so one number per query.

use crate::simd::{self, Isa, MAX_MR, NR, Panel, Tile};
use crate::vectors::Vectors;
use embkit_core::{Job, Result, par};
use std::ops::Range;

/// Panels of a block: the unit of encoding and of looking for a cancelled job.
const BLOCK_PANELS: usize = 64;
/// Largest width whose sums of int8 products surely fit 32 bits.
const MAX_INT8: usize = 1 << 16;

/// The form for vectors of this width on `isa`.
pub(crate) fn fitting(isa: Isa, d: usize) -> Isa {
    if !isa.int8() || d <= MAX_INT8 {
        return isa;
    }
    let floats = Isa::available().into_iter().find(|isa| !isa.int8());
    floats.unwrap_or(Isa::Portable)
}

/// Rows of a corpus, some or all, in panels.
pub(crate) struct Rows {
    isa: Isa,
    depth: usize,
    n: usize,
    blocks: Vec<Block>,
    /// Which rows of each panel exist, when not all do.
    masks: Option<Vec<u32>>,
    /// Largest length of a row, and of what rounding takes from one.
    pub(crate) reach: f32,
    pub(crate) lost: f32,
}

#[derive(Default)]
struct Block {
    floats: Vec<f32>,
    codes: Vec<[u8; 4]>,
    scale: Vec<[f32; NR]>,
    reach: f32,
    lost: f32,
}

impl Rows {
    /// Encodes the rows `which` of `vectors`; `row_of` turns a position into a row.
    pub(crate) fn new(
        isa: Isa,
        vectors: &Vectors,
        n: usize,
        row_of: impl Fn(usize) -> usize + Sync,
        threads: usize,
        job: &Job,
    ) -> Result<Self> {
        let depth = vectors.width().next_multiple_of(isa.step());
        let blocks = par::try_map_blocks(n, BLOCK_PANELS * NR, threads, |range| {
            job.check()?;
            Ok(Block::new(isa, vectors, depth, range, &row_of))
        })?;
        let reach = blocks.iter().fold(0f32, |most, b| most.max(b.reach));
        let lost = blocks.iter().fold(0f32, |most, b| most.max(b.lost));
        Ok(Self { isa, depth, n, blocks, masks: None, reach, lost })
    }

    /// The same with holes: bit `j` of `masks[i]` says that row `j` of panel `i` exists.
    pub(crate) fn with_masks(self, masks: Vec<u32>) -> Self {
        Self { masks: Some(masks), ..self }
    }

    /// Bytes that one row takes.
    pub(crate) fn bytes_per_row(isa: Isa, d: usize) -> usize {
        if isa.int8() { d.next_multiple_of(isa.step()) + 4 } else { 4 * d }
    }

    pub(crate) fn len(&self) -> usize {
        self.n
    }

    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(NR)
    }

    /// Panel `i`: rows `32 i` to `32 i + 31` of this encoding.
    pub(crate) fn panel(&self, i: usize) -> Panel<'_> {
        const NONE: &[f32; NR] = &[0.0; NR];
        let (block, at) = (&self.blocks[i / BLOCK_PANELS], i % BLOCK_PANELS);
        if self.isa.int8() {
            let groups = self.depth / 4 * NR;
            let codes = &block.codes[at * groups..][..groups];
            Panel { floats: &[], codes, scale: &block.scale[at] }
        } else {
            let size = self.depth * NR;
            Panel { floats: &block.floats[at * size..][..size], codes: &[], scale: NONE }
        }
    }

    /// Bit `j` for every row `j` that panel `i` really has.
    pub(crate) fn real(&self, i: usize) -> u32 {
        match &self.masks {
            Some(masks) => masks[i],
            None => u32::MAX >> (NR - NR.min(self.n - i * NR)),
        }
    }
}

impl Block {
    fn new(
        isa: Isa,
        vectors: &Vectors,
        depth: usize,
        rows: Range<usize>,
        row_of: &impl Fn(usize) -> usize,
    ) -> Self {
        let panels = rows.len().div_ceil(NR);
        let mut block = Self::default();
        if isa.int8() {
            block.codes = vec![[128; 4]; panels * depth / 4 * NR];
            block.scale = vec![[0.0; NR]; panels];
        } else {
            block.floats = vec![0.0; panels * depth * NR];
        }
        let mut scratch = Vec::new();
        let mut codes = vec![0i8; depth];
        for (i, position) in rows.enumerate() {
            let row = vectors.row(row_of(position), &mut scratch);
            let (panel, lane) = (i / NR, i % NR);
            if isa.int8() {
                let rounded = round(row, &mut codes);
                block.scale[panel][lane] = rounded.scale;
                block.reach = block.reach.max(rounded.length);
                block.lost = block.lost.max(rounded.lost);
                let groups = &mut block.codes[panel * depth / 4 * NR..][..depth / 4 * NR];
                for (group, code) in codes.as_chunks::<4>().0.iter().enumerate() {
                    groups[group * NR + lane] = code.map(|c| (c as u8) ^ 0x80);
                }
            } else {
                let floats = &mut block.floats[panel * depth * NR..][..depth * NR];
                row.iter().enumerate().for_each(|(k, v)| floats[k * NR + lane] = *v);
                block.reach = block.reach.max(length(row));
            }
        }
        block
    }
}

/// Queries in rows, to be put together into tiles in any order.
pub(crate) struct Queries {
    isa: Isa,
    depth: usize,
    floats: Vec<f32>,
    codes: Vec<i8>,
    start: Vec<i32>,
    about: Vec<Rounded>,
}

impl Queries {
    /// Encodes `n` rows of `vectors`; `row_of` turns a number into a row.
    pub(crate) fn new(
        isa: Isa,
        vectors: &Vectors,
        n: usize,
        row_of: impl Fn(usize) -> usize,
    ) -> Self {
        let depth = vectors.width().next_multiple_of(isa.step());
        let mut all = Self {
            isa,
            depth,
            floats: Vec::new(),
            codes: vec![0; if isa.int8() { n * depth } else { 0 }],
            start: Vec::with_capacity(n),
            about: Vec::with_capacity(n),
        };
        let mut scratch = Vec::new();
        for i in 0..n {
            let row = vectors.row(row_of(i), &mut scratch);
            if isa.int8() {
                let codes = &mut all.codes[i * depth..][..depth];
                all.about.push(round(row, codes));
                all.start.push(-128 * codes.iter().map(|c| i32::from(*c)).sum::<i32>());
            } else {
                all.floats.extend_from_slice(row);
                let length = length(row);
                all.about.push(Rounded { scale: 1.0, length, kept: length, lost: 0.0 });
            }
        }
        all
    }

    pub(crate) fn len(&self) -> usize {
        self.about.len()
    }

    /// Queries of a tile.
    pub(crate) fn tile(&self) -> usize {
        self.isa.mr()
    }

    /// What a tile's score of query `i` is multiplied by to be an inner product.
    pub(crate) fn scale(&self, i: usize) -> f32 {
        self.about[i].scale
    }

    /// How far a score of query `i` against any of `rows` can be from the true inner product, and
    /// that from the computed one; a little more, for the rounding of this sum itself.
    pub(crate) fn error(&self, i: usize, rows: &Rows) -> f32 {
        let q = &self.about[i];
        let rounding = q.lost * rows.reach + q.kept * rows.lost;
        // Sums of d float products, the tile's and `dot`'s, each off by less than d + 2 units.
        let units = 2.0 * (self.depth as f32 + 4.0) * f32::EPSILON;
        let sums = units * q.length.max(q.kept) * (rows.reach + rows.lost);
        (rounding + sums) * 1.001 + f32::MIN_POSITIVE
    }

    /// Puts up to `mr` queries into a tile; what is missing scores like a zero vector.
    pub(crate) fn pack(&self, which: &[u32], tile: &mut Tile) {
        let (mr, depth) = (self.isa.mr(), self.depth);
        tile.start = [0; MAX_MR];
        if !self.isa.int8() {
            tile.floats.clear();
            tile.floats.resize(mr * depth, 0.0);
            for (i, q) in which.iter().enumerate() {
                let row = &self.floats[*q as usize * depth..][..depth];
                row.iter().enumerate().for_each(|(k, v)| tile.floats[k * mr + i] = *v);
            }
            return;
        }
        tile.codes.resize(mr * depth / 4, [0; 4]);
        if which.len() < mr {
            tile.codes.fill([0; 4]);
        }
        for (i, q) in which.iter().enumerate() {
            tile.start[i] = self.start[*q as usize];
            let row = self.codes[*q as usize * depth..][..depth].as_chunks::<4>().0;
            tile.codes[i * depth / 4..][..depth / 4].copy_from_slice(row);
        }
    }
}

/// A vector and its rounded form.
#[derive(Clone, Copy, Debug, Default)]
struct Rounded {
    scale: f32,
    /// Of the vector, of the rounded vector, and of their difference; never too small.
    length: f32,
    kept: f32,
    lost: f32,
}

/// Rounds `x` to `scale * codes`; `codes` may be longer, the rest becomes 0.
fn round(x: &[f32], codes: &mut [i8]) -> Rounded {
    codes.fill(0);
    let most = simd::round::largest(x);
    if most < TINY {
        let length = bound(most, x.len());
        return Rounded { scale: 1.0, length, kept: 0.0, lost: length };
    }
    let scale = most / 127.0;
    let squares = simd::round::round(x, scale, &mut codes[..x.len()]);
    let [length, kept, lost] = squares.sums.map(|s| up(s.iter().sum::<f32>()));
    Rounded { scale, length, kept, lost }
}

/// Below this largest element squares could vanish, and bounds with them.
const TINY: f32 = 1e-12;

fn length(x: &[f32]) -> f32 {
    let most = simd::round::largest(x);
    if most < TINY { bound(most, x.len()) } else { up(crate::vectors::dot(x, x)) }
}

/// No vector of `d` elements of at most `most` is longer.
fn bound(most: f32, d: usize) -> f32 {
    most * (d as f32).sqrt() * 1.0001
}

/// The root of a sum of squares, raised by more than rounding can have lowered it.
fn up(squares: f32) -> f32 {
    squares.sqrt() * 1.0001
}
