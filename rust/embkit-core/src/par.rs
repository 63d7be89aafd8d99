//! Threads whose number never shows in a result.
//!
//! Work is cut into blocks by size alone; workers take the next free block; results come back in
//! block order. There is no pool: `std::thread::scope` costs tens of microseconds, which is
//! nothing beside a block, survives `fork`, and leaves no thread behind for Python to trip over.

use crate::Result;
use std::num::NonZero;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// How many threads to use: `EMBKIT_THREADS` when it is a positive number, otherwise what the
/// system grants this process (affinity and cgroup quota included).
pub fn threads() -> usize {
    let asked = std::env::var("EMBKIT_THREADS").ok().and_then(|v| v.trim().parse().ok());
    match asked {
        Some(n) if n > 0 => n,
        _ => std::thread::available_parallelism().map_or(1, NonZero::get),
    }
}

/// Applies `work` to `[0, n)` in blocks of `block` (the last may be shorter) on `threads` threads
/// (0 means [`threads`]) and returns the results in block order.
///
/// The result is the same for every thread count as long as `work` depends on its range only.
/// A panic in `work` is passed on to the caller.
pub fn map_blocks<T, F>(n: usize, block: usize, threads: usize, work: F) -> Vec<T>
where
    T: Send,
    F: Fn(Range<usize>) -> T + Sync,
{
    let done = run(n, block, threads, |range| Ok::<T, ()>(work(range)));
    done.unwrap_or_default() // `work` has no error to give
}

/// [`map_blocks`] for work that can fail: stops handing out blocks after a failure and returns the
/// error of the lowest failed block.
pub fn try_map_blocks<T, F>(n: usize, block: usize, threads: usize, work: F) -> Result<Vec<T>>
where
    T: Send,
    F: Fn(Range<usize>) -> Result<T> + Sync,
{
    run(n, block, threads, work)
}

fn run<T, E, F>(n: usize, block: usize, threads: usize, work: F) -> std::result::Result<Vec<T>, E>
where
    T: Send,
    E: Send,
    F: Fn(Range<usize>) -> std::result::Result<T, E> + Sync,
{
    let block = block.max(1);
    let blocks = n.div_ceil(block);
    let wanted = if threads == 0 { self::threads() } else { threads };
    let workers = wanted.min(blocks).max(1);
    let range = |b: usize| b * block..n.min(b.saturating_add(1).saturating_mul(block));
    if workers == 1 {
        return (0..blocks).map(|b| work(range(b))).collect();
    }

    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let out = Mutex::new(Vec::with_capacity(blocks));
    let worker = || {
        while !stop.load(Ordering::Relaxed) {
            let b = next.fetch_add(1, Ordering::Relaxed);
            if b >= blocks {
                break;
            }
            let result = work(range(b));
            if result.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            out.lock().unwrap_or_else(|p| p.into_inner()).push((b, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(worker);
        }
        worker();
    });
    let mut out = out.into_inner().unwrap_or_else(|p| p.into_inner());
    out.sort_unstable_by_key(|(b, _)| *b);
    out.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn blocks_cover_the_range_in_order_for_every_thread_count() {
        for n in [0, 1, 2, 63, 64, 65, 1000] {
            for block in [1, 7, 64, 5000] {
                let naive: Vec<Range<usize>> =
                    (0..n).step_by(block).map(|a| a..n.min(a + block)).collect();
                for threads in [0, 1, 2, 7] {
                    assert_eq!(map_blocks(n, block, threads, |r| r), naive);
                }
            }
        }
    }

    #[test]
    fn block_zero_means_one() {
        assert_eq!(map_blocks(3, 0, 2, |r| r.start), vec![0, 1, 2]);
    }

    #[test]
    fn the_lowest_failure_wins_and_stops_the_rest() {
        for threads in [1, 2, 4] {
            let ran = AtomicUsize::new(0);
            let got = try_map_blocks(10_000, 1, threads, |r| {
                ran.fetch_add(1, Ordering::Relaxed);
                if r.start >= 5 {
                    Err(Error::usage(format!("{}", r.start), ""))
                } else {
                    Ok(r.start)
                }
            });
            let Err(Error::Usage { what, .. }) = got else { panic!("expected a usage error") };
            assert_eq!(what, "5");
            assert!(ran.load(Ordering::Relaxed) < 100);
        }
    }

    #[test]
    #[should_panic] // with "boom" or the scope's own words, depending on which thread it hit
    fn a_panic_is_passed_on() {
        map_blocks(100, 1, 2, |r| {
            // Block 0 waits so that a spawned worker takes the panicking block.
            if r.start == 0 {
                std::thread::sleep(std::time::Duration::from_millis(200));
            } else {
                panic!("boom");
            }
        });
    }
}
