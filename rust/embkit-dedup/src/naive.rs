//! The same questions answered the slow, obvious way: what the fast answers are tested against.

use crate::contamination::{ContaminationParams, Hit};
use crate::exact::Punctuation;
use crate::minhash::{Bands, Signer};
use crate::near::{DedupParams, largest};
use crate::normalize::{Unit, continues_word, is_word_char, unit_of};
use crate::shingle::{jaccard, shingles};
use crate::units::Units;
use embkit_core::hash128;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use unicode_normalization::UnicodeNormalization;

/// The definition of [`crate::normalize()`], character by character.
pub fn normalize(text: &str) -> String {
    let lower = |c: char| c.to_lowercase().map(|l| if l == 'ς' { 'σ' } else { l });
    let spelled: String = text.nfkc().flat_map(lower).nfkc().collect();
    spelled.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The stars of [`crate::near_duplicates`] with everything compared to everything; returns
/// (representative, similarity).
///
/// The two are equal whenever LSH proposes every pair above the threshold and no bucket is full.
/// The weights, which order the forms, are those of the same band keys, counted pair by pair.
pub fn near_duplicates(
    texts: &[&str],
    priority: Option<&[u16]>,
    params: &DedupParams,
) -> (Vec<u64>, Vec<f32>) {
    let n = texts.len();
    let norm: Vec<String> = texts.iter().map(|t| normalize(t)).collect();
    let sets: Vec<Vec<u64>> = texts.iter().map(|t| shingles(t, params.shingle)).collect();
    let rank = |i: usize| priority.map_or(0, |all| all[i]);

    // Of rows with one form the preferred one stands for it.
    let first = |i: usize| {
        let same = (0..n).filter(|&j| norm[j] == norm[i]);
        same.min_by_key(|&j| (rank(j), hash128(texts[j].as_bytes()), j)).unwrap_or(i)
    };
    let leader: Vec<usize> =
        (0..n).map(|i| if norm[i].is_empty() { i } else { first(i) }).collect();
    let mut order: Vec<usize> = (0..n).filter(|&i| leader[i] == i && !norm[i].is_empty()).collect();
    let bands = Bands::for_threshold(params.threshold);
    let mut signer = Signer::new(bands, params.seed);
    let keys: Vec<Vec<u32>> = sets
        .iter()
        .map(|set| {
            let mut keys = Vec::new();
            signer.keys(set, &mut keys);
            keys
        })
        .collect();
    let weight: Vec<usize> = (0..n)
        .map(|i| {
            let likes = |j: &usize| keys[*j].iter().zip(&keys[i]).filter(|(a, b)| a == b).count();
            order.iter().filter(|j| **j != i).map(likes).sum()
        })
        .collect();
    order.sort_by_key(|&i| {
        let hash = hash128(norm[i].as_bytes());
        (rank(i), Reverse(weight[i]), Reverse(norm[i].len()), hash)
    });

    // Greedy: the first representative that is similar enough.
    let mut star: Vec<usize> = (0..n).collect();
    let mut similarity = vec![1.0f32; n];
    for (at, &i) in order.iter().enumerate() {
        let found = order[..at].iter().find_map(|&j| {
            let s = jaccard(&sets[j], &sets[i]);
            (star[j] == j && s >= params.threshold).then_some((j, s))
        });
        if let Some((j, s)) = found {
            (star[i], similarity[i]) = (j, s as f32);
        }
    }

    // Rescue: a form alone gets the company of a member that resembles it.
    let greedy = star.clone();
    let size = |star: &[usize], of: usize| order.iter().filter(|j| star[**j] == of).count();
    for &i in order.iter().filter(|&&i| size(&greedy, i) == 1) {
        let cost = |j: usize| {
            let worse = rank(j) > rank(i) || rank(j) > rank(star[j]);
            match size(&star, star[j]) {
                _ if star[j] == j => (!worse).then_some(0),
                2 => (!worse).then_some(2),
                size => (size <= largest(params.threshold) as usize).then_some(size),
            }
        };
        let best = order
            .iter()
            .enumerate()
            .filter(|(_, j)| greedy[**j] != **j)
            .filter(|(_, j)| jaccard(&sets[**j], &sets[i]) >= params.threshold)
            .filter_map(|(at, &j)| Some((cost(j)?, at, j)))
            .min();
        let Some((cost, at, j)) = best else { continue };
        let s = jaccard(&sets[j], &sets[i]) as f32;
        let old = star[j];
        let leads = cost < 3 || order.iter().position(|k| *k == i).is_some_and(|own| at < own);
        let (to, other) = if leads { (j, i) } else { (i, j) };
        if cost == 2 {
            (star[old], similarity[old]) = (j, similarity[j]);
        }
        (star[to], similarity[to]) = (to, 1.0);
        (star[other], similarity[other]) = (to, s);
    }
    let representative = leader.iter().map(|&i| star[i] as u64).collect();
    (representative, leader.iter().map(|&i| similarity[i]).collect())
}

/// All pairs `i < j` of non-empty texts whose Jaccard similarity reaches the threshold.
pub fn pairs(texts: &[&str], params: &DedupParams) -> Vec<(usize, usize)> {
    let sets: Vec<Vec<u64>> = texts.iter().map(|t| shingles(t, params.shingle)).collect();
    let mut out = Vec::new();
    for i in 0..sets.len() {
        for j in i + 1..sets.len() {
            if jaccard(&sets[i], &sets[j]) >= params.threshold {
                out.push((i, j));
            }
        }
    }
    out
}

/// Representatives by a map of whole normal forms; see [`crate::exact_duplicates`].
pub fn exact_duplicates(texts: &[&str], priority: &[u16], punctuation: Punctuation) -> Vec<u64> {
    let form = |text: &str| match punctuation {
        Punctuation::Keep => vec![normalize(text)],
        Punctuation::Drop => units(text, Units::Auto).1,
    };
    let mut groups: BTreeMap<Vec<String>, Vec<usize>> = BTreeMap::new();
    for (row, text) in texts.iter().enumerate() {
        groups.entry(form(text)).or_default().push(row);
    }
    let mut representative: Vec<u64> = (0..texts.len() as u64).collect();
    for (form, rows) in groups {
        let first = rows.iter().min_by_key(|&&row| (priority[row], row));
        if let Some(&first) = first.filter(|_| !form.concat().is_empty()) {
            rows.iter().for_each(|&row| representative[row] = first as u64);
        }
    }
    representative
}

/// Words or characters of the normalised text, as strings.
pub(crate) fn units(text: &str, units: Units) -> (Unit, Vec<String>) {
    let norm = normalize(text);
    let unit = match units {
        Units::Auto => unit_of(&norm),
        Units::Words => Unit::Word,
        Units::Chars => Unit::Char,
    };
    if unit == Unit::Char {
        return (unit, norm.chars().filter(|&c| is_word_char(c)).map(String::from).collect());
    }
    let mut words: Vec<String> = Vec::new();
    let mut inside = false;
    for c in norm.chars() {
        let was_inside = inside;
        inside = if inside { continues_word(c) } else { is_word_char(c) };
        match words.last_mut() {
            Some(word) if inside && was_inside => word.push(c),
            _ if inside => words.push(c.into()),
            _ => {}
        }
    }
    (unit, words)
}

/// Hits by string n-grams in a map. Spans are those of ASCII texts: `start` and `end` are found by
/// walking the original text's words, so pass ASCII when comparing spans.
pub fn contamination(
    train: &[&str],
    eval: &[&str],
    sets: &[u32],
    params: &ContaminationParams,
) -> Vec<Hit> {
    type Gram = (bool, Vec<String>);
    let mut first: BTreeMap<Gram, (usize, BTreeSet<u32>)> = BTreeMap::new();
    let mut whole: BTreeMap<Gram, (usize, BTreeSet<u32>)> = BTreeMap::new();
    let n_of = |unit| if unit == Unit::Word { params.words } else { params.chars };
    let key = |unit: Unit, units: &[String]| (unit == Unit::Word, units.to_vec());
    for (row, text) in eval.iter().enumerate() {
        let (unit, units) = units(text, params.units);
        let empty = || (row, BTreeSet::new());
        if !units.is_empty() {
            whole.entry(key(unit, &units)).or_insert_with(empty).1.insert(sets[row]);
        }
        for gram in units.windows(n_of(unit)) {
            first.entry(key(unit, gram)).or_insert_with(empty).1.insert(sets[row]);
        }
    }
    let mut rows_with: BTreeMap<Gram, u32> = BTreeMap::new();
    for text in train {
        let (unit, units) = units(text, params.units);
        let grams: BTreeSet<Gram> = units.windows(n_of(unit)).map(|g| key(unit, g)).collect();
        grams.into_iter().for_each(|g| *rows_with.entry(g).or_default() += 1);
    }
    let mut hits = Vec::new();
    for (row, text) in train.iter().enumerate() {
        let (unit, units) = units(text, params.units);
        let spans = spans(text, &units);
        let n = n_of(unit);
        let at = |i: usize| {
            let gram = key(unit, units.get(i..i + n)?);
            first.get(&gram).filter(|_| rows_with[&gram] <= params.common)
        };
        let mut best: Option<(usize, usize, usize)> = None;
        let mut covered = vec![false; units.len()];
        let (mut runs, mut found) = (0, BTreeSet::new());
        for i in 0..units.len() {
            let Some((eval_row, in_sets)) = at(i) else { continue };
            found.extend(in_sets);
            runs += u32::from(i == 0 || at(i - 1).is_none());
            covered[i..i + n].fill(true);
            let mut last = i;
            while at(last + 1).is_some() {
                last += 1;
            }
            let (start, end) = (spans[i].0, spans[last + n - 1].1);
            if best.is_none_or(|(_, from, to)| end - start > to - from) {
                best = Some((*eval_row, start, end));
            }
        }
        let equal = whole.get(&key(unit, &units));
        if let Some((eval_row, in_sets)) = equal {
            best = Some((*eval_row, spans[0].0, spans[units.len() - 1].1));
            covered.fill(true);
            runs = 1;
            found.extend(in_sets);
        }
        if let Some((eval_row, start, end)) = best {
            let count = covered.iter().filter(|c| **c).count();
            hits.push(Hit {
                train_row: row as u64,
                eval_row: eval_row as u64,
                start: start as u64,
                end: end as u64,
                overlap: count as f32 / units.len() as f32,
                runs,
                whole: equal.is_some(),
                sets: found.into_iter().collect(),
            });
        }
    }
    hits
}

/// Finds each unit in the lower-cased original, left to right.
fn spans(text: &str, units: &[String]) -> Vec<(usize, usize)> {
    let lower = text.to_ascii_lowercase();
    let mut from = 0;
    let find = |unit: &String| {
        let start = lower[from..].find(unit.as_str()).map_or(from, |at| from + at);
        let end = (start + unit.len()).min(lower.len());
        from = end;
        (start, end)
    };
    units.iter().map(find).collect()
}
