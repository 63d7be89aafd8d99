//! The inner product of [`crate::vectors::dot`] with vector registers: the same sixteen chains, the
//! same roundings, the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    _MM_HINT_T0, _mm_prefetch, _mm256_add_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_setzero_ps,
    _mm256_storeu_ps, _mm512_add_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_setzero_ps,
    _mm512_storeu_ps,
};

/// The sixteen sums over whole groups of sixteen products.
pub(crate) fn lanes(a: &[[f32; 16]], b: &[[f32; 16]]) -> [f32; 16] {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512F was just detected.
            return unsafe { lanes_avx512(a, b) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: AVX2 was just detected.
            return unsafe { lanes_avx2(a, b) };
        }
    }
    portable(a, b)
}

fn portable(a: &[[f32; 16]], b: &[[f32; 16]]) -> [f32; 16] {
    let mut sum = [0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sum[i] += a[i] * b[i];
        }
    }
    sum
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn lanes_avx512(a: &[[f32; 16]], b: &[[f32; 16]]) -> [f32; 16] {
    let mut sum = _mm512_setzero_ps();
    for (a, b) in a.iter().zip(b) {
        // SAFETY: both have the 16 elements that are loaded.
        let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr())) };
        sum = _mm512_add_ps(sum, _mm512_mul_ps(a, b));
    }
    let mut out = [0f32; 16];
    // SAFETY: `out` has the 16 elements that are stored.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    out
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn lanes_avx2(a: &[[f32; 16]], b: &[[f32; 16]]) -> [f32; 16] {
    let mut sum = [_mm256_setzero_ps(); 2];
    for (a, b) in a.iter().zip(b) {
        for (i, sum) in sum.iter_mut().enumerate() {
            // SAFETY: the loads cover elements 0..8 and 8..16 of 16.
            let (a, b) = unsafe {
                (_mm256_loadu_ps(a.as_ptr().add(8 * i)), _mm256_loadu_ps(b.as_ptr().add(8 * i)))
            };
            *sum = _mm256_add_ps(*sum, _mm256_mul_ps(a, b));
        }
    }
    let mut out = [0f32; 16];
    for (i, sum) in sum.iter().enumerate() {
        // SAFETY: the stores cover elements 0..8 and 8..16 of 16.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), *sum) };
    }
    out
}

/// Asks for memory that will be read soon.
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks((64 / size_of::<T>()).max(1)) {
        // SAFETY: a hint; the address is that of a live reference.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_has_the_same_bits() {
        let value = |i: usize| [f32::sin(i as f32) * 3.0; 16].map(|v| v * 1.7 + i as f32 * 0.01);
        for n in [0, 1, 2, 7, 64] {
            let a: Vec<[f32; 16]> = (0..n).map(value).collect();
            let b: Vec<[f32; 16]> = (5..5 + n).map(value).collect();
            let want = portable(&a, &b).map(f32::to_bits);
            assert_eq!(lanes(&a, &b).map(f32::to_bits), want);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: AVX2 was just detected.
                assert_eq!(unsafe { lanes_avx2(&a, &b) }.map(f32::to_bits), want);
            }
        }
    }
}
