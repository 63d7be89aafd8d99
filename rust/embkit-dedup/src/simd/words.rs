//! Which bytes of ASCII text belong to words, 64 to a mask.

/// Bytes of one call at most: the masks fit a small array on the stack.
pub(crate) const BLOCK: usize = 4096;

/// Sets bit `i % 64` of `masks[i / 64]` when byte `i` is an ASCII letter, digit, `_`, `+` or `#`.
///
/// `bytes` is at most [`BLOCK`] long; bits past its end are 0. Returns the masks in use.
pub(crate) fn word_masks<'a>(bytes: &[u8], masks: &'a mut [u64; BLOCK / 64]) -> &'a [u64] {
    let bytes = bytes.get(..BLOCK).unwrap_or(bytes);
    let used = bytes.len().div_ceil(64);
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512bw") {
            // SAFETY: the feature was just detected.
            unsafe { masks_avx512(bytes, masks) };
            return &masks[..used];
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            unsafe { masks_avx2(bytes, masks) };
            return &masks[..used];
        }
    }
    masks_any(bytes, masks);
    &masks[..used]
}

fn masks_any(bytes: &[u8], masks: &mut [u64; BLOCK / 64]) {
    for (chunk, mask) in bytes.chunks(64).zip(masks) {
        let inside = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'#');
        *mask = chunk.iter().rev().fold(0, |mask, &b| mask << 1 | u64::from(inside(b)));
    }
}

/// The last, short chunk of a block, padded with zeros (which are in no word).
#[cfg(target_arch = "x86_64")]
fn padded(chunk: &[u8]) -> [u8; 64] {
    let mut full = [0; 64];
    full[..chunk.len()].copy_from_slice(chunk);
    full
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bw")]
fn masks_avx512(bytes: &[u8], masks: &mut [u64; BLOCK / 64]) {
    use std::arch::x86_64::*;
    let set = |byte: u8| _mm512_set1_epi8(byte as i8);
    let mask = |chunk: &[u8; 64]| {
        // SAFETY: reads the 64 bytes of `chunk`, unaligned.
        let x = unsafe { _mm512_loadu_si512(chunk.as_ptr().cast()) };
        // Bit 5 makes letters lower case and turns nothing else into a letter.
        let letter = _mm512_sub_epi8(_mm512_or_si512(x, set(0x20)), set(b'a'));
        let digit = _mm512_sub_epi8(x, set(b'0'));
        _mm512_cmplt_epu8_mask(letter, set(26))
            | _mm512_cmplt_epu8_mask(digit, set(10))
            | _mm512_cmpeq_epi8_mask(x, set(b'_'))
            | _mm512_cmpeq_epi8_mask(x, set(b'+'))
            | _mm512_cmpeq_epi8_mask(x, set(b'#'))
    };
    let (chunks, rest) = bytes.as_chunks::<64>();
    for (chunk, out) in chunks.iter().zip(masks.iter_mut()) {
        *out = mask(chunk);
    }
    if !rest.is_empty() {
        masks[chunks.len()] = mask(&padded(rest));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn masks_avx2(bytes: &[u8], masks: &mut [u64; BLOCK / 64]) {
    use std::arch::x86_64::*;
    let set = |byte: u8| _mm256_set1_epi8(byte as i8);
    let half = |chunk: &[u8; 64], from: usize| {
        // SAFETY: reads 32 of the 64 bytes of `chunk`; `from` is 0 or 32.
        let x = unsafe { _mm256_loadu_si256(chunk.as_ptr().add(from).cast()) };
        // `x` is below `n` as an unsigned byte when the smaller of both is `x` and n - 1 at most.
        let below = |x, n: u8| _mm256_cmpeq_epi8(_mm256_min_epu8(x, set(n - 1)), x);
        let letter = _mm256_sub_epi8(_mm256_or_si256(x, set(0x20)), set(b'a'));
        let digit = _mm256_sub_epi8(x, set(b'0'));
        let mut inside = _mm256_or_si256(below(letter, 26), below(digit, 10));
        for byte in *b"_+#" {
            inside = _mm256_or_si256(inside, _mm256_cmpeq_epi8(x, set(byte)));
        }
        u64::from(_mm256_movemask_epi8(inside) as u32)
    };
    let (chunks, rest) = bytes.as_chunks::<64>();
    for (chunk, out) in chunks.iter().zip(masks.iter_mut()) {
        *out = half(chunk, 0) | half(chunk, 32) << 32;
    }
    if !rest.is_empty() {
        let rest = &padded(rest);
        masks[chunks.len()] = half(rest, 0) | half(rest, 32) << 32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_copy_gives_the_same_masks() {
        let all: Vec<u8> = (0..128u8).chain((0..128).rev()).cycle().take(BLOCK).collect();
        for len in [0, 1, 31, 32, 33, 63, 64, 65, 127, 500, BLOCK] {
            let bytes = &all[all.len() - len..];
            let mut want = [0; BLOCK / 64];
            masks_any(bytes, &mut want);
            for (i, byte) in bytes.iter().enumerate() {
                let c = *byte as char;
                let inside = c.is_ascii_alphanumeric() || "_+#".contains(c);
                assert_eq!(want[i / 64] >> (i % 64) & 1 == 1, inside, "{c:?}");
            }
            let mut got = [0; BLOCK / 64];
            assert_eq!(word_masks(bytes, &mut got), &want[..len.div_ceil(64)]);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                got.fill(0);
                // SAFETY: the feature was just detected.
                unsafe { masks_avx2(bytes, &mut got) };
                assert_eq!(got, want);
            }
        }
    }
}
