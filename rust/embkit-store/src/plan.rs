//! The plan: which examples are the batch of a step, as a pure function of (seed, step).
//!
//! Tasks: steps come in blocks of K. Inside a block each task has the number of steps that its
//! weight gives by largest remainder, in an order that a keyed permutation deals; so the number of
//! a task's batches before any step is a sum in closed form, and nothing is replayed on resume.
//! Rows: a task's epoch is a keyed permutation of its examples, cut into whole batches (the rest of
//! an epoch is dropped, another rest each epoch); a task's batch number alone gives epoch and
//! place.
//!
//! When tasks may run out ([`Exhausted`]) the mixture changes only between blocks, in at most two
//! segments per task, which are computed once.

mod keys;

use embkit_core::permute::Feistel;
use embkit_core::{Error, Result};

pub(crate) use keys::sample;
pub use keys::{Part as KeyPart, draw, key_of};

/// Steps of a block; more when a task's weight asks for less than one in a block.
const BLOCK: u64 = 32;
const MAX_BLOCK: u64 = 4096;

/// What the plan knows of a task.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Unique; draws depend on it, not on the order of the tasks.
    pub name: String,
    /// Number of usable examples.
    pub examples: u64,
    /// Share of the steps, any scale; a task of weight 0 never comes.
    pub weight: f64,
    /// Examples of one of its batches.
    pub batch_size: u64,
}

/// What happens to a task whose epochs are used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exhausted {
    /// It starts its next epoch, for ever.
    Repeat,
    /// After so many epochs it leaves the mixture; the others share its steps by their weights. The
    /// plan ends with the last task.
    Drop(u64),
    /// The plan ends with the last block in which every task still has its steps of so many
    /// epochs.
    Stop(u64),
}

/// Which batch a step takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Counted from 0.
    pub step: u64,
    /// Index of the task.
    pub task: usize,
    /// Batches of this task before.
    pub ordinal: u64,
    /// Passes over the task's examples that are complete.
    pub epoch: u64,
    /// Batches of this task before in this epoch.
    pub place: u64,
}

/// Blocks of one mixture.
#[derive(Clone, Debug)]
struct Segment {
    first_step: u64,
    first_block: u64,
    /// Steps of each task in a block, and their sum.
    counts: Vec<u64>,
    block: u64,
    /// Batches of each task before the segment.
    before: Vec<u64>,
}

/// The plan of a run.
#[derive(Clone, Debug)]
pub struct Plan {
    seed: i64,
    tasks: Vec<Task>,
    segments: Vec<Segment>,
    steps: Option<u64>,
}

impl Plan {
    /// A plan over `tasks`, one batch of one task a step.
    ///
    /// Errors: `Usage` for no task of weight, a negative weight, a task smaller than a batch, a
    /// share below one in 4,096 steps, or [`Exhausted::Stop`] that leaves no whole block.
    pub fn new(seed: i64, tasks: Vec<Task>, exhausted: Exhausted) -> Result<Self> {
        if tasks.iter().any(|t| t.batch_size == 0) {
            return Err(Error::usage("batch_size is 0", "Give a whole number from 1"));
        }
        let total: f64 = tasks.iter().map(|t| t.weight).sum();
        let sound = tasks.iter().all(|t| t.weight >= 0.0 && t.weight.is_finite());
        if !sound || total.is_nan() || total <= 0.0 {
            let found: Vec<String> =
                tasks.iter().map(|t| format!("{} = {}", t.name, t.weight)).collect();
            return Err(Error::usage(
                format!("the task weights leave nothing to train on: {}", found.join(", ")),
                "Give each task a weight of 0 or more, and at least one above 0",
            ));
        }
        if let Some(t) = tasks.iter().find(|t| t.weight > 0.0 && t.examples < t.batch_size) {
            return Err(Error::usage(
                format!(
                    "task '{}' has {} usable examples, fewer than a batch of {}",
                    t.name, t.examples, t.batch_size
                ),
                format!("Set batch_size to {} or less, or give the task weight 0", t.examples),
            ));
        }
        let mut plan = Self { seed, tasks, segments: Vec::new(), steps: None };
        plan.lay_out(exhausted)?;
        Ok(plan)
    }

    /// Fills `segments` and `steps`.
    fn lay_out(&mut self, exhausted: Exhausted) -> Result<()> {
        let epochs = match exhausted {
            Exhausted::Repeat => u64::MAX,
            Exhausted::Drop(epochs) | Exhausted::Stop(epochs) => epochs,
        };
        let whole = |t: &Task| (t.examples / t.batch_size).saturating_mul(epochs);
        let mut left: Vec<u64> =
            self.tasks.iter().map(|t| if t.weight > 0.0 { whole(t) } else { 0 }).collect();
        let (mut step, mut block) = (0, 0);
        let mut before = vec![0; self.tasks.len()];
        let mut segments = Vec::new();
        while left.iter().any(|n| *n > 0) {
            let weights: Vec<f64> = self
                .tasks
                .iter()
                .zip(&left)
                .map(|(t, n)| if *n > 0 { t.weight } else { 0.0 })
                .collect();
            let mut counts = block_counts(&weights)?;
            let fits = counts.iter().zip(&left).filter(|(c, _)| **c > 0).map(|(c, n)| n / c);
            let mut blocks = fits.min().unwrap_or(0);
            if blocks == 0 {
                // The last block of some task: what it has left, so that no batch is lost.
                if matches!(exhausted, Exhausted::Stop(_)) {
                    break;
                }
                counts.iter_mut().zip(&left).for_each(|(c, n)| *c = (*c).min(*n));
                blocks = 1;
            }
            let size: u64 = counts.iter().sum();
            segments.push(Segment {
                first_step: step,
                first_block: block,
                block: size,
                counts: counts.clone(),
                before: before.clone(),
            });
            if exhausted == Exhausted::Repeat {
                self.segments = segments;
                return Ok(());
            }
            step += blocks * size;
            block += blocks;
            for ((n, b), c) in left.iter_mut().zip(&mut before).zip(&counts) {
                *n -= blocks * c;
                *b += blocks * c;
            }
            if matches!(exhausted, Exhausted::Stop(_)) {
                break;
            }
        }
        if segments.is_empty() {
            return Err(Error::usage(
                format!(
                    "{epochs} epochs of the smallest task do not fill one block of the mixture"
                ),
                "Allow more epochs, use a smaller batch, or let exhausted tasks repeat",
            ));
        }
        self.segments = segments;
        self.steps = Some(step);
        Ok(())
    }

    /// The tasks.
    pub fn tasks(&self) -> &[Task] {
        &self.tasks
    }

    /// Examples of a batch of a task; 0 for a task that is not there.
    pub fn batch_size(&self, task: usize) -> u64 {
        self.tasks.get(task).map_or(0, |t| t.batch_size)
    }

    /// Seed of the order.
    pub fn seed(&self) -> i64 {
        self.seed
    }

    /// Steps until the plan ends; `None` when it never does.
    pub fn steps(&self) -> Option<u64> {
        self.steps
    }

    /// Steps of each task in a block of the first mixture.
    pub fn counts(&self) -> &[u64] {
        self.segments.first().map_or(&[], |s| &s.counts)
    }

    /// Whole batches in one pass over a task.
    pub fn batches_per_epoch(&self, task: usize) -> u64 {
        self.tasks.get(task).map_or(0, |t| t.examples / t.batch_size)
    }

    /// The batch of a step; costs the same for any step.
    ///
    /// Errors: `Usage` for a step beyond the end.
    pub fn part(&self, step: u64) -> Result<Part> {
        let (segment, block, place) = self.find(step)?;
        let order = self.order(segment, block);
        let task = order.get(place).copied().unwrap_or(0);
        let inside = order.iter().take(place).filter(|t| **t == task).count() as u64;
        let get = |values: &[u64]| values.get(task).copied().unwrap_or(0);
        let ordinal = get(&segment.before) + block * get(&segment.counts) + inside;
        let per_epoch = self.batches_per_epoch(task).max(1);
        let (epoch, place) = (ordinal / per_epoch, ordinal % per_epoch);
        Ok(Part { step, task, ordinal, epoch, place })
    }

    /// Task of each of `count` steps from `first` on; steps after the end are left out.
    ///
    /// What `part` says of them, with the order of a block made once.
    pub fn tasks_of(&self, first: u64, count: u64) -> Result<Vec<u32>> {
        let end = first.saturating_add(count).min(self.steps.unwrap_or(u64::MAX));
        let mut tasks: Vec<u32> = Vec::new();
        let mut step = first;
        while step < end {
            let (segment, block, place) = self.find(step)?;
            let order = self.order(segment, block);
            let wanted = usize::try_from(end - step).unwrap_or(usize::MAX);
            let known = tasks.len();
            let rest = order.iter().skip(place).take(wanted);
            tasks.extend(rest.map(|task| u32::try_from(*task).unwrap_or(u32::MAX)));
            step += (tasks.len() - known) as u64;
        }
        Ok(tasks)
    }

    /// Batches of each task in the steps before `step`: the cursors of a checkpoint.
    ///
    /// Errors: `Usage` for a step beyond the end (the end itself is allowed).
    pub fn count_before(&self, step: u64) -> Result<Vec<u64>> {
        if step == 0 {
            return Ok(vec![0; self.tasks.len()]);
        }
        let mut counts: Vec<u64> = vec![0; self.tasks.len()];
        let (segment, block, place) = self.find(step - 1)?;
        for ((n, before), c) in counts.iter_mut().zip(&segment.before).zip(&segment.counts) {
            *n = before + block * c;
        }
        for task in self.order(segment, block).iter().take(place + 1) {
            if let Some(n) = counts.get_mut(*task) {
                *n += 1;
            }
        }
        Ok(counts)
    }

    /// The examples of a part in the order of the permutation.
    pub fn examples(&self, part: &Part) -> Vec<u64> {
        let size = self.batch_size(part.task);
        self.range(part.task, part.epoch, part.place * size, size)
    }

    /// `count` examples of a task's epoch from position `start` of its permutation on.
    pub(crate) fn range(&self, task: usize, epoch: u64, start: u64, count: u64) -> Vec<u64> {
        let Some(t) = self.tasks.get(task) else { return Vec::new() };
        let order = Feistel::new(t.examples, self.key("rows", task, epoch));
        order.range(start, count.min(t.examples.saturating_sub(start)))
    }

    /// The key of a use, for a task and an epoch.
    pub(crate) fn key(&self, purpose: &str, task: usize, epoch: u64) -> u64 {
        let name = self.tasks.get(task).map_or("", |t| t.name.as_str());
        let epoch = i64::try_from(epoch).unwrap_or(i64::MAX);
        key_of(&[
            KeyPart::Int(self.seed),
            KeyPart::Str(purpose),
            KeyPart::Str(name),
            KeyPart::Int(epoch),
        ])
    }

    /// The segment of a step, the block inside it, the place inside that.
    fn find(&self, step: u64) -> Result<(&Segment, u64, usize)> {
        if let Some(end) = self.steps.filter(|end| step >= *end) {
            return Err(Error::usage(
                format!("step {step} of a plan that ends after {end} steps"),
                "Train for fewer steps, allow more epochs, or let exhausted tasks repeat",
            ));
        }
        let index = self.segments.partition_point(|s| s.first_step <= step).saturating_sub(1);
        let none = || Error::usage("the plan has no steps", "Give tasks with examples");
        let segment = self.segments.get(index).ok_or_else(none)?;
        let inside = step - segment.first_step;
        Ok((segment, inside / segment.block, (inside % segment.block) as usize))
    }

    /// Task of each step of a block of a segment.
    fn order(&self, segment: &Segment, block: u64) -> Vec<usize> {
        let number = i64::try_from(segment.first_block + block).unwrap_or(i64::MAX);
        let key = key_of(&[KeyPart::Int(self.seed), KeyPart::Str("block"), KeyPart::Int(number)]);
        let mut ends = Vec::with_capacity(segment.counts.len());
        let mut end = 0;
        for count in &segment.counts {
            end += count;
            ends.push(end);
        }
        let slots = Feistel::new(segment.block, key).range(0, segment.block);
        slots.into_iter().map(|slot| ends.partition_point(|e| *e <= slot)).collect()
    }
}

/// Steps of each task in a block, by largest remainder (ties: the earlier task).
///
/// The block is the smallest multiple of 32 steps in which each task of positive weight comes.
/// Errors: `Usage` for a share so small that it would not come once in 4,096 steps.
pub fn block_counts(weights: &[f64]) -> Result<Vec<u64>> {
    let total: f64 = weights.iter().sum();
    let share: Vec<f64> = weights.iter().map(|w| w / total).collect();
    let mut block = BLOCK;
    while block <= MAX_BLOCK {
        let quota: Vec<f64> = share.iter().map(|s| s * block as f64).collect();
        let mut counts: Vec<u64> = quota.iter().map(|q| (q + 1e-9).floor() as u64).collect();
        let mut order: Vec<usize> = (0..share.len()).collect();
        let rest = |i: &usize| match (share.get(*i), counts.get(*i), quota.get(*i)) {
            (Some(s), Some(c), Some(q)) if *s > 0.0 => *c as f64 - q,
            _ => f64::INFINITY,
        };
        order.sort_by(|a, b| rest(a).total_cmp(&rest(b)));
        let missing = block.saturating_sub(counts.iter().sum()) as usize;
        for i in order.into_iter().take(missing) {
            if let Some(count) = counts.get_mut(i) {
                *count += 1;
            }
        }
        if counts.iter().zip(&share).all(|(c, s)| *s <= 0.0 || *c > 0) {
            return Ok(counts);
        }
        block += BLOCK;
    }
    Err(Error::usage(
        format!("a task's weight is so small that it would not come once in {MAX_BLOCK} steps"),
        "Raise its weight, or set it to 0",
    ))
}
