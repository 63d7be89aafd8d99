//! AMX int8: 32 queries x 32 rows, four tiles of 16 x 16 sums, 64 products a row and step.
//!
//! Inline assembly, because the intrinsics are not stable. A tile configuration belongs to the
//! thread, and other libraries set their own: each call sets ours and releases it before it returns.

use super::{Bars, Hits, MAX_MR, NR, vnni};
use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __cpuid_count, _mm512_add_epi32, _mm512_loadu_si512, _mm512_set1_epi32, _xgetbv,
};
use std::sync::OnceLock;

pub(super) const MR: usize = 32;

/// What `ldtilecfg` reads: palette 1, eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut i = 0;
    while i < 8 {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
        i += 1;
    }
    config
};

#[repr(C, align(64))]
struct Sums([[i32; NR]; MR]);

/// Whether the processor has the tiles, the system saves them, and this process may use them.
pub(super) fn available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        if !(std::arch::is_x86_feature_detected!("avx512f")
            && std::arch::is_x86_feature_detected!("xsave"))
        {
            return false;
        }
        let (most, bits) = (__cpuid(0).eax, __cpuid_count(7, 0).edx);
        let tile_and_int8 = 1 << 24 | 1 << 25;
        if most < 7 || bits & tile_and_int8 != tile_and_int8 {
            return false;
        }
        // SAFETY: the operating system has enabled XSAVE, or the detection of AVX-512 would fail.
        let saved = unsafe { state() };
        let tile_state = 1 << 17 | 1 << 18;
        saved & tile_state == tile_state && permitted() && agrees()
    })
}

#[target_feature(enable = "xsave")]
fn state() -> u64 {
    // SAFETY: register 0 exists wherever XSAVE does.
    unsafe { _xgetbv(0) }
}

/// Asks Linux for the tile data, once for the process: without it the first use is a SIGILL.
fn permitted() -> bool {
    if !cfg!(target_os = "linux") {
        return false;
    }
    let answer: i64;
    // SAFETY: system call 158 is arch_prctl; ARCH_REQ_XCOMP_PERM (0x1023) of feature 18 reads and
    // writes no memory of ours. `syscall` overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") 158i64 => answer,
            in("rdi") 0x1023i64,
            in("rsi") 18i64,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

/// Whether the tiles compute what plain Rust does: a processor, hypervisor or system that gets them
/// wrong is treated as one that has none.
fn agrees() -> bool {
    const DEPTH: usize = 128;
    let code = |i: usize| ((i * 7919 + 13) % 255) as i8;
    let queries: Vec<[i8; 4]> =
        (0..MR * DEPTH / 4).map(|g| std::array::from_fn(|k| code(4 * g + k))).collect();
    let panel: Vec<[u8; 4]> =
        (0..NR * DEPTH / 4).map(|g| std::array::from_fn(|k| code(4 * g + k + 5) as u8)).collect();
    let start = std::array::from_fn(|i| i as i32 * 1000);
    let bars = [f32::NEG_INFINITY; MAX_MR];
    let mut hits = Hits { above: [0; MAX_MR], scores: [[0.0; NR]; MAX_MR] };
    // SAFETY: called by `available` when everything else has said yes.
    unsafe { tile(&queries, &start, &panel, &[1.0; NR], &bars, &mut hits) };
    (0..MR).all(|i| {
        (0..NR).all(|j| {
            let group = |g: usize| queries[i * DEPTH / 4 + g].iter().zip(panel[g * NR + j]);
            let products = (0..DEPTH / 4).flat_map(group);
            let sum = products.map(|(q, p)| i32::from(*q) * i32::from(p)).sum::<i32>();
            hits.scores[i][j] == (sum + start[i]) as f32
        })
    })
}

/// `queries` row-major, `32 x depth` bytes; `panel` in groups of four as in the other int8 forms;
/// `depth` a multiple of 64.
///
/// # Safety
/// [`available`] must have said yes.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn tile(
    queries: &[[i8; 4]],
    start: &[i32; MAX_MR],
    panel: &[[u8; 4]],
    scale: &[f32; NR],
    bars: &Bars,
    hits: &mut Hits,
) {
    let depth = queries.len() * 4 / MR;
    let steps = depth / 64;
    assert!(depth.is_multiple_of(64) && steps > 0 && panel.len() == depth / 4 * NR);
    let mut sums = Sums([[0; NR]; MR]);
    // SAFETY: the tiles exist. `a` walks `steps` columns of 64 bytes over rows of `depth` bytes, the
    // second half of the rows at `a + 16 * depth`; `b` walks `steps` blocks of 16 groups x 32 rows x
    // 4 bytes = 2048; `sums` has 32 rows of 128 bytes. All tiles are clobbered and released.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {depth}]",
            "tileloadd tmm6, [{b} + {width}]",
            "tileloadd tmm7, [{b} + {width} + 64]",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{a2} + {depth}]",
            "tdpbsud tmm1, tmm4, tmm7",
            "tdpbsud tmm2, tmm5, tmm6",
            "tdpbsud tmm3, tmm5, tmm7",
            "add {a}, 64",
            "add {a2}, 64",
            "add {b}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {width}], tmm0",
            "tilestored [{out} + {width} + 64], tmm1",
            "tilestored [{out2} + {width}], tmm2",
            "tilestored [{out2} + {width} + 64], tmm3",
            "tilerelease",
            config = in(reg) &raw const CONFIG,
            a = inout(reg) queries.as_ptr() => _,
            a2 = inout(reg) queries.as_ptr().cast::<i8>().add(16 * depth) => _,
            b = inout(reg) panel.as_ptr() => _,
            depth = in(reg) depth,
            width = in(reg) 128usize,
            steps = inout(reg) steps => _,
            out = in(reg) sums.0.as_mut_ptr(),
            out2 = in(reg) sums.0.as_mut_ptr().add(16),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    for i in 0..MR {
        let (start, row) = (_mm512_set1_epi32(start[i]), &sums.0[i]);
        // SAFETY: `row` has 32 elements; the loads cover 0..16 and 16..32.
        let (low, high) = unsafe {
            (
                _mm512_loadu_si512(row.as_ptr().cast()),
                _mm512_loadu_si512(row.as_ptr().add(16).cast()),
            )
        };
        let whole = [_mm512_add_epi32(low, start), _mm512_add_epi32(high, start)];
        vnni::compare(whole, scale, bars[i], &mut hits.above[i], &mut hits.scores[i]);
    }
}
