//! Lower case and white space of ASCII, 64 bytes at a time.
//!
//! The loops have no branches and fixed lengths, so the compiler turns them into the registers of
//! the baseline; wider ones gained nothing here. What they find comes out as bits, one per byte.

/// Bytes per block.
pub(crate) const BLOCK: usize = 64;

/// One bit per flag (0 or 1), the first lowest.
#[inline(always)]
pub(crate) fn bits(flags: &[u8; BLOCK]) -> u64 {
    let (eights, _) = flags.as_chunks::<8>();
    let mut mask = 0;
    for (k, eight) in eights.iter().enumerate() {
        // The product gathers the lowest bits of eight bytes in its highest byte, without carries.
        let gathered = u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        mask |= gathered << (8 * k);
    }
    mask
}

#[inline(always)]
fn is_space(byte: u8) -> bool {
    byte == b' ' || byte.wrapping_sub(b'\t') < 5
}

/// Writes the lower case with every white space as ' '; returns where white space is.
#[inline(always)]
fn lower(bytes: &[u8; BLOCK], out: &mut [u8; BLOCK]) -> u64 {
    let mut flags = [0u8; BLOCK];
    for i in 0..BLOCK {
        let byte = bytes[i];
        let space = is_space(byte);
        let upper = byte.wrapping_sub(b'A') < 26;
        out[i] = if space { b' ' } else { byte | (u8::from(upper) << 5) };
        flags[i] = u8::from(space);
    }
    bits(&flags)
}

/// Appends normalised ASCII. `out` itself says whether a space would be one too many: it would at
/// its beginning and after a space. The caller removes the last space of the whole.
pub(super) fn append(text: &[u8], out: &mut Vec<u8>) {
    let mut after_space = u64::from(out.last().is_none_or(|&last| last == b' '));
    let mut low = [0u8; BLOCK];
    let (blocks, rest) = text.as_chunks::<BLOCK>();
    for block in blocks {
        let space = lower(block, &mut low);
        let extra = space & ((space << 1) | after_space);
        after_space = space >> 63;
        if extra == 0 {
            out.extend_from_slice(&low);
        } else {
            append_kept(&low, !extra, out);
        }
    }
    if !rest.is_empty() {
        let mut block = [0u8; BLOCK];
        block[..rest.len()].copy_from_slice(rest);
        let space = lower(&block, &mut low);
        let there = (1u64 << rest.len()) - 1;
        append_kept(&low, there & !(space & ((space << 1) | after_space)), out);
    }
}

/// Appends the bytes whose bit is set, run by run.
fn append_kept(bytes: &[u8; BLOCK], mut keep: u64, out: &mut Vec<u8>) {
    while keep != 0 {
        let from = keep.trailing_zeros() as usize;
        let to = from + (!(keep >> from)).trailing_zeros() as usize;
        out.extend_from_slice(&bytes[from..to.min(BLOCK)]);
        keep = if to >= BLOCK { 0 } else { keep >> to << to };
    }
}

/// Where the first non-ASCII byte is, or the length.
pub(crate) fn run(bytes: &[u8]) -> usize {
    let (blocks, rest) = bytes.as_chunks::<32>();
    for (i, block) in blocks.iter().enumerate() {
        if block.iter().fold(0, |any, &byte| any | byte) >= 0x80 {
            let inside = block.iter().position(|&byte| byte >= 0x80);
            return 32 * i + inside.unwrap_or(0);
        }
    }
    let inside = rest.iter().position(|&byte| byte >= 0x80);
    32 * blocks.len() + inside.unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_runs_match_a_loop_over_bytes() {
        for seed in 0..300u64 {
            let at =
                |i: usize| (seed + 7).wrapping_mul(0x9E37_79B9_97F4_A7C1).rotate_left(i as u32);
            let mut flags = [0u8; BLOCK];
            (0..BLOCK).for_each(|i| flags[i] = (at(i) & 1) as u8);
            let want = (0..BLOCK).fold(0u64, |mask, i| mask | u64::from(flags[i]) << i);
            assert_eq!(bits(&flags), want);
            let mut text = vec![b'x'; (seed % 150) as usize];
            assert_eq!(run(&text), text.len());
            if let Some(byte) = text.get_mut((seed / 2) as usize) {
                *byte = 0x80;
                assert_eq!(run(&text), (seed / 2) as usize);
            }
        }
    }
}
