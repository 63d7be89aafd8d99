//! Narrow token ids to the wider integers that models take: the inner loop of every batch.
//!
//! One loop, compiled for the instruction sets that a machine may have; the compiler vectorises it.
//! Oddity: this file alone of the crate has `unsafe`, to call what was compiled for more than the
//! baseline.

/// Integer types that token buffers may have.
pub trait TokenId: Copy + Send + Sync {
    /// The id as this type. Ids are below 2^31 in every vocabulary.
    fn of(id: u32) -> Self;
}

impl TokenId for i32 {
    #[inline(always)]
    fn of(id: u32) -> Self {
        id as i32
    }
}

impl TokenId for i64 {
    #[inline(always)]
    fn of(id: u32) -> Self {
        i64::from(id)
    }
}

/// Writes each id of `from` to the same place of `to`; the shorter decides.
#[inline]
pub(crate) fn widen<T: TokenId>(from: &[u16], to: &mut [T]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: the processor has the features that the function was compiled for.
            return unsafe { avx512(from, to) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { avx2(from, to) };
        }
    }
    portable(from, to);
}

#[inline(always)]
fn portable<T: TokenId>(from: &[u16], to: &mut [T]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = T::of(u32::from(*from));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn avx512<T: TokenId>(from: &[u16], to: &mut [T]) {
    portable(from, to);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<T: TokenId>(from: &[u16], to: &mut [T]) {
    portable(from, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_id_equals_the_portable_loop() {
        let ids: Vec<u16> = (0..=u16::MAX).collect();
        for (start, len) in (0..70).flat_map(|s| (0..140).map(move |l| (s * 900, l))) {
            let from = &ids[start..start + len];
            let (mut a, mut b) = (vec![-1_i64; len + 3], vec![-1_i32; len + 3]);
            widen(from, &mut a);
            widen(from, &mut b);
            for i in 0..len + 3 {
                let want = from.get(i).map_or(-1, |id| i64::from(*id));
                assert_eq!((a[i], i64::from(b[i])), (want, want), "start {start} len {len} at {i}");
            }
        }
    }
}
