//! A rank's rows of a global batch: dealt, made distinct, and cut into micro-batches.

use embkit_core::{Error, Result};

use super::{Loader, Micro, Sides, cuts};
use crate::read::Span;

/// Rows of some examples and how they are cut.
pub(super) struct Arranged {
    pub(super) rows: Vec<u64>,
    pub(super) spans: Vec<Span>,
    /// For each named row (queries, positives, hard negatives) its index into `rows`.
    pub(super) index: Vec<i64>,
    pub(super) micro: Vec<Micro>,
}

impl Loader {
    /// This rank's examples and rows, and the most micro-batches of any rank.
    pub(super) fn share(
        &self,
        sides: &Sides,
        rank: usize,
        world: usize,
    ) -> Result<(Vec<u32>, Arranged, usize)> {
        let h = sides.width;
        let mut tokens = Vec::with_capacity(sides.examples.len());
        for (i, (query, positive)) in sides.query.iter().zip(&sides.positive).enumerate() {
            let hard = sides.hard.get(i * h..(i + 1) * h).unwrap_or_default();
            let mut sum = 0;
            for row in [query, positive].into_iter().chain(hard) {
                sum += self.store.span(*row)?.len() as u32;
            }
            tokens.push(sum);
        }
        let ranks = cuts::deal(&tokens, world);
        let arranged: Vec<Arranged> =
            ranks.iter().map(|own| self.arrange_rows(sides, own)).collect::<Result<_>>()?;
        let most = arranged.iter().map(|a| a.micro.len()).max().unwrap_or(0);
        let own = ranks.into_iter().zip(arranged).nth(rank);
        let (own, arranged) =
            own.ok_or_else(|| Error::usage(format!("no rank {rank}"), "Use ranks from 0"))?;
        Ok((own, arranged, most))
    }

    /// The distinct rows of some examples, cut into micro-batches.
    pub(super) fn arrange_rows(&self, sides: &Sides, own: &[u32]) -> Result<Arranged> {
        let named: Vec<u64> = [
            select(&sides.query, own, 1),
            select(&sides.positive, own, 1),
            select(&sides.hard, own, sides.width),
        ]
        .concat();
        let mut sorted: Vec<(u64, u32)> = named.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        // Number of the distinct row that each name means, rows ascending.
        let mut rows: Vec<u64> = Vec::with_capacity(sorted.len());
        let mut index = vec![0_i64; named.len()];
        for (row, name) in &sorted {
            if rows.last() != Some(row) {
                rows.push(*row);
            }
            if let Some(index) = index.get_mut(*name as usize) {
                *index = rows.len() as i64 - 1;
            }
        }
        let spans: Vec<Span> =
            rows.iter().map(|row| self.store.span(*row)).collect::<Result<_>>()?;
        let lengths: Vec<u32> = spans.iter().map(|s| s.len() as u32).collect();
        let order = cuts::longest_first(&lengths);
        let falling = select(&lengths, &order, 1);
        let ranges = match self.settings.padded {
            true => cuts::padded(&falling, self.settings.token_budget),
            false => cuts::packed(&falling, self.settings.token_budget),
        };
        let mut micro = Vec::with_capacity(ranges.len());
        let mut token_start = 0;
        for range in ranges {
            let longest = falling.get(range.start).map_or(0, |l| *l as usize).max(1);
            let real = falling.get(range.clone()).unwrap_or_default().iter().map(|l| *l as usize);
            let tokens = if self.settings.padded { longest * range.len() } else { real.sum() };
            if i32::try_from(tokens).is_err() {
                return Err(Error::usage(
                    format!("a micro-batch of {tokens} tokens"),
                    "Use a token_budget and a max_length below 2^31",
                ));
            }
            micro.push(Micro {
                start: range.start,
                rows: range.len(),
                longest,
                token_start,
                tokens,
            });
            token_start += tokens;
        }
        let mut place = vec![0_i64; rows.len()];
        for (at, row) in (0..).zip(&order) {
            if let Some(place) = place.get_mut(*row as usize) {
                *place = at;
            }
        }
        for index in &mut index {
            *index = place.get(*index as usize).copied().unwrap_or(0);
        }
        Ok(Arranged {
            rows: select(&rows, &order, 1),
            spans: select(&spans, &order, 1),
            index,
            micro,
        })
    }
}

/// Rows `at` of a matrix of `width` columns.
pub(super) fn select<T: Copy>(values: &[T], at: &[u32], width: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(at.len() * width);
    for i in at {
        let start = *i as usize * width;
        out.extend_from_slice(values.get(start..start + width).unwrap_or_default());
    }
    out
}
