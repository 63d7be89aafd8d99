//! Rounding to bytes: one body, compiled for each width of register. No operation is fused and every
//! lane is its own chain, so the bits are the same in all of them.

/// What rounding found: the codes are written, these are the sums of squares in sixteen lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Squares {
    /// Of the elements, of what the codes stand for, and of the difference.
    pub(crate) sums: [[f32; 16]; 3],
}

/// Writes the nearest integer to `x / scale` for every element of `x`, at most 127 away from 0.
pub(crate) fn round(x: &[f32], scale: f32, codes: &mut [i8]) -> Squares {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("avx512vl")
            && std::arch::is_x86_feature_detected!("avx512bw")
        {
            // SAFETY: AVX-512 F, VL and BW were just detected.
            return unsafe { round_avx512(x, scale, codes) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was just detected.
            return unsafe { round_avx2(x, scale, codes) };
        }
    }
    body(x, scale, codes)
}

/// The largest magnitude.
pub(crate) fn largest(x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was just detected.
        return unsafe { largest_avx2(x) };
    }
    largest_body(x)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw")]
fn round_avx512(x: &[f32], scale: f32, codes: &mut [i8]) -> Squares {
    body(x, scale, codes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2(x: &[f32], scale: f32, codes: &mut [i8]) -> Squares {
    body(x, scale, codes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn largest_avx2(x: &[f32]) -> f32 {
    largest_body(x)
}

#[inline(always)]
fn body(x: &[f32], scale: f32, codes: &mut [i8]) -> Squares {
    let inverse = 1.0 / scale;
    let mut out = Squares::default();
    let [all, kept, lost] = &mut out.sums;
    let (groups, rest) = x.as_chunks::<16>();
    let (code_groups, code_rest) = codes.as_chunks_mut::<16>();
    let mut step = |i: usize, x: f32| {
        // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, in every lane.
        let whole = (x * inverse + 12_582_912.0) - 12_582_912.0;
        let value = whole * scale;
        let error = x - value;
        all[i] += x * x;
        kept[i] += value * value;
        lost[i] += error * error;
        whole as i32 as i8
    };
    for (x, codes) in groups.iter().zip(code_groups) {
        for i in 0..16 {
            codes[i] = step(i, x[i]);
        }
    }
    for (i, (x, code)) in rest.iter().zip(code_rest).enumerate() {
        *code = step(i, *x);
    }
    out
}

#[inline(always)]
fn largest_body(x: &[f32]) -> f32 {
    let mut most = [0f32; 16];
    let (groups, rest) = x.as_chunks::<16>();
    for x in groups {
        (0..16).for_each(|i| most[i] = if x[i].abs() > most[i] { x[i].abs() } else { most[i] });
    }
    rest.iter().chain(&most).fold(0.0, |most, x| most.max(x.abs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_the_same_bits() {
        for d in [0usize, 1, 15, 16, 33, 384] {
            let x: Vec<f32> = (0..d).map(|i| (i as f32 * 0.71).sin() * (1.0 + i as f32)).collect();
            let scale = (largest_body(&x) / 127.0).max(1e-9);
            let (mut want, mut got) = (vec![0i8; d], vec![0i8; d]);
            let squares = body(&x, scale, &mut want);
            assert_eq!(round(&x, scale, &mut got), squares);
            assert_eq!(got, want);
            assert_eq!(largest(&x), x.iter().fold(0f32, |m, v| m.max(v.abs())));
            for (x, code) in x.iter().zip(&want) {
                assert!((x - f32::from(*code) * scale).abs() <= scale * 0.5001);
            }
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: AVX2 was just detected.
                assert_eq!(unsafe { round_avx2(&x, scale, &mut got) }, squares);
            }
        }
    }
}
