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

/// Compiles a loop for the baseline and for wider registers, and calls the best that there is.
macro_rules! best_of {
    ($(#[$doc:meta])* $name:ident<$($generic:ident: $bound:path),+>($($arg:ident: $type:ty),+) $body:block) => {
        $(#[$doc])*
        #[inline]
        pub(crate) fn $name<$($generic: $bound),+>($($arg: $type),+) {
            #[inline(always)]
            fn portable<$($generic: $bound),+>($($arg: $type),+) $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            fn avx512<$($generic: $bound),+>($($arg: $type),+) {
                portable($($arg),+);
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2")]
            fn avx2<$($generic: $bound),+>($($arg: $type),+) {
                portable($($arg),+);
            }

            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
                    // SAFETY: the processor has the features that the function was compiled for.
                    return unsafe { avx512($($arg),+) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),+) };
                }
            }
            portable($($arg),+);
        }
    };
}

best_of! {
    /// Writes each id of `from` to the same place of `to`; the shorter decides.
    widen<F: Id, T: TokenId>(from: &[F], to: &mut [T]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::of(from.id());
        }
    }
}

best_of! {
    /// A row of a rectangle: ids and ones, then `pad` and zeros.
    pad<F: Id, T: TokenId, M: Flag>(from: &[F], ids: &mut [T], mask: &mut [M], pad: T) {
        let (used, unused) = ids.split_at_mut(from.len().min(ids.len()));
        for (to, from) in used.iter_mut().zip(from) {
            *to = T::of(from.id());
        }
        unused.fill(pad);
        let (used, unused) = mask.split_at_mut(from.len().min(mask.len()));
        used.fill(M::from(true));
        unused.fill(M::from(false));
    }
}

/// Asks the processor to bring a slice near, without waiting: at most its first 16 cache lines,
/// after which it reads ahead by itself.
#[inline(always)]
pub(crate) fn prefetch<T>(items: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of_val(items).div_ceil(64).min(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let at = items.as_ptr().cast::<i8>().wrapping_add(64 * line);
        // SAFETY: a prefetch reads nothing that the program sees, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = items;
}

/// What a mask is made of.
pub trait Flag: Copy + From<bool> + Send + Sync {}
impl<T: Copy + From<bool> + Send + Sync> Flag for T {}

/// Ids as they are stored.
pub(crate) trait Id: Copy {
    fn id(self) -> u32;
}

impl Id for u16 {
    #[inline(always)]
    fn id(self) -> u32 {
        self.into()
    }
}

impl Id for u32 {
    #[inline(always)]
    fn id(self) -> u32 {
        self
    }
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
            let (mut c, mut mask) = (vec![-1_i32; len + 3], vec![9_u8; len + 3]);
            pad(from, &mut c, &mut mask, -7);
            for i in 0..len + 3 {
                let want = from.get(i).map_or(-1, |id| i64::from(*id));
                assert_eq!((a[i], i64::from(b[i])), (want, want), "start {start} len {len} at {i}");
                let filled = if i < len { want as i32 } else { -7 };
                assert_eq!((c[i], mask[i]), (filled, u8::from(i < len)));
            }
        }
    }
}
