//! Tiles of scores: a few queries against a panel of 32 corpus rows, compared with a bar per query.
//!
//! Two families. The int8 forms multiply rounded vectors (queries as signed, the corpus as unsigned
//! bytes, four a group) and scale the whole sums; the f32 forms take the vectors as they are. Both
//! only *screen*: what passes a bar is scored again by [`crate::vectors::dot`], and a bar lies below
//! the score to beat by more than a form can be wrong. So results do not depend on the form.
//!
//! Layouts: a panel holds a group (f32: an element) of all its 32 rows together, then the next. A tile
//! of queries holds them row by row in int8, and element by element in f32.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod dot;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
pub(crate) mod round;
#[cfg(target_arch = "x86_64")]
mod vnni;

/// Rows of a panel.
pub(crate) const NR: usize = 32;
/// Queries of the largest tile.
pub(crate) const MAX_MR: usize = 32;

/// The score that each query of a tile must exceed, in the tile's own units.
pub(crate) type Bars = [f32; MAX_MR];

/// What a tile found: bit `j` of `above[i]` for row `j`; `scores[i]` counts when any bit is set.
pub(crate) struct Hits {
    pub(crate) above: [u32; MAX_MR],
    pub(crate) scores: [[f32; NR]; MAX_MR],
}

/// Queries as a tile takes them; `floats` or `codes` is in use.
#[derive(Default)]
pub(crate) struct Tile {
    pub(crate) floats: Vec<f32>,
    pub(crate) codes: Vec<[i8; 4]>,
    /// What a sum of codes starts from: -128 times the sum of the query's codes, because a corpus
    /// byte is its code plus 128.
    pub(crate) start: [i32; MAX_MR],
}

/// Rows as a tile takes them; `floats`, or `codes` and `scale`, is in use.
pub(crate) struct Panel<'a> {
    pub(crate) floats: &'a [f32],
    pub(crate) codes: &'a [[u8; 4]],
    pub(crate) scale: &'a [f32; NR],
}

/// An instruction set that tiles are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Isa {
    /// AMX int8 tiles.
    Amx,
    /// AVX-512 with the int8 products of VNNI.
    Vnni,
    /// AVX-512F, 32-bit floats.
    Avx512,
    /// AVX2 and FMA, 32-bit floats.
    Avx2,
    /// AArch64 NEON, 32-bit floats.
    Neon,
    /// Plain Rust, 32-bit floats.
    Portable,
    /// Plain Rust, int8: what defines the int8 forms, never the best.
    PortableInt8,
}

impl Isa {
    /// What this machine can run, fastest first.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if amx::available() {
                all.push(Isa::Amx);
            }
            if vnni_detected() {
                all.push(Isa::Vnni);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                all.push(Isa::Avx512);
            }
            if std::arch::is_x86_feature_detected!("avx2")
                && std::arch::is_x86_feature_detected!("fma")
            {
                all.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Isa::Neon); // part of every AArch64 target Rust has a standard library for
        all.extend([Isa::Portable, Isa::PortableInt8]);
        all
    }

    /// The fastest that this machine can run.
    pub fn best() -> Isa {
        Isa::available().first().copied().unwrap_or(Isa::Portable)
    }

    /// As reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Amx => "amx-int8",
            Isa::Vnni => "avx512-vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
            Isa::PortableInt8 => "portable-int8",
        }
    }

    /// Whether vectors are rounded to bytes.
    pub(crate) fn int8(self) -> bool {
        matches!(self, Isa::Amx | Isa::Vnni | Isa::PortableInt8)
    }

    /// Queries per tile.
    pub(crate) fn mr(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => amx::MR,
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni => vnni::MR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::MR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::MR,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::MR,
            _ => portable::MR,
        }
    }

    /// Elements that rows are padded to a multiple of.
    pub(crate) fn step(self) -> usize {
        match self {
            Isa::Amx => 64,
            Isa::Vnni | Isa::PortableInt8 => 4,
            _ => 1,
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vnni_detected() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
        && std::arch::is_x86_feature_detected!("avx512vnni")
}

/// Scores one tile against one panel.
///
/// # Panics
/// When `isa` is not in [`Isa::available`].
pub(crate) fn tile(isa: Isa, queries: &Tile, panel: &Panel, bars: &Bars, hits: &mut Hits) {
    let (q, p) = (&queries.floats[..], panel.floats);
    let (codes, rows) = (&queries.codes[..], panel.codes);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx => {
            assert!(amx::available()); // one load and a branch that is always predicted
            // SAFETY: AMX was just found.
            unsafe { amx::tile(codes, &queries.start, rows, panel.scale, bars, hits) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Vnni => {
            assert!(vnni_detected());
            // SAFETY: AVX-512F and VNNI were just detected.
            unsafe { vnni::tile(codes, &queries.start, rows, panel.scale, bars, hits) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => {
            assert!(std::arch::is_x86_feature_detected!("avx512f"));
            // SAFETY: AVX-512F was just detected.
            unsafe { avx512::tile(q, p, bars, hits) }
        }
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => {
            assert!(std::arch::is_x86_feature_detected!("avx2"));
            assert!(std::arch::is_x86_feature_detected!("fma"));
            // SAFETY: AVX2 and FMA were just detected.
            unsafe { avx2::tile(q, p, bars, hits) }
        }
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is part of the AArch64 baseline.
        Isa::Neon => unsafe { neon::tile(q, p, bars, hits) },
        Isa::Portable => portable::tile(q, p, bars, hits),
        Isa::PortableInt8 => {
            portable::int8_tile(codes, &queries.start, rows, panel.scale, bars, hits)
        }
        #[allow(unreachable_patterns)]
        _ => panic!("{isa:?} does not exist on this architecture"),
    }
}

/// Compares written scores with the bars, for forms without masks.
fn above(bars: &Bars, hits: &mut Hits, mr: usize) {
    for ((bar, above), row) in bars.iter().zip(&mut hits.above).zip(&hits.scores).take(mr) {
        let bits = row.iter().enumerate();
        *above = bits.fold(0, |bits, (j, s)| bits | u32::from(s > bar) << j);
    }
}

#[cfg(test)]
#[allow(clippy::needless_range_loop)] // indices say it better
mod tests {
    use super::*;

    /// Values that differ by place, in `-127..=127`.
    fn code(i: usize) -> i8 {
        ((i * 7919 + 13) % 255) as i8
    }

    fn check(isa: Isa, tile: &Tile, panel: &Panel, want: &[[f32; NR]], slack: f32) {
        // Query 0 keeps all, 1 none, the rest what exceeds their own third score.
        let mut bars: Bars = [f32::INFINITY; MAX_MR];
        for i in 0..isa.mr() {
            bars[i] = if i == 0 { f32::NEG_INFINITY } else { want[i][2] };
        }
        bars[1] = f32::INFINITY;
        let mut hits = Hits { above: [9; MAX_MR], scores: [[7.0; NR]; MAX_MR] };
        super::tile(isa, tile, panel, &bars, &mut hits);
        for i in 0..isa.mr() {
            for j in 0..NR {
                let passes = hits.above[i] >> j & 1 == 1;
                let near = (want[i][j] - bars[i]).abs() <= slack;
                assert!(near || passes == (want[i][j] > bars[i]), "{isa:?} query {i} row {j}");
                if hits.above[i] != 0 {
                    assert!((hits.scores[i][j] - want[i][j]).abs() <= slack, "{isa:?} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn int8_forms_give_the_whole_sums() {
        for isa in Isa::available().into_iter().filter(|isa| isa.int8()) {
            for d in [1usize, 3, 4, 17, 63, 64, 130, 384, 1000] {
                let (mr, depth) = (isa.mr(), d.next_multiple_of(isa.step()));
                let query = |i: usize, k: usize| if k < d { code(i * 31 + k) } else { 0 };
                let row = |j: usize, k: usize| if k < d { code(j * 17 + k + 5) } else { 0 };
                let mut tile = Tile { codes: vec![[0; 4]; mr * depth / 4], ..Tile::default() };
                let mut codes = vec![[0u8; 4]; depth / 4 * NR];
                let scale: [f32; NR] = std::array::from_fn(|j| 0.25 + j as f32);
                let mut want = vec![[0f32; NR]; mr];
                for i in 0..mr {
                    for k in 0..depth {
                        let group = i * depth / 4 + k / 4;
                        tile.codes[group][k % 4] = query(i, k);
                        tile.start[i] -= 128 * i32::from(query(i, k));
                    }
                    for j in 0..NR {
                        let products =
                            (0..d).map(|k| i32::from(query(i, k)) * i32::from(row(j, k)));
                        want[i][j] = products.sum::<i32>() as f32 * scale[j];
                    }
                }
                for j in 0..NR {
                    (0..depth).for_each(|k| codes[k / 4 * NR + j][k % 4] = row(j, k) as u8 ^ 0x80);
                }
                let panel = Panel { floats: &[], codes: &codes, scale: &scale };
                check(isa, &tile, &panel, &want, 0.0);
            }
        }
    }

    #[test]
    fn float_forms_are_close_to_the_plain_sum() {
        for isa in Isa::available().into_iter().filter(|isa| !isa.int8()) {
            for d in [1usize, 2, 3, 17, 129, 384] {
                let (mr, value) = (isa.mr(), |i: usize| f32::from(code(i)) / 64.0);
                let floats: Vec<f32> = (0..d * mr).map(value).collect();
                let rows: Vec<f32> = (0..d * NR).map(|i| value(i + 5)).collect();
                let mut want = vec![[0f32; NR]; mr];
                for i in 0..mr {
                    for j in 0..NR {
                        want[i][j] = (0..d).map(|k| floats[k * mr + i] * rows[k * NR + j]).sum();
                    }
                }
                let tile = Tile { floats, ..Tile::default() };
                let panel = Panel { floats: &rows, codes: &[], scale: &[0.0; NR] };
                check(isa, &tile, &panel, &want, 1e-4 * d as f32);
            }
        }
    }
}
