//! Stars left alone although a member of another star resembles them.
//!
//! Greedy compares with representatives only, so a form whose likes have all joined others ends
//! alone. Each such form, in order, is given the company of the member that costs least: of one that
//! leads meanwhile, else of a star of two (its member becomes the representative of all three), else
//! of the smallest star (its member leaves, and the earlier of the two leads). Large stars lose no
//! member: that would part more similar pairs than it joins.

use super::sketch::Buckets;
use super::spill::Sorter;
use super::{MEMBERS, Pass, Star};
use crate::shingle::{Shingler, jaccard};
use embkit_core::{Job, Result, par};

/// Forms at most of a star that may lose a member. The lower the threshold, the fewer of its star's
/// forms is a member similar to: measured on real text, this keeps both pair recall above 0.98 and
/// flag recall above 0.995.
pub(crate) fn largest(threshold: f64) -> u32 {
    (4.0 / threshold.powi(5)).min(64.0) as u32
}

/// Pairs verified between two rounds of decisions.
const BATCH: usize = 1 << 14;

/// Finds company for stars of one form; returns how many pairs were checked.
pub(super) fn run(
    pass: &Pass,
    buckets: &mut Buckets,
    stars: &mut [Star],
    job: &Job,
) -> Result<u64> {
    let room = pass.room;
    let parts = 16.min(pass.order.len().max(1));
    let mut pairs = Sorter::new(parts, room.share(4), room.dir.clone(), pass.params.threads);
    let mut members = Vec::new();
    buckets.each(|_, rows| {
        job.check()?;
        let alone = |row: u32| stars[row as usize].size == 1;
        members.clear();
        members.extend(
            rows.iter()
                .filter(|row| !pass.leads(stars, **row))
                .map(|row| pass.position[*row as usize]),
        );
        if members.len() > MEMBERS {
            members.select_nth_unstable(MEMBERS);
            members.truncate(MEMBERS);
        }
        for row in rows.iter().filter(|row| alone(**row)) {
            let position = pass.position[*row as usize];
            for &member in &members {
                let part = position as usize * parts / pass.order.len();
                pairs.push(part, u64::from(position) << 32 | u64::from(member), job)?;
            }
        }
        Ok(())
    })?;

    let (mut batch, mut last, mut checked) = (Vec::new(), None, 0);
    pairs.each(job, |_, pair| {
        if last == Some(pair) {
            return Ok(());
        }
        // A form's pairs stay together: it chooses among all of them.
        if batch.len() >= BATCH && last.is_some_and(|last| last >> 32 != pair >> 32) {
            decide(pass, &verify(pass, &batch, job)?, stars);
            batch.clear();
        }
        last = Some(pair);
        batch.push(pair);
        checked += 1;
        Ok(())
    })?;
    decide(pass, &verify(pass, &batch, job)?, stars);
    Ok(checked)
}

/// Of sorted `pairs` (position alone, position of a member) those that reach the threshold.
fn verify(pass: &Pass, pairs: &[u64], job: &Job) -> Result<Vec<(u32, u32, f64)>> {
    let groups: Vec<&[u64]> = pairs.chunk_by(|a, b| a >> 32 == b >> 32).collect();
    let found = par::try_map_blocks(groups.len(), 32, pass.params.threads, |range| {
        let mut shingler = Shingler::new(pass.params.shingle);
        let (mut set, mut other, mut out) = (Vec::new(), Vec::new(), Vec::new());
        for group in &groups[range] {
            let alone = (group[0] >> 32) as u32;
            shingler.shingles(pass.text(alone)?, &mut set);
            for pair in *group {
                job.check()?;
                shingler.shingles(pass.text(*pair as u32)?, &mut other);
                let similarity = jaccard(&set, &other);
                if similarity >= pass.params.threshold {
                    out.push((alone, *pair as u32, similarity));
                }
            }
        }
        Ok(out)
    })?;
    Ok(found.into_iter().flatten().collect())
}

/// Gives each form of the sorted `found` the company that costs least.
fn decide(pass: &Pass, found: &[(u32, u32, f64)], stars: &mut [Star]) {
    let largest = largest(pass.params.threshold);
    for group in found.chunk_by(|a, b| a.0 == b.0) {
        let alone = pass.row(group[0].0);
        let cost = |member: u32| {
            let star = stars[member as usize].leader;
            let worse = pass.priority(member) > pass.priority(alone)
                || pass.priority(member) > pass.priority(star);
            match stars[star as usize].size {
                _ if star == member => (!worse).then_some(0),
                2 => (!worse).then_some(2),
                size => (size <= largest).then_some(size),
            }
        };
        let best = group
            .iter()
            .filter_map(|&(_, position, similarity)| {
                Some((cost(pass.row(position))?, position, similarity))
            })
            .min_by_key(|(cost, position, _)| (*cost, *position));
        let Some((cost, position, similarity)) = best else { continue };
        let member = pass.row(position);
        let Star { leader: old, similarity: edge, .. } = stars[member as usize];
        let mut set = |row: u32, leader: u32, similarity: f32, size: u32| {
            stars[row as usize] = Star { leader, similarity, size };
        };
        let similarity = similarity as f32;
        match cost {
            0 => {
                set(alone, member, similarity, 0);
                stars[member as usize].size += 1;
            }
            2 => {
                set(old, member, edge, 0);
                set(alone, member, similarity, 0);
                set(member, member, 1.0, 3);
            }
            _ => {
                let (leader, other) =
                    if position < group[0].0 { (member, alone) } else { (alone, member) };
                set(leader, leader, 1.0, 2);
                set(other, leader, similarity, 0);
                stars[old as usize].size -= 1;
            }
        }
    }
}
