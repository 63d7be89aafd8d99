//! How a step's rows are cut into micro-batches, and its examples dealt to ranks.
//!
//! Rows are taken longest first, so that those of one micro-batch have nearly one length.

use std::ops::Range;

/// Tokens that one more padded micro-batch must save to be worth its calls.
pub const PRICE: u64 = 128;

/// Positions of `lengths` by falling length, ties in their order.
pub fn longest_first(lengths: &[u32]) -> Vec<u32> {
    // Length and position in one word: what is sorted is what is compared.
    let word = |(length, i): (&u32, u32)| u64::from(!length) << 32 | u64::from(i);
    let mut order: Vec<u64> = lengths.iter().zip(0..).map(word).collect();
    order.sort_unstable();
    order.into_iter().map(|word| word as u32).collect()
}

/// Ranges of falling lengths whose sums are at most `budget` (a longer row is alone).
pub fn packed(falling: &[u32], budget: u64) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    let (mut start, mut sum) = (0, 0_u64);
    for (i, length) in falling.iter().enumerate() {
        if i > start && sum + u64::from(*length) > budget {
            cuts.push(start..i);
            (start, sum) = (i, 0);
        }
        sum += u64::from(*length);
    }
    if start < falling.len() {
        cuts.push(start..falling.len());
    }
    cuts
}

/// Ranges of falling lengths to be padded to their first row, each of at most `budget` tokens with
/// padding (a longer row is alone). Titles beside descriptions would be mostly padding in one
/// batch, and many small batches cost calls: the cuts are where padded tokens plus [`PRICE`] per
/// batch are least in sum.
pub fn padded(falling: &[u32], budget: u64) -> Vec<Range<usize>> {
    let mut cuts = Vec::new();
    for (range, longest) in cheapest(falling) {
        let rows = range.len();
        let most = usize::try_from(budget / longest).unwrap_or(usize::MAX).max(1);
        let parts = rows.div_ceil(most);
        let (size, larger) = (rows / parts, rows % parts);
        let mut start = range.start;
        for part in 0..parts {
            let end = start + size + usize::from(part < larger);
            cuts.push(start..end);
            start = end;
        }
    }
    cuts
}

/// The price of all rows up to an end when the last segment begins at `start`: a line in the end.
#[derive(Clone, Copy)]
struct Line {
    start: usize,
    slope: i128,
    base: i128,
}

impl Line {
    fn at(&self, end: usize) -> i128 {
        self.base + self.slope * end as i128
    }

    /// Whether `self`, between `before` and `after`, is nowhere the lowest.
    fn is_needless(&self, before: &Line, after: &Line) -> bool {
        (after.base - before.base) * (before.slope - self.slope)
            <= (self.base - before.base) * (before.slope - after.slope)
    }
}

/// The cheapest segments and their longest row, in O(u) for u distinct lengths: slopes fall as
/// starts rise, so the best start only moves forward, over the lower hull of the lines.
fn cheapest(falling: &[u32]) -> Vec<(Range<usize>, u64)> {
    let (mut hull, mut best): (Vec<Line>, usize) = (Vec::new(), 0);
    let mut chosen = Vec::new();
    let (mut start, mut cost) = (0, 0);
    while let Some(length) = falling.get(start) {
        let slope = i128::from((*length).max(1));
        let line = Line { start, slope, base: cost + i128::from(PRICE) - slope * start as i128 };
        while let Some([.., a, b]) = hull.get(best..)
            && b.is_needless(a, &line)
        {
            hull.pop();
        }
        hull.push(line);
        let rest = falling.get(start..).unwrap_or_default();
        let end = start + rest.partition_point(|l| l == length);
        while let Some([now, next, ..]) = hull.get(best..)
            && next.at(end) < now.at(end)
        {
            best += 1;
        }
        let Some(line) = hull.get(best) else { break };
        cost = line.at(end);
        chosen.push((end, *line));
        start = end;
    }
    let mut cuts = Vec::new();
    let mut open = falling.len();
    while let Some((end, line)) = chosen.pop() {
        if end == open {
            cuts.push((line.start..end, line.slope as u64));
            open = line.start;
        }
    }
    cuts.reverse();
    cuts
}

/// Deals examples to ranks: longest first, back and forth, so that counts differ by at most one and
/// tokens by little. Returns the positions of each rank, ascending.
pub fn deal(tokens: &[u32], world: usize) -> Vec<Vec<u32>> {
    let mut ranks = vec![Vec::with_capacity(tokens.len() / world.max(1) + 1); world.max(1)];
    for (i, position) in longest_first(tokens).into_iter().enumerate() {
        let (round, place) = (i / ranks.len(), i % ranks.len());
        let rank = if round % 2 == 0 { place } else { ranks.len() - 1 - place };
        if let Some(rank) = ranks.get_mut(rank) {
            rank.push(position);
        }
    }
    ranks.iter_mut().for_each(|r| r.sort_unstable());
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(seed: u64, n: usize, most: u64) -> Vec<u32> {
        (0..n as u64).map(|i| 1 + (crate::plan::draw(seed, i) % most) as u32).collect()
    }

    /// Price of cutting the sorted lengths at every possible set of places, by brute force.
    fn least(falling: &[u32]) -> u64 {
        let n = falling.len();
        (0..1_u32 << (n - 1))
            .map(|cuts| {
                let (mut price, mut start) = (0, 0);
                for end in 1..=n {
                    if end == n || cuts >> (end - 1) & 1 == 1 {
                        price += u64::from(falling[start]) * (end - start) as u64 + PRICE;
                        start = end;
                    }
                }
                price
            })
            .min()
            .unwrap()
    }

    #[test]
    fn padded_cuts_are_the_cheapest() {
        for seed in 0..40 {
            let mut falling = lengths(seed, 1 + seed as usize % 11, 300);
            falling.sort_unstable_by(|a, b| b.cmp(a));
            let cuts = padded(&falling, 1 << 40);
            let price: u64 =
                cuts.iter().map(|c| u64::from(falling[c.start]) * c.len() as u64 + PRICE).sum();
            assert_eq!(price, least(&falling), "{falling:?} {cuts:?}");
        }
    }

    #[test]
    fn every_row_once_and_inside_the_budget() {
        for seed in 0..60 {
            let all = lengths(seed, (seed * 7) as usize % 90, 60);
            let order = longest_first(&all);
            let falling: Vec<u32> = order.iter().map(|i| all[*i as usize]).collect();
            assert!(falling.is_sorted_by(|a, b| a >= b));
            for budget in [1, 50, 333, 10_000] {
                for (cuts, pads) in
                    [(packed(&falling, budget), false), (padded(&falling, budget), true)]
                {
                    let covered: Vec<usize> = cuts.iter().cloned().flatten().collect();
                    assert_eq!(covered, (0..falling.len()).collect::<Vec<_>>());
                    for cut in cuts.iter().filter(|c| c.len() > 1) {
                        let real: u64 = falling[cut.clone()].iter().map(|l| u64::from(*l)).sum();
                        let wide = u64::from(falling[cut.start]) * cut.len() as u64;
                        assert!(if pads { wide } else { real } <= budget, "{cut:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn ranks_get_equal_counts_and_nearly_equal_tokens() {
        for (seed, world) in [(1, 1), (2, 2), (3, 3), (4, 7), (5, 64)] {
            let tokens = lengths(seed, 1000 + seed as usize, 500);
            let ranks = deal(&tokens, world);
            let mut all: Vec<u32> = ranks.iter().flatten().copied().collect();
            all.sort_unstable();
            assert_eq!(all, (0..tokens.len() as u32).collect::<Vec<_>>());
            let sums: Vec<u64> = ranks
                .iter()
                .map(|r| r.iter().map(|i| u64::from(tokens[*i as usize])).sum())
                .collect();
            let counts: Vec<usize> = ranks.iter().map(Vec::len).collect();
            assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            assert!(sums.iter().max().unwrap() - sums.iter().min().unwrap() <= 1000, "{sums:?}");
        }
    }
}
