//! Near-duplicate clusters: sketch every text once, let LSH propose, let exact Jaccard decide.
//!
//! 1. Per text: normalise, hash the result (128 bits), shingle, MinHash, one key per band.
//! 2. Texts with one normalised form are one; the form with the smallest raw hash stands for it.
//! 3. Greedy stars: forms in the order (longer first, then hash); a form joins the most similar
//!    earlier representative with which it shares a band and whose Jaccard similarity reaches the
//!    threshold, else it becomes a representative. Only representatives stay in the buckets, so a
//!    hundred thousand variants of one text cost one comparison each.
//!
//! The order depends on the texts alone, so neither the input order nor the threads show in the
//! clusters. Of representatives with company in a bucket the high halves of the shingles are kept
//! (4 bytes each): what they share bounds the similarity from above and settles most proposals; the
//! rest are shingled again. Texts without a visible character never cluster.

use crate::minhash::{Bands, Signer};
use crate::shingle::{ShingleParams, Shingler, jaccard};
use embkit_core::{Error, Job, Result, TextShard, Texts, hash128, par};

/// Marks a text that shares no key in a band, and the end of a bucket's list.
const NONE: u32 = u32::MAX;
const SKETCH_BLOCK: usize = 512;
/// Forms verified against frozen representatives at a time; the rest of the greedy pass is serial.
const GREEDY_BLOCK: usize = 4096;

/// What counts as a near-duplicate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DedupParams {
    /// Least Jaccard similarity to the representative, in `(0, 1]`.
    pub threshold: f64,
    /// Seed of the MinHash functions; changes which pairs are proposed, never what is a duplicate.
    pub seed: u64,
    /// Units per shingle.
    pub shingle: ShingleParams,
    /// Threads, 0 for all; no effect on the result.
    pub threads: usize,
}

impl Default for DedupParams {
    fn default() -> Self {
        Self { threshold: 0.8, seed: 0, shingle: ShingleParams::default(), threads: 0 }
    }
}

impl DedupParams {
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return Err(Error::usage(
                format!("near-duplicate threshold {}", self.threshold),
                "Give a Jaccard similarity above 0 and at most 1 (default 0.8)",
            ));
        }
        self.shingle.check()
    }
}

/// Star clusters, one entry per row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Clusters {
    /// Row of the cluster's representative; a text alone is its own.
    pub representative: Vec<u64>,
    /// Jaccard similarity to the representative; 1 for itself and for equal normalised text.
    pub similarity: Vec<f32>,
    /// Pairs of distinct normalised texts that LSH proposed and that were checked.
    pub checked: u64,
}

/// What is kept per text after the first pass.
#[derive(Default)]
struct Sketches {
    form: Vec<u128>,  // hash of the normalised text
    raw: Vec<u128>,   // hash of the text as it came
    length: Vec<u64>, // normalised bytes, 0 for an empty text
    shingles: Vec<u32>,
    keys: Vec<u64>, // `bands` per text
}

/// Groups rows whose texts are near-duplicates.
///
/// `job` advances by one per row in the first pass (most of the work); the total is the number of
/// rows. Errors: [`Error::Usage`] for parameters out of range, 2^32 rows or more, or text that is
/// not UTF-8; [`Error::Cancelled`].
pub fn near_duplicates(shards: &[TextShard], params: &DedupParams, job: &Job) -> Result<Clusters> {
    params.check()?;
    let texts = Texts::new(shards)?;
    if texts.len() >= NONE as usize {
        return Err(Error::usage(
            format!("{} texts in one call", texts.len()),
            "Split the texts into parts of fewer than 2^32 rows",
        ));
    }
    let bands = Bands::for_threshold(params.threshold);
    let mut sketches = sketch(&texts, bands, params, job)?;

    let mut clusters = Clusters {
        representative: (0..texts.len() as u64).collect(),
        similarity: vec![1.0; texts.len()],
        checked: 0,
    };
    let leader = exact(&sketches, &mut clusters.representative);
    let buckets = Buckets::new(&sketches, &leader, bands.bands, params.threads, job)?;
    sketches.keys = Vec::new(); // most of the memory, and not read again
    let stars = Greedy { texts: &texts, sketches: &sketches, leader: &leader, buckets, params };
    let joined = stars.run(&mut clusters.checked, job)?;

    // Copies of a form follow their leader to its representative.
    let mut star: Vec<Option<(u32, f64)>> = vec![None; texts.len()];
    for (&row, edge) in leader.iter().zip(joined) {
        star[row as usize] = edge;
    }
    for row in 0..texts.len() {
        if let Some((to, similarity)) = star[clusters.representative[row] as usize] {
            clusters.representative[row] = u64::from(to);
            clusters.similarity[row] = similarity as f32;
        }
    }
    Ok(clusters)
}

fn sketch(texts: &Texts, bands: Bands, params: &DedupParams, job: &Job) -> Result<Sketches> {
    let parts = par::try_map_blocks(texts.len(), SKETCH_BLOCK, params.threads, |range| {
        let mut out = Sketches::default();
        let (mut shingler, mut signer) =
            (Shingler::new(params.shingle), Signer::new(bands, params.seed));
        let mut set = Vec::new();
        out.keys.reserve_exact(range.len() * bands.bands);
        for row in range {
            job.check()?;
            let text = texts.str(row)?;
            let norm = shingler.shingles(text, &mut set);
            out.form.push(hash128(norm));
            out.length.push(norm.len() as u64);
            out.raw.push(hash128(text.as_bytes()));
            out.shingles.push(u32::try_from(set.len()).unwrap_or(u32::MAX));
            signer.keys(&set, &mut out.keys);
            job.advance(1);
        }
        Ok(out)
    })?;
    let mut all = Sketches::default();
    all.keys.reserve_exact(texts.len() * bands.bands);
    for mut part in parts {
        all.form.append(&mut part.form);
        all.raw.append(&mut part.raw);
        all.length.append(&mut part.length);
        all.shingles.append(&mut part.shingles);
        all.keys.append(&mut part.keys);
    }
    Ok(all)
}

/// Points equal forms at one leader; returns the leaders in greedy order.
fn exact(sketches: &Sketches, representative: &mut [u64]) -> Vec<u32> {
    let at = |row: u32| row as usize;
    let mut rows: Vec<u32> =
        (0..representative.len() as u32).filter(|&row| sketches.length[at(row)] > 0).collect();
    rows.sort_unstable_by_key(|&row| (sketches.form[at(row)], sketches.raw[at(row)], row));
    let mut leader: Vec<u32> = Vec::with_capacity(rows.len());
    for row in rows {
        match leader.last() {
            Some(&first) if sketches.form[at(first)] == sketches.form[at(row)] => {
                representative[at(row)] = u64::from(first);
            }
            _ => leader.push(row),
        }
    }
    leader.sort_unstable_by_key(|&row| {
        (std::cmp::Reverse(sketches.length[at(row)]), sketches.form[at(row)])
    });
    leader
}

/// Per band, the bucket of each form: dense numbers for keys that occur twice, else [`NONE`].
struct Buckets {
    forms: usize,
    bucket: Vec<Vec<u32>>,
    count: Vec<usize>,
}

impl Buckets {
    fn new(
        sketches: &Sketches,
        leader: &[u32],
        bands: usize,
        threads: usize,
        job: &Job,
    ) -> Result<Self> {
        let per_band = par::try_map_blocks(bands, 1, threads, |band| {
            job.check()?;
            let band = band.start;
            let key = |&row: &u32| sketches.keys[row as usize * bands + band];
            let mut order: Vec<(u64, u32)> =
                leader.iter().enumerate().map(|(p, row)| (key(row), p as u32)).collect();
            order.sort_unstable();
            let mut bucket = vec![NONE; leader.len()];
            let mut count = 0;
            for same in order.chunk_by(|a, b| a.0 == b.0).filter(|same| same.len() > 1) {
                same.iter().for_each(|&(_, p)| bucket[p as usize] = count);
                count += 1;
            }
            Ok((bucket, count as usize))
        })?;
        let (bucket, count) = per_band.into_iter().unzip();
        Ok(Self { forms: leader.len(), bucket, count })
    }
}

struct Greedy<'a> {
    texts: &'a Texts<'a>,
    sketches: &'a Sketches,
    leader: &'a [u32],
    buckets: Buckets,
    params: &'a DedupParams,
}

/// The representatives seen so far: one linked list per bucket, newest first, and for those in any
/// bucket the sorted high halves of their shingles, one after the other.
struct Lists {
    head: Vec<Vec<u32>>,
    next: Vec<Vec<u32>>,
    halves: Vec<u32>,
    start: Vec<usize>, // per form; its length is its number of shingles
}

/// What the parallel part finds for one form: its set (if any bucket has company), its best frozen
/// representative and how many were checked.
type Frozen = (Option<Vec<u64>>, Option<(u32, f64)>, u64);

impl Greedy<'_> {
    /// For each form in greedy order: the row and similarity of the representative it joins.
    fn run(&self, checked: &mut u64, job: &Job) -> Result<Vec<Option<(u32, f64)>>> {
        let forms = self.buckets.forms;
        let mut lists = Lists {
            head: self.buckets.count.iter().map(|&n| vec![NONE; n]).collect(),
            next: self.buckets.count.iter().map(|_| vec![NONE; forms]).collect(),
            halves: Vec::new(),
            start: vec![0; forms],
        };
        let mut joined = Vec::with_capacity(forms);
        let mut candidates = Vec::new();
        for start in (0..forms).step_by(GREEDY_BLOCK) {
            let end = forms.min(start + GREEDY_BLOCK);
            let frozen = self.against_frozen(start, end, &lists, job)?;
            // Representatives made inside this block precede later forms of it, too.
            for (p, (set, best, seen)) in (start as u32..).zip(&frozen) {
                job.check()?;
                *checked += seen;
                let mut best = *best;
                if let Some(set) = set {
                    self.candidates(p, start as u32, &lists, &mut candidates);
                    *checked += candidates.len() as u64;
                    for &q in &candidates {
                        if let Some((Some(other), ..)) = frozen.get(q as usize - start) {
                            self.improve(q, jaccard(set, other), &mut best);
                        }
                    }
                }
                if let (None, Some(set)) = (best, set) {
                    self.insert(p, set, &mut lists);
                }
                joined.push(best.map(|(q, similarity)| (self.leader[q as usize], similarity)));
            }
        }
        Ok(joined)
    }

    fn against_frozen(
        &self,
        start: usize,
        end: usize,
        lists: &Lists,
        job: &Job,
    ) -> Result<Vec<Frozen>> {
        let parts = par::try_map_blocks(end - start, 64, self.params.threads, |range| {
            let mut shingler = Shingler::new(self.params.shingle);
            let (mut candidates, mut other) = (Vec::new(), Vec::new());
            let mut out: Vec<Frozen> = Vec::with_capacity(range.len());
            for p in range.start + start..range.end + start {
                job.check()?;
                if self.buckets.bucket.iter().all(|bucket| bucket[p] == NONE) {
                    out.push((None, None, 0));
                    continue;
                }
                let mut set = Vec::new();
                shingler.shingles(self.text(p as u32)?, &mut set);
                self.candidates(p as u32, 0, lists, &mut candidates);
                let mut best = None;
                for &q in &candidates {
                    job.check()?;
                    let other_len = self.shingles(q);
                    let kept = &lists.halves[lists.start[q as usize]..][..other_len];
                    if self.can_reach(&set, kept) {
                        shingler.shingles(self.text(q)?, &mut other);
                        self.improve(q, jaccard(&set, &other), &mut best);
                    }
                }
                out.push((Some(set), best, candidates.len() as u64));
            }
            Ok(out)
        })?;
        Ok(parts.into_iter().flatten().collect())
    }

    fn text(&self, p: u32) -> Result<&str> {
        self.texts.str(self.leader[p as usize] as usize)
    }

    /// Representatives at or after `from` that share a bucket with `p`, in greedy order.
    fn candidates(&self, p: u32, from: u32, lists: &Lists, out: &mut Vec<u32>) {
        out.clear();
        for ((bucket, head), next) in self.buckets.bucket.iter().zip(&lists.head).zip(&lists.next) {
            let bucket = bucket[p as usize];
            let mut q = if bucket == NONE { NONE } else { head[bucket as usize] };
            while q != NONE && q >= from {
                out.push(q);
                q = next[q as usize];
            }
        }
        out.sort_unstable();
        out.dedup();
    }

    fn shingles(&self, p: u32) -> usize {
        self.sketches.shingles[self.leader[p as usize] as usize] as usize
    }

    /// Whether two sets may reach the threshold, by size (J <= smaller / larger) and then by the
    /// high halves in common, which are at least as many as the shingles in common.
    fn can_reach(&self, set: &[u64], halves: &[u32]) -> bool {
        let (a, b) = (set.len(), halves.len());
        let enough =
            |shared: usize, all: usize| shared as f64 / all as f64 >= self.params.threshold;
        if !enough(a.min(b), a.max(b)) {
            return false;
        }
        let (mut i, mut j, mut shared) = (0, 0, 0);
        while let (Some(x), Some(y)) = (set.get(i), halves.get(j)) {
            let x = (x >> 32) as u32;
            shared += usize::from(x == *y);
            i += usize::from(x <= *y);
            j += usize::from(*y <= x);
        }
        enough(shared, a + b - shared)
    }

    /// Keeps the most similar representative that reaches the threshold, the earlier one on a tie.
    fn improve(&self, q: u32, similarity: f64, best: &mut Option<(u32, f64)>) {
        let better = best.is_none_or(|(_, so_far)| similarity > so_far);
        if similarity >= self.params.threshold && better {
            *best = Some((q, similarity));
        }
    }

    fn insert(&self, p: u32, set: &[u64], lists: &mut Lists) {
        lists.start[p as usize] = lists.halves.len();
        lists.halves.extend(set.iter().map(|x| (x >> 32) as u32));
        for ((bucket, head), next) in
            self.buckets.bucket.iter().zip(&mut lists.head).zip(&mut lists.next)
        {
            let bucket = bucket[p as usize];
            if bucket != NONE {
                next[p as usize] = std::mem::replace(&mut head[bucket as usize], p);
            }
        }
    }
}
