//! A step's batch: from the plan's examples to rows, keys, micro-batches and filled buffers.
//!
//! Everything is a function of (files, settings, step, rank, world). Each rank computes the whole
//! global batch (its keys and draws are needed for masks and for equal numbers of micro-batches)
//! and gathers the tokens of its own examples only. Each distinct row is gathered once, however
//! many examples name it.

pub mod cuts;
mod distinct;
mod fill;
mod first_fit;
mod rows;
mod table;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use embkit_core::container::Verify;
use embkit_core::{Error, Result};

use crate::plan::{Exhausted, Part, Plan, Task, draw, sample};
use crate::read::{Span, Store};
use crate::records::Kind;
use distinct::Keys;
pub use distinct::{SUPERBLOCK, arrange};
pub use fill::{Field, FieldType, Form};
pub use first_fit::first_fit;
use rows::{Arranged, select};
use table::Table;
pub use table::{EXAMPLES_FORMAT, NEGATIVES_FORMAT, TaskFiles};

/// Which hard negatives an example gets from its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardRule {
    /// Drawn without replacement, anew each epoch.
    Sample,
    /// The first of the list: mined lists are sorted, hardest first.
    Top,
}

/// How batches are made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Of the order and of every draw.
    pub seed: i64,
    /// Hard negatives per example of a retrieval task.
    pub hard: usize,
    /// Which ones.
    pub hard_rule: HardRule,
    /// Tokens of a micro-batch; with padding when `padded`.
    pub token_budget: u64,
    /// Rows side by side in rectangles, for models without variable-length attention.
    pub padded: bool,
    /// Keep examples that share a text out of each other's batches.
    pub no_duplicates: bool,
    /// Share of the queries, and of the examples' passages, that are taken without their prompt.
    pub prompt_dropout: f64,
    /// What happens when a task's epochs are used up.
    pub exhausted: Exhausted,
}

/// Makes the batches of a run; `Send + Sync`, any step in any order from any thread.
pub struct Loader {
    store: Arc<Store>,
    tables: Vec<Table>,
    plan: Plan,
    settings: Settings,
    /// The last arranged superblocks of each task.
    arranged: Vec<Mutex<Vec<Superblock>>>,
}

#[derive(Clone)]
struct Superblock {
    epoch: u64,
    number: u64,
    examples: Arc<Vec<u64>>,
}

/// Rows that go through the encoder together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Micro {
    /// First row in [`Batch::rows`], and how many.
    pub start: usize,
    /// Number of rows.
    pub rows: usize,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Where its tokens begin in the token buffer.
    pub token_start: usize,
    /// Its tokens in the buffer, padding included where there is any.
    pub tokens: usize,
}

/// One step's input on one rank; b examples, H hard negatives each, R distinct rows.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The plan's word on the step.
    pub part: Part,
    /// The kind of its task.
    pub kind: Kind,
    /// [b], numbers of the task's usable examples.
    pub examples: Vec<u64>,
    /// [b], places of the examples in the global batch, ascending.
    pub position: Vec<i64>,
    /// [R], the distinct rows in the order of the micro-batches.
    pub rows: Vec<u64>,
    spans: Vec<Span>,
    /// [b], index into `rows`.
    pub query: Vec<i64>,
    /// [b], index into `rows`.
    pub positive: Vec<i64>,
    /// [b, H], index into `rows`; absent ones repeat the positive.
    pub hard: Vec<i64>,
    /// [b], identity, dense over the global batch: equal keys are one text (or class).
    pub query_key: Vec<i32>,
    /// [b].
    pub positive_key: Vec<i32>,
    /// [b, H].
    pub hard_key: Vec<i32>,
    /// [b, H], whether there is such a hard negative.
    pub hard_mask: Vec<bool>,
    /// H.
    pub hard_count: usize,
    /// [b], gold similarity of an STS pair, else 0.
    pub score: Vec<f32>,
    /// [b], weight in the loss.
    pub weight: Vec<f32>,
    /// The micro-batches of this rank.
    pub micro: Vec<Micro>,
    /// Micro-batches that every rank runs: the most of any.
    pub micro_count: usize,
    /// Real tokens of this rank.
    pub tokens: u64,
}

/// The global batch as rows of the store, before ranks and micro-batches.
struct Sides {
    examples: Vec<u64>,
    lines: Vec<u64>,
    query: Vec<u64>,
    positive: Vec<u64>,
    hard: Vec<u64>,
    hard_mask: Vec<bool>,
    width: usize,
}

impl Loader {
    /// Opens the tables of the tasks (those of weight 0 are left out by the caller) over a store.
    ///
    /// Errors: as [`Plan::new`] and for tables that are damaged, of another store, or empty.
    pub fn open(store: Arc<Store>, tasks: &[TaskFiles], settings: Settings) -> Result<Self> {
        if settings.token_budget == 0 {
            return Err(Error::usage("token_budget is 0", "Give a whole number from 1"));
        }
        let rows = store.rows();
        let tables: Vec<Table> = tasks
            .iter()
            .map(|t| Table::open(t, rows, Verify::FirstTouch))
            .collect::<Result<_>>()?;
        let known = |t: &Table, f: &TaskFiles| Task {
            name: t.name.clone(),
            examples: t.examples(),
            weight: f.weight,
            batch_size: f.batch_size,
        };
        let planned = tables.iter().zip(tasks).map(|(t, f)| known(t, f)).collect();
        let plan = Plan::new(settings.seed, planned, settings.exhausted)?;
        let arranged = tables.iter().map(|_| Mutex::new(Vec::new())).collect();
        Ok(Self { store, tables, plan, settings, arranged })
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Unusable examples of a task, and why.
    pub fn skipped(&self, task: usize) -> (u64, &'static str) {
        self.tables.get(task).map_or((0, ""), |t| (t.skipped(), t.reason()))
    }

    /// The folder of a task's table, for messages.
    pub fn path(&self) -> &Path {
        self.store.dir()
    }

    /// The examples of a step in the order of the global batch.
    ///
    /// Errors: `Usage` for a step beyond the plan; `Corrupt`, naming the example.
    pub fn examples_of(&self, step: u64) -> Result<(Part, Vec<u64>)> {
        let part = self.plan.part(step)?;
        Ok((part, self.examples(self.table(part.task)?, &part)?))
    }

    /// Hard negatives that the table lists for each of some examples of a task.
    ///
    /// Errors: `Usage` for a task that is not there; `Corrupt`, naming the example.
    pub fn listed(&self, task: usize, examples: &[u64]) -> Result<Vec<u32>> {
        let table = self.table(task)?;
        let count = |e: &u64| Ok(table.hard(table.line(*e))?.len().min(u32::MAX as usize) as u32);
        examples.iter().map(count).collect()
    }

    fn table(&self, task: usize) -> Result<&Table> {
        let none = || Error::usage(format!("no task {task}"), "Open the run again");
        self.tables.get(task).ok_or_else(none)
    }

    /// The batch of `rank` among `world` at a step, counted from 0.
    ///
    /// With `starts`, one number per example of the global batch, the hard negatives of an example
    /// are those of its list from there on, whatever the rule; a list that ends sooner gives its
    /// last ones.
    ///
    /// Errors: `Usage` for a step beyond the plan, a rank beyond the world, or another number of
    /// starts; `Corrupt`, naming the example.
    pub fn batch(
        &self,
        step: u64,
        rank: usize,
        world: usize,
        starts: Option<&[u64]>,
    ) -> Result<Batch> {
        let part = self.plan.part(step)?;
        let size = self.plan.batch_size(part.task);
        if rank >= world || world as u64 > size {
            return Err(Error::usage(
                format!("rank {rank} of {world} for a batch of {size}"),
                "Use ranks from 0, and no more of them than examples in a batch",
            ));
        }
        let table = self.table(part.task)?;
        let sides = self.sides(table, &part, starts)?;
        let (query_key, positive_key, hard_key) = self.keys(table, &sides)?;

        let all: Vec<u32> = (0..sides.examples.len() as u32).collect();
        let (own, arranged, micro_count) = if world == 1 {
            let arranged = self.arrange_rows(&sides, &all)?;
            let count = arranged.micro.len();
            (all, arranged, count)
        } else {
            self.share(&sides, rank, world)?
        };
        let pick = |i: &u32| *i as usize;
        let h = sides.width;
        let Arranged { rows, spans, index, micro } = arranged;
        let (query, rest) = index.split_at(own.len());
        let (positive, hard) = rest.split_at(own.len());
        let tokens = spans.iter().map(|s| s.len() as u64).sum();
        Ok(Batch {
            part,
            kind: table.kind,
            examples: select(&sides.examples, &own, 1),
            position: own.iter().map(|i| i64::from(*i)).collect(),
            rows,
            spans,
            query: query.to_vec(),
            positive: positive.to_vec(),
            hard: hard.to_vec(),
            query_key: select(&query_key, &own, 1),
            positive_key: select(&positive_key, &own, 1),
            hard_key: select(&hard_key, &own, h),
            hard_mask: select(&sides.hard_mask, &own, h),
            hard_count: h,
            score: own
                .iter()
                .map(|i| match table.kind {
                    Kind::Sts => table.score(line(&sides, pick(i))),
                    _ => Ok(0.0),
                })
                .collect::<Result<_>>()?,
            weight: own
                .iter()
                .map(|i| table.weight(line(&sides, pick(i))))
                .collect::<Result<_>>()?,
            micro,
            micro_count,
            tokens,
        })
    }

    /// The examples of a part, in the order of the global batch.
    fn examples(&self, table: &Table, part: &Part) -> Result<Vec<u64>> {
        if !self.settings.no_duplicates {
            return Ok(self.plan.examples(part));
        }
        let number = part.place / SUPERBLOCK;
        let none = || Error::usage(format!("no task {}", part.task), "Open the run again");
        let cache = self.arranged.get(part.task).ok_or_else(none)?;
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cache.iter().position(|s| s.epoch == part.epoch && s.number == number);
        let block = match at {
            Some(at) => cache.remove(at),
            None => Superblock {
                epoch: part.epoch,
                number,
                examples: Arc::new(self.superblock(table, part, number)?),
            },
        };
        // Two of them: threads that work ahead meet the next while the last is still in use.
        cache.insert(0, block.clone());
        cache.truncate(2);
        drop(cache);
        let size = self.plan.batch_size(part.task) as usize;
        let start = (part.place % SUPERBLOCK) as usize * size;
        Ok(block.examples.get(start..start + size).unwrap_or_default().to_vec())
    }

    /// The examples of a superblock, arranged.
    fn superblock(&self, table: &Table, part: &Part, number: u64) -> Result<Vec<u64>> {
        let per_epoch = self.plan.batches_per_epoch(part.task);
        let batches = (per_epoch - (number * SUPERBLOCK).min(per_epoch)).min(SUPERBLOCK);
        let size = self.plan.batch_size(part.task);
        let start = number * SUPERBLOCK * size;
        let examples = self.plan.range(part.task, part.epoch, start, batches * size);
        let key = self.plan.key("positive", part.task, part.epoch);
        let mut keys: Vec<[u64; 2]> = Vec::with_capacity(examples.len());
        for some in examples.chunks(size as usize) {
            let lines: Vec<u64> = some.iter().map(|e| table.line(*e)).collect();
            table.prefetch(&lines);
            let pairs = some.iter().zip(lines);
            let pairs = pairs.map(|(e, l)| Ok([table.query(l)?, table.positive(*e, l, key)?]));
            let pairs: Vec<[u64; 2]> = pairs.collect::<Result<_>>()?;
            self.store.prefetch_clusters(pairs.as_flattened());
            for [query, positive] in pairs {
                keys.push([self.store.cluster_of(query)?, self.store.cluster_of(positive)?]);
            }
        }
        let (order, _) = arrange(&keys, size as usize, batches as usize);
        Ok(order.iter().filter_map(|i| examples.get(*i as usize)).copied().collect())
    }

    /// Rows of the global batch: queries, drawn positives, chosen hard negatives.
    fn sides(&self, table: &Table, part: &Part, starts: Option<&[u64]>) -> Result<Sides> {
        let examples = self.examples(table, part)?;
        if let Some(starts) = starts
            && starts.len() != examples.len()
        {
            return Err(Error::usage(
                format!("{} starts for a batch of {}", starts.len(), examples.len()),
                "Give one per example of the global batch",
            ));
        }
        let lines: Vec<u64> = examples.iter().map(|e| table.line(*e)).collect();
        table.prefetch(&lines);
        let key = self.plan.key("positive", part.task, part.epoch);
        let mut query = lines.iter().map(|l| table.query(*l)).collect::<Result<Vec<u64>>>()?;
        let mut positive: Vec<u64> = examples
            .iter()
            .zip(&lines)
            .map(|(e, l)| table.positive(*e, *l, key))
            .collect::<Result<_>>()?;
        let width = if table.kind == Kind::Retrieval { self.settings.hard } else { 0 };
        let mut hard = Vec::with_capacity(width * lines.len());
        let mut hard_mask = Vec::with_capacity(width * lines.len());
        if width > 0 {
            let key = self.plan.key("hard", part.task, part.epoch);
            let (mut work, mut chosen) = (Vec::new(), Vec::new());
            let mut starts = starts.map(|s| s.iter());
            for ((example, line), positive) in examples.iter().zip(&lines).zip(&positive) {
                let list = table.hard(*line)?;
                let asked = starts.as_mut().map(|s| s.next().copied().unwrap_or(0));
                let mut run = |start: u64| {
                    let last = list.len().saturating_sub(width);
                    let start = usize::try_from(start).unwrap_or(last).min(last);
                    chosen.clear();
                    chosen.extend(
                        (start..list.len().min(start.saturating_add(width))).map(|i| i as u32),
                    );
                };
                match (asked, self.settings.hard_rule) {
                    (Some(start), _) => run(start),
                    (None, HardRule::Top) => run(0),
                    (None, HardRule::Sample) => {
                        sample(key, *example, list.len(), width, &mut work, &mut chosen)
                    }
                }
                for slot in 0..width {
                    let row = chosen.get(slot).and_then(|c| list.get(*c as usize));
                    hard_mask.push(row.is_some());
                    hard.push(row.map_or(Ok(*positive), |row| table.row(*line, *row))?);
                }
            }
        }
        let key = self.plan.key("prompt", part.task, part.epoch);
        let mut sides: [(&mut [u64], usize); 3] =
            [(&mut query, 1), (&mut positive, 1), (&mut hard, width)];
        for (side, (rows, width)) in sides.iter_mut().enumerate() {
            self.drop_prompts(rows, *width, &examples, key, side.min(1) as u64)?;
        }
        for rows in [&query, &positive, &hard] {
            self.store.prefetch(rows);
        }
        Ok(Sides { examples, lines, query, positive, hard, hard_mask, width })
    }

    /// Puts the form without a prompt in the place of some rows, `width` per example: a draw for
    /// each example and side (0 query, 1 passages, which go together), anew each epoch.
    ///
    /// Errors: `Usage` when a row that is drawn has no such form.
    fn drop_prompts(
        &self,
        rows: &mut [u64],
        width: usize,
        examples: &[u64],
        key: u64,
        side: u64,
    ) -> Result<()> {
        let share = self.settings.prompt_dropout;
        if share <= 0.0 || width == 0 {
            return Ok(());
        }
        let limit = (share * 2f64.powi(64)) as u64; // saturates: 1.0 drops all but one in 2^64
        for (example, own) in examples.iter().zip(rows.chunks_mut(width)) {
            if draw(key, example.wrapping_mul(2).wrapping_add(side)) <= limit {
                for row in own {
                    *row = self.store.plain_of(*row)?;
                }
            }
        }
        Ok(())
    }

    /// Identity keys of queries, positives and hard negatives, dense over the global batch.
    fn keys(&self, table: &Table, sides: &Sides) -> Result<(Vec<i32>, Vec<i32>, Vec<i32>)> {
        match table.kind {
            Kind::Sts => {
                let own: Vec<i32> = (0..sides.query.len() as i32).collect();
                Ok((own.clone(), own, Vec::new()))
            }
            Kind::Classification => {
                let lines = sides.lines.iter();
                let labels = lines.map(|l| table.label(*l)).collect::<Result<Vec<i32>>>()?;
                Ok((labels.clone(), labels, Vec::new()))
            }
            Kind::Retrieval => {
                let mut dense: Keys<i32> = Keys::default();
                dense.reserve(sides.query.len() + sides.positive.len() + sides.hard.len());
                let mut keys = |rows: &[u64]| {
                    let mut key = |row: &u64| {
                        let next = dense.len() as i32;
                        Ok(*dense.entry(self.store.cluster_of(*row)?).or_insert(next))
                    };
                    rows.iter().map(&mut key).collect::<Result<Vec<i32>>>()
                };
                Ok((keys(&sides.query)?, keys(&sides.positive)?, keys(&sides.hard)?))
            }
        }
    }
}

fn line(sides: &Sides, i: usize) -> u64 {
    sides.lines.get(i).copied().unwrap_or(u64::MAX)
}
