//! Batches without repeated values over rows that no store holds, in an order that the caller chose.
//!
//! Each row goes to the first batch that has room and none of the row's values. That is the same as
//! filling one batch after the other and passing over the rows that do not fit, but no row is looked
//! at twice: each value that comes more than once remembers the first batch that may take it, which
//! only moves on, and full batches are skipped by a chain that is shortened as it is followed.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;

use embkit_core::{Error, Job, Result};

use super::distinct::{Multiply, number};

const TICK: usize = 4096;

/// Batches of rows, one after the other.
#[derive(Debug, PartialEq)]
pub struct Batches {
    /// Rows, batch by batch.
    pub rows: Vec<u64>,
    /// Where each batch ends in `rows`. Batches that could not be filled are among the others.
    pub ends: Vec<u64>,
}

/// Deals `order` (row numbers) to batches of `batch_size` in which no value comes twice; row `i`
/// has the values `keys[i * columns..][..columns]`, which may be equal among themselves.
///
/// Errors: `Usage` for a size or number of columns of 0, keys that are no whole rows, and rows
/// beyond them.
pub fn first_fit(
    job: &Job,
    keys: &[u64],
    columns: usize,
    order: &[u64],
    batch_size: usize,
) -> Result<Batches> {
    if columns == 0 || batch_size == 0 || !keys.len().is_multiple_of(columns) {
        let what = format!("{} keys in rows of {columns} for batches of {batch_size}", keys.len());
        return Err(Error::usage(what, "Give at least one column and one row a batch"));
    }
    let (numbers, count) = number(keys);
    let mut made = Open::default();
    // Of each value that comes more than once, numbered from 1: all batches before are full or
    // have it.
    let mut from = vec![0_u32; count as usize + 1];
    let mut has: HashSet<u64, BuildHasherDefault<Multiply>> = HashSet::default();
    let mut own: Vec<u32> = Vec::with_capacity(columns);
    for (done, row) in order.iter().enumerate() {
        if done % TICK == 0 {
            job.check()?;
            job.advance(TICK.min(order.len() - done) as u64);
        }
        let first = usize::try_from(*row).unwrap_or(usize::MAX).saturating_mul(columns);
        let Some(values) = numbers.get(first..first.saturating_add(columns)) else {
            let what = format!("row {row} of {}", keys.len() / columns);
            return Err(Error::usage(what, "Give rows below the number of rows"));
        };
        own.clear();
        own.extend(values.iter().filter(|number| **number != 0));
        let mut batch = 0;
        for number in &own {
            let Some(place) = from.get_mut(*number as usize) else { continue };
            *place = made.first(*place);
            while has.contains(&pair(*number, *place)) {
                *place = made.first(*place + 1);
            }
            batch = batch.max(*place);
        }
        batch = made.first(batch);
        while own.iter().any(|number| has.contains(&pair(*number, batch))) {
            batch = made.first(batch + 1);
        }
        made.push(batch, *row, batch_size);
        has.extend(own.iter().map(|number| pair(*number, batch)));
    }
    let mut end = 0;
    let ends = made.rows.iter().map(|rows| {
        end += rows.len() as u64;
        end
    });
    let ends = ends.collect();
    Ok(Batches { rows: made.rows.concat(), ends })
}

/// A value and a batch as one key.
fn pair(number: u32, batch: u32) -> u64 {
    u64::from(number) << 32 | u64::from(batch)
}

/// The batches so far.
#[derive(Default)]
struct Open {
    rows: Vec<Vec<u64>>,
    /// For a full batch one that comes after it, itself for one with room.
    next: Vec<u32>,
}

impl Open {
    /// The first batch with room from `batch` on: perhaps the one that is still to be made.
    fn first(&mut self, batch: u32) -> u32 {
        let mut found = batch;
        while let Some(next) = self.next.get(found as usize).filter(|next| **next != found) {
            found = *next;
        }
        let mut at = batch;
        while at != found {
            let Some(next) = self.next.get_mut(at as usize) else { break };
            at = std::mem::replace(next, found);
        }
        found
    }

    fn push(&mut self, batch: u32, row: u64, size: usize) {
        if self.rows.len() == batch as usize {
            self.rows.push(Vec::with_capacity(size.min(1 << 16)));
            self.next.push(batch);
        }
        let (rows, next) = (self.rows.get_mut(batch as usize), self.next.get_mut(batch as usize));
        if let (Some(rows), Some(next)) = (rows, next) {
            rows.push(row);
            if rows.len() == size {
                *next = batch + 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::draw;

    /// One batch after the other, each from all rows that are left.
    fn naive(keys: &[u64], columns: usize, order: &[u64], size: usize) -> Batches {
        let mut left = order.to_vec();
        let (mut rows, mut ends) = (Vec::new(), Vec::new());
        while !left.is_empty() {
            let mut over = Vec::new();
            let mut seen: HashSet<u64> = HashSet::new();
            let start = rows.len();
            for row in left {
                let values = &keys[row as usize * columns..][..columns];
                if rows.len() - start == size || values.iter().any(|v| seen.contains(v)) {
                    over.push(row);
                } else {
                    rows.push(row);
                    seen.extend(values);
                }
            }
            ends.push(rows.len() as u64);
            left = over;
        }
        Batches { rows, ends }
    }

    #[test]
    fn batches_are_those_of_filling_one_after_the_other() {
        for (n, columns, distinct, size) in [
            (200, 2, 1_000, 16),
            (200, 2, 40, 16),
            (300, 3, 60, 7),
            (64, 1, 2, 8),
            (50, 2, 1, 4),
            (0, 2, 5, 4),
            (90, 2, 30, 1),
            (40, 2, 400, 64),
        ] {
            for seed in 0..5 {
                let keys: Vec<u64> = (0..n * columns).map(|i| draw(seed, i) % distinct).collect();
                let mut order: Vec<u64> = (0..n).collect();
                order.sort_by_key(|i| draw(seed + 100, *i));
                let got = first_fit(&Job::new(), &keys, columns as usize, &order, size).unwrap();
                assert_eq!(got, naive(&keys, columns as usize, &order, size));
            }
        }
    }

    #[test]
    fn one_value_in_every_row_takes_linear_time() {
        let keys = vec![7; 200_000];
        let order: Vec<u64> = (0..200_000).collect();
        let got = first_fit(&Job::new(), &keys, 1, &order, 64).unwrap();
        assert_eq!(got.ends.len(), 200_000);
    }

    #[test]
    fn refuses_what_is_no_table() {
        let job = Job::new();
        assert!(first_fit(&job, &[1, 2, 3], 2, &[0], 4).is_err());
        assert!(first_fit(&job, &[1, 2], 0, &[0], 4).is_err());
        assert!(first_fit(&job, &[1, 2], 1, &[0], 0).is_err());
        assert!(first_fit(&job, &[1, 2], 1, &[2], 4).is_err());
    }
}
