//! Greedy stars: each form in order joins the first representative it resembles, or becomes one.
//!
//! Forms are taken in segments whose buckets fit the room (one segment without a cap). What a bucket
//! has learnt in a segment, its representatives, is handed to the next segment with a member of it.

use super::sketch::Buckets;
use super::spill::{Log, Sorter};
use super::{LIST, NONE, Pass};
use crate::shingle::{Shingler, jaccard};
use embkit_core::{Job, Result, par};

/// Forms, for each thread, that are compared with the representatives before them in one go; with
/// each other they are compared by one thread. No effect on the result.
const BLOCK: usize = 256;
/// Forms at most, and bytes of their texts, whose sets are held at a time.
const MOST: usize = 4096;
const BLOCK_BYTES: usize = 8 << 20;
/// Segments at most (a few more where large forms fill one early).
const SEGMENTS: u64 = 200;

/// A representative: its place in the order and where its halves lie, if they are kept.
struct Star {
    position: u32,
    halves: Option<(usize, usize)>,
}

/// What one segment knows: per bucket a linked list of representatives (indices into `stars`,
/// which is in order), and the high halves of their shingles.
struct Segment {
    /// The buckets by number, or `None` where every bucket is here.
    buckets: Option<Vec<u32>>,
    head: Vec<u32>,
    length: Vec<u8>,
    next: Vec<(u32, u32)>,
    stars: Vec<Star>,
    halves: Vec<u32>,
}

/// One form of a block: its set, the star that it joins (of those before the block), how many were
/// checked.
type Frozen = (Vec<u64>, Option<(u32, f64)>, u64);

/// Joins forms to stars; `joined(row, representative row, similarity)` for each member, in order.
pub(super) fn run(
    pass: &Pass,
    buckets: &mut Buckets,
    mut joined: impl FnMut(u32, u32, f64),
    job: &Job,
) -> Result<u64> {
    let (forms, room) = (pass.order.len(), pass.room);
    let parts = 16.min(forms.max(1));
    let mut records = Sorter::new(parts, room.share(4), room.dir.clone(), pass.params.threads);
    let mut cost = vec![0u32; forms];
    buckets.each(|bucket, rows| {
        job.check()?;
        rows.iter_mut().for_each(|row| *row = pass.position[*row as usize]);
        rows.sort_unstable();
        for (rank, &position) in rows.iter().enumerate() {
            let cost = &mut cost[position as usize];
            *cost = cost.saturating_add(24 + 8 * rank.min(LIST) as u32);
            let part = position as usize * parts / forms;
            records.push(part, u64::from(position) << 32 | u64::from(bucket), job)?;
        }
        Ok(())
    })?;

    // Segments: how many forms, so that their cost stays below a quarter of the room. Each keeps two
    // files open, which bounds their number.
    let (mut ends, mut sum) = (Vec::new(), 0usize);
    let all: u64 = cost.iter().map(|cost| u64::from(*cost)).sum();
    let least = usize::try_from(all / SEGMENTS).unwrap_or(usize::MAX);
    let most = room.share(4).max(least);
    for (position, cost) in cost.iter().enumerate() {
        sum = sum.saturating_add(*cost as usize);
        if sum > most && position > 0 {
            ends.push(position as u32);
            sum = *cost as usize;
        }
    }
    drop(cost);
    ends.push(forms as u32);
    let mut routes = Routes::new(pass, buckets, &ends)?;

    let (mut segment, mut number, mut checked) = (Vec::new(), 0, 0);
    records.each(job, |_, record| {
        while (record >> 32) as u32 >= ends[number] {
            checked +=
                process(pass, &segment, number, &mut routes, buckets.count, &mut joined, job)?;
            segment.clear();
            number += 1;
        }
        segment.push(record);
        Ok(())
    })?;
    checked += process(pass, &segment, number, &mut routes, buckets.count, &mut joined, job)?;
    Ok(checked)
}

/// Which buckets go on from segment to segment, and what arrived; empty for one segment.
struct Routes {
    /// Per segment, `bucket << 32 | next segment with a member`.
    onward: Vec<Log<u64>>,
    /// Per segment, `bucket << 32 | position of a representative`.
    inbox: Vec<Log<u64>>,
}

impl Routes {
    fn new(pass: &Pass, buckets: &mut Buckets, ends: &[u32]) -> Result<Self> {
        if ends.len() == 1 {
            return Ok(Self { onward: Vec::new(), inbox: Vec::new() });
        }
        let room = (pass.room.share(8) / (2 * ends.len())).max(64);
        let logs = || ends.iter().map(|_| Log::new(room, pass.room.dir.clone())).collect();
        let mut out = Self { onward: logs(), inbox: logs() };
        buckets.each(|bucket, rows| {
            let of = |row: &mut u32| {
                let position = pass.position[*row as usize];
                *row = ends.partition_point(|end| *end <= position) as u32;
            };
            rows.iter_mut().for_each(of);
            rows.sort_unstable();
            rows.dedup();
            for hop in rows.windows(2) {
                let record = u64::from(bucket) << 32 | u64::from(hop[1]);
                out.onward[hop[0] as usize].push(record)?;
            }
            Ok(())
        })?;
        Ok(out)
    }
}

/// Takes the forms of one segment (`position << 32 | bucket`, sorted) through the buckets.
fn process(
    pass: &Pass,
    records: &[u64],
    number: usize,
    routes: &mut Routes,
    count: u32,
    joined: &mut impl FnMut(u32, u32, f64),
    job: &Job,
) -> Result<u64> {
    let mut segment = Segment::new(records, number, routes, count)?;
    let forms: Vec<&[u64]> = records.chunk_by(|a, b| a >> 32 == b >> 32).collect();
    let threads = if pass.params.threads == 0 { par::threads() } else { pass.params.threads };
    let most = (BLOCK * threads).min(MOST);
    let (mut checked, mut start) = (0, 0);
    while start < forms.len() {
        let (mut end, mut bytes) = (start, 0);
        while end < forms.len() && end - start < most && bytes < BLOCK_BYTES {
            bytes += pass.text(position(forms[end]))?.len();
            end += 1;
        }
        let block = &forms[start..end];
        start = end;
        let frozen = segment.against_frozen(pass, block, job)?;
        let first = segment.stars.len() as u32;
        // Stars made inside this block come before later forms of it, too.
        let (mut sets, mut candidates) = (Vec::new(), Vec::new());
        for (form, (set, mut best, seen)) in block.iter().zip(frozen) {
            job.check()?;
            checked += seen;
            if best.is_none() {
                segment.candidates(form, first, &mut candidates);
                for &star in &candidates {
                    checked += 1;
                    let other: &Vec<u64> = &sets[(star - first) as usize];
                    let similarity = jaccard(&set, other);
                    if similarity >= pass.params.threshold {
                        best = Some((star, similarity));
                        break;
                    }
                }
            }
            let position = position(form);
            match best {
                Some((star, similarity)) => {
                    let star = segment.stars[star as usize].position;
                    joined(pass.row(position), pass.row(star), similarity);
                }
                None => {
                    segment.insert(form, &set, pass);
                    sets.push(set);
                }
            }
        }
    }
    if let Some(onward) = routes.onward.get_mut(number) {
        let inbox = &mut routes.inbox;
        onward.each(|record| {
            let (bucket, to) = (record >> 32, record as u32 as usize);
            segment.list(bucket as u32, |star| {
                inbox[to].push(bucket << 32 | u64::from(segment.stars[star as usize].position))
            })
        })?;
    }
    Ok(checked)
}

fn position(form: &[u64]) -> u32 {
    form.first().map_or(NONE, |record| (record >> 32) as u32)
}

impl Segment {
    fn new(records: &[u64], number: usize, routes: &mut Routes, count: u32) -> Result<Self> {
        let mut out = Self {
            buckets: None,
            head: Vec::new(),
            length: Vec::new(),
            next: Vec::new(),
            stars: Vec::new(),
            halves: Vec::new(),
        };
        let Some(inbox) = routes.inbox.get_mut(number) else {
            out.head = vec![NONE; count as usize];
            out.length = vec![0; count as usize];
            return Ok(out);
        };
        let mut buckets: Vec<u32> = records.iter().map(|record| *record as u32).collect();
        buckets.sort_unstable();
        buckets.dedup();
        out.head = vec![NONE; buckets.len()];
        out.length = vec![0; buckets.len()];
        out.buckets = Some(buckets);
        let mut arrived = Vec::new();
        inbox.each(|record| {
            arrived.push((record as u32, (record >> 32) as u32));
            Ok(())
        })?;
        arrived.sort_unstable();
        for same in arrived.chunk_by(|a, b| a.0 == b.0) {
            let star = out.stars.len() as u32;
            out.stars.push(Star { position: same[0].0, halves: None });
            same.iter().for_each(|(_, bucket)| out.append(*bucket, star));
        }
        *inbox = Log::new(0, None); // read, and its file with it
        Ok(out)
    }

    fn bucket(&self, number: u32) -> usize {
        match &self.buckets {
            None => number as usize,
            // Present: the records named it, and nothing is sent to a segment without a member.
            Some(all) => all.binary_search(&number).unwrap_or(0),
        }
    }

    /// Adds a star to a bucket, unless the bucket is full.
    fn append(&mut self, bucket: u32, star: u32) {
        let at = self.bucket(bucket);
        if usize::from(self.length[at]) < LIST {
            self.length[at] += 1;
            let before = std::mem::replace(&mut self.head[at], self.next.len() as u32);
            self.next.push((star, before));
        }
    }

    /// Calls `f` with the stars of a bucket, latest first.
    fn list(&self, bucket: u32, mut f: impl FnMut(u32) -> Result<()>) -> Result<()> {
        let mut at = self.head[self.bucket(bucket)];
        while let Some(&(star, before)) = self.next.get(at as usize) {
            f(star)?;
            at = before;
        }
        Ok(())
    }

    /// Stars at or after `from` that share a bucket with the form, in order.
    fn candidates(&self, form: &[u64], from: u32, out: &mut Vec<u32>) {
        out.clear();
        for &record in form {
            let mut at = self.head[self.bucket(record as u32)];
            while let Some(&(star, before)) = self.next.get(at as usize)
                && star >= from
            {
                out.push(star);
                at = before;
            }
        }
        out.sort_unstable();
        out.dedup();
    }

    fn against_frozen(&self, pass: &Pass, block: &[&[u64]], job: &Job) -> Result<Vec<Frozen>> {
        let parts = par::try_map_blocks(block.len(), 64, pass.params.threads, |range| {
            let mut shingler = Shingler::new(pass.params.shingle);
            let (mut candidates, mut other) = (Vec::new(), Vec::new());
            let mut out = Vec::with_capacity(range.len());
            for form in &block[range] {
                job.check()?;
                let mut set = Vec::new();
                shingler.shingles(pass.text(position(form))?, &mut set);
                self.candidates(form, 0, &mut candidates);
                let (mut best, mut seen) = (None, 0);
                for &candidate in &candidates {
                    job.check()?;
                    seen += 1;
                    let star = &self.stars[candidate as usize];
                    if let Some((from, length)) = star.halves
                        && !pass.can_reach(&set, &self.halves[from..from + length])
                    {
                        continue;
                    }
                    shingler.shingles(pass.text(star.position)?, &mut other);
                    let similarity = jaccard(&set, &other);
                    if similarity >= pass.params.threshold {
                        best = Some((candidate, similarity));
                        break;
                    }
                }
                out.push((set, best, seen));
            }
            Ok(out)
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    fn insert(&mut self, form: &[u64], set: &[u64], pass: &Pass) {
        let fits = (self.halves.len() + set.len()).saturating_mul(8) <= pass.room.share(4);
        let halves = fits.then_some((self.halves.len(), set.len()));
        if fits {
            self.halves.extend(set.iter().map(|x| (x >> 32) as u32));
        }
        let star = self.stars.len() as u32;
        self.stars.push(Star { position: position(form), halves });
        form.iter().for_each(|record| self.append(*record as u32, star));
    }
}
