//! The slow forms that define what [`crate::topk`] and [`crate::filter`] answer.

use crate::filter::{
    Bounds, Candidates, Corpus, FilterParams, NONE, Queries, RELAXED, Refill, Rerank, Rule, Sample,
    draw, sample_key,
};
use embkit_dedup::{jaccard, shingles};

/// One inner product: sixteen sums over every sixteenth product, added in pairs.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    a.iter().zip(b).enumerate().for_each(|(i, (x, y))| sums[i % 16] += x * y);
    let pairs = |v: Vec<f32>| (0..v.len() / 2).map(|i| v[i] + v[i + v.len() / 2]).collect();
    let eight: Vec<f32> = pairs(sums.to_vec());
    let four: Vec<f32> = pairs(eight);
    let two: Vec<f32> = pairs(four);
    two[0] + two[1]
}

/// Full sort per query: (row, score), best first, ties by lower row.
pub fn topk(queries: &[f32], corpus: &[f32], d: usize, k: usize) -> Vec<Vec<(u32, f32)>> {
    let search = |query: &[f32]| {
        let mut all: Vec<(u32, f32)> = corpus
            .chunks(d)
            .map(|row| dot(query, row) + 0.0)
            .enumerate()
            .map(|(i, s)| (i as u32, s))
            .collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.truncate(k);
        all
    };
    queries.chunks(d).map(search).collect()
}

/// What [`crate::filter`] decides about one query.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdicts {
    /// Of each candidate.
    pub rules: Vec<Rule>,
    /// (text row, rank) of the negatives.
    pub kept: Vec<(u64, u32)>,
    /// Whether more candidates could have been used.
    pub shallow: bool,
}

/// Every query's verdicts, one rule after the other over the whole list.
pub fn filter(
    candidates: Candidates,
    queries: Queries,
    corpus: Corpus,
    rerank: Option<Rerank>,
    params: &FilterParams,
) -> Vec<Verdicts> {
    let set = |row: u64| shingles(corpus.texts.str(row as usize).unwrap(), Default::default());
    let out = (0..queries.list.len()).map(|q| {
        let range = queries.offsets[q] as usize..queries.offsets[q + 1] as usize;
        let positives = &queries.positive[range.clone()];
        let lowest = |scores: &[f32]| scores.iter().fold(f64::INFINITY, |a, s| a.min((*s).into()));
        let start = queries.list[q] as usize * candidates.per_list;
        let rows = &candidates.row[start..start + candidates.per_list];
        let scores = &candidates.score[start..start + candidates.per_list];
        let own = queries.own.get(q).copied();
        let cluster = |row: &u32| corpus.cluster[*row as usize];
        let blocked: Vec<u64> =
            positives.iter().map(cluster).chain(queries.cluster.get(q).copied()).collect();
        let near = |row: u32| {
            let mut texts: Vec<u64> = positives.iter().map(|p| corpus.text[*p as usize]).collect();
            texts.extend(queries.text.get(q));
            let own = || set(corpus.text[row as usize]);
            params
                .near_jaccard
                .is_some_and(|t| texts.iter().any(|x| jaccard(&own(), &set(*x)) >= t))
        };
        let over = |b: &Bounds, s: f32, low: f64| {
            let s = f64::from(s);
            let percent = |p: f64| low - low.abs() * (1.0 - p);
            match () {
                () if b.max.is_some_and(|max| s > max) => Some(Rule::AboveMax),
                () if b.margin.is_some_and(|m| s > low - m) => Some(Rule::Margin),
                () if b.percent.is_some_and(|p| s > percent(p)) => Some(Rule::Percent),
                () => None,
            }
        };

        let mut rules = vec![None; rows.len()];
        let mut ranks = vec![u32::MAX; rows.len()];
        let mut next = 0;
        for (i, row) in rows.iter().enumerate() {
            let before =
                |j: usize| rules[j] != Some(Rule::Positive) && cluster(&rows[j]) == cluster(row);
            rules[i] = match () {
                () if positives.contains(row) || own == Some(*row) => Some(Rule::Positive),
                () if blocked.contains(&cluster(row)) => Some(Rule::Cluster),
                () if (0..i).any(before) => Some(Rule::Repeat),
                () => None,
            };
            if rules[i].is_none() {
                ranks[i] = next;
                next += 1;
            }
        }
        let low = lowest(&queries.score[range.clone()]);
        let bounded: Vec<Option<Rule>> =
            scores.iter().map(|s| over(&params.bounds, *s, low)).collect();
        for i in (0..rows.len()).filter(|i| ranks[*i] != u32::MAX) {
            let (rank, s) = (ranks[i] as usize, f64::from(scores[i]));
            rules[i] = match () {
                () if rank < params.skip => Some(Rule::Skipped),
                () if bounded[i].is_some() => bounded[i],
                () if params.min_score.is_some_and(|min| s < min) => Some(Rule::BelowMin),
                () if near(rows[i]) => Some(Rule::NearDuplicate),
                () => None,
            };
        }

        let key = |i: &usize| sample_key(params.seed, queries.number[q], ranks[*i]);
        let mut looked = ranks.iter().position(|r| *r as usize + 1 == params.last);
        looked = looked.map(|i| i + 1); // no candidate after rank `last` has a verdict of its own
        let end = looked.unwrap_or(rows.len());
        rules[end..].fill(Some(Rule::Beyond));
        let (mut kept, mut survivors) = (Vec::new(), 0);
        let last_call = rerank.is_some() || params.pool.is_none();
        let wanted = if last_call { params.k } else { params.pool.unwrap() };
        let full = |kept: usize, survivors: usize| kept == wanted || params.pool == Some(survivors);
        let mut order: Vec<usize> = (0..end).collect();
        if params.sample == Sample::Random {
            order.retain(|i| matches!(rules[*i], None | Some(Rule::NearDuplicate)));
            order.sort_by_key(|i| (key(i), ranks[*i]));
        }
        let mut used: Vec<usize> = (0..end).collect();
        for (place, &i) in order.iter().enumerate() {
            if rules[i].is_none() {
                survivors += 1;
                rules[i] = Some(Rule::Kept);
                if let Some(r) = &rerank {
                    let part = r.offsets[q] as usize..r.offsets[q + 1] as usize;
                    let at =
                        r.rank[part.clone()].iter().position(|rank| *rank == ranks[i]).unwrap();
                    let low = lowest(&r.positive[range.clone()]);
                    if over(&params.rerank, r.score[part.start + at], low).is_some() {
                        rules[i] = Some(Rule::Rerank);
                    }
                }
            }
            if rules[i] == Some(Rule::Kept) {
                kept.push(i);
            }
            if full(kept.len(), survivors) {
                // Nobody needs what comes after.
                if params.sample == Sample::Top {
                    rules[i + 1..].fill(Some(Rule::Surplus));
                    used.truncate(i + 1);
                } else {
                    order[place + 1..].iter().for_each(|i| rules[*i] = Some(Rule::Surplus));
                }
                break;
            }
        }
        let stopped = params.sample == Sample::Top && full(kept.len(), survivors);
        let whole = looked.is_none()
            && !stopped
            && params.last != usize::MAX
            && rows.len() < corpus.cluster.len();
        if whole && params.defer {
            return Verdicts { shallow: true, ..Default::default() };
        }

        let mut refill = Vec::new();
        let missing = params.k.saturating_sub(kept.len());
        if missing > 0 && last_call && params.refill == Refill::Relax {
            let mut back: Vec<usize> = (0..rows.len())
                .filter(|i| bounded[*i].is_some() && rules[*i] == bounded[*i])
                .collect();
            back.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(b.cmp(a)));
            let mut taken = 0;
            for i in back {
                if taken == missing {
                    break;
                }
                rules[i] = Some(if near(rows[i]) { Rule::NearDuplicate } else { Rule::Relaxed });
                if rules[i] == Some(Rule::Relaxed) {
                    taken += 1;
                    refill.push((corpus.text[rows[i] as usize], ranks[i] | RELAXED));
                }
            }
        }
        if missing > 0 && last_call && params.refill == Refill::Random {
            let n = corpus.cluster.len();
            used.retain(|i| rules[*i] != Some(Rule::Positive));
            let used = used.iter().map(|i| cluster(&rows[*i]));
            let mut used: Vec<u64> = used.chain(blocked).collect();
            for attempt in 0..32 * missing as u32 {
                let row = draw(params.seed, queries.number[q], attempt, n);
                let known = rows.contains(&row) || positives.contains(&row) || own == Some(row);
                if refill.len() == missing || known || used.contains(&cluster(&row)) || near(row) {
                    continue;
                }
                used.push(cluster(&row));
                refill.push((corpus.text[row as usize], NONE));
            }
        }
        kept.sort_unstable();
        let mut kept: Vec<(u64, u32)> =
            kept.iter().map(|i| (corpus.text[rows[*i] as usize], ranks[*i])).collect();
        kept.extend(refill);
        Verdicts { rules: rules.into_iter().flatten().collect(), kept, shallow: whole }
    });
    out.collect()
}
