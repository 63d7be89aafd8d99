//! Row-major vectors as they lie in memory or in mapped files, in one piece or several.

use crate::simd;
use embkit_core::{Error, Job, Result, par};

/// A run of rows of one element type.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half floats, as their bits.
    F16(&'a [u16]),
}

impl Part<'_> {
    fn len(&self) -> usize {
        match self {
            Part::F32(values) => values.len(),
            Part::F16(bits) => bits.len(),
        }
    }
}

/// `[n, d]` vectors in parts that follow one another.
#[derive(Clone, Debug)]
pub struct Vectors<'a> {
    parts: Vec<(usize, Part<'a>)>, // with the number of the first row
    d: usize,
    n: usize,
}

impl<'a> Vectors<'a> {
    /// Vectors of width `d`.
    ///
    /// Errors: [`Error::Usage`] for a width of 0, parts that are no whole rows, or 2^32 rows.
    pub fn new(parts: &[Part<'a>], d: usize) -> Result<Self> {
        let mut kept = Vec::with_capacity(parts.len());
        let mut n = 0;
        for part in parts {
            if d == 0 || !part.len().is_multiple_of(d) {
                return Err(Error::usage(
                    format!("{} values in rows of width {d}", part.len()),
                    "Pass row-major [n, d] vectors of the same d, at least 1",
                ));
            }
            if part.len() > 0 {
                kept.push((n, *part));
                n += part.len() / d;
            }
        }
        if n > u32::MAX as usize {
            return Err(Error::usage(
                format!("{n} rows"),
                "Search parts of fewer than 2^32 rows and merge their results",
            ));
        }
        Ok(Self { parts: kept, d, n })
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.n
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// Values of a row.
    pub fn width(&self) -> usize {
        self.d
    }

    /// A row as 32-bit floats, in place where it is one, else converted into `scratch`.
    pub(crate) fn row<'b>(&'b self, row: usize, scratch: &'b mut Vec<f32>) -> &'b [f32] {
        let (first, part) = &self.parts[self.part(row)];
        let range = (row - first) * self.d..(row - first + 1) * self.d;
        match part {
            Part::F32(values) => &values[range],
            Part::F16(bits) => {
                scratch.clear();
                scratch.extend(bits[range].iter().map(|b| half(*b)));
                scratch
            }
        }
    }

    /// Asks for a row that will be read soon.
    pub(crate) fn prefetch(&self, row: usize) {
        let (first, part) = &self.parts[self.part(row)];
        let range = (row - first) * self.d..(row - first + 1) * self.d;
        match part {
            Part::F32(values) => simd::dot::prefetch(&values[range]),
            Part::F16(bits) => simd::dot::prefetch(&bits[range]),
        }
    }

    fn part(&self, row: usize) -> usize {
        match self.parts.len() {
            1 => 0,
            _ => self.parts.partition_point(|(first, _)| *first <= row) - 1,
        }
    }

    /// Refuses a row whose squared norm is not finite. By Cauchy-Schwarz no score of the others can
    /// then overflow, nor any partial sum of one, so that every comparison is between numbers.
    pub(crate) fn check_finite(&self, what: &str, threads: usize, job: &Job) -> Result<()> {
        let check = |rows: std::ops::Range<usize>| {
            job.check()?;
            let mut scratch = Vec::new();
            for row in rows {
                let values = self.row(row, &mut scratch);
                if !dot(values, values).is_finite() {
                    let value = values.iter().position(|v| !v.is_finite());
                    let detail = match value {
                        Some(at) => format!("holds {} at position {at}", values[at]),
                        None => "is too long: its squared norm is not a finite f32".to_owned(),
                    };
                    return Err(Error::usage(
                        format!("{what} row {row} {detail}"),
                        "Look at that row's text and at the model; NaN usually means a broken checkpoint",
                    ));
                }
            }
            Ok(())
        };
        par::try_map_blocks(self.n, 4096, threads, check).map(|_| ())
    }
}

/// The inner product that decides every result: sixteen sums, each over every sixteenth product in
/// order, added in pairs. Multiplications and additions round on their own, so the bits are the same
/// on every processor.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    let mut sum = simd::dot::lanes(a, b);
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        sum[i] += a * b;
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            sum[i] += sum[i + width];
        }
    }
    sum[0]
}

/// An IEEE half float.
fn half(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let rest = u32::from(bits & 0x7fff) << 13;
    if rest >> 23 == 0x1f {
        return f32::from_bits(sign | 0x7f80_0000 | rest & 0x007f_ffff); // infinity or NaN
    }
    // Exponents differ by 112; the product also brings subnormals to their place.
    let magnitude = f32::from_bits(rest) * f32::from_bits((112 + 127) << 23);
    f32::from_bits(sign | magnitude.to_bits())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_have_their_value() {
        for (bits, want) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x3555, 0.333_251_95),
            (0x0001, 5.960_464_5e-8),
            (0x83ff, -6.097_555e-5),
            (0x7bff, 65504.0),
            (0x7c00, f32::INFINITY),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert_eq!(half(bits), want, "{bits:04x}");
        }
        assert!(half(0x7e01).is_nan() && half(0x8000).is_sign_negative());
    }

    #[test]
    fn rows_are_found_across_parts_of_every_type() {
        let (a, b, c) = ([1f32, 2., 3., 4.], [0x3c00u16, 0x4000], [5f32, 6.]);
        let parts = [Part::F32(&a), Part::F32(&[]), Part::F16(&b), Part::F32(&c)];
        let all = Vectors::new(&parts, 2).unwrap();
        let mut scratch = Vec::new();
        let rows: Vec<Vec<f32>> =
            (0..all.len()).map(|i| all.row(i, &mut scratch).to_vec()).collect();
        assert_eq!(rows, [[1., 2.], [3., 4.], [1., 2.], [5., 6.]]);
        assert!(Vectors::new(&parts, 3).is_err() && Vectors::new(&parts, 0).is_err());
    }

    #[test]
    fn dot_is_the_naive_one_bit_for_bit() {
        for d in [0usize, 1, 15, 16, 17, 37, 384, 1000] {
            let a: Vec<f32> = (0..d).map(|i| (i as f32 * 0.37).sin()).collect();
            let b: Vec<f32> = (0..d).map(|i| (i as f32 * 1.7).cos() * 3.0).collect();
            assert_eq!(dot(&a, &b).to_bits(), crate::naive::dot(&a, &b).to_bits(), "d={d}");
        }
    }
}
