//! Which rows a merged store has: every distinct (prompt, text) once, the first store's in place.

use std::collections::HashMap;

use embkit_core::{Error, Job, Result};
use hashbrown::HashTable;

use super::shards::{Stores, View};
use crate::records::identity;

/// Rows between two looks at the job.
const CHECK_ROWS: usize = 1 << 12;

/// The rows of a merged store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// The merged row of each row of [`Stores`].
    pub row_of: Vec<u64>,
    /// Columns of the merged rows, as in [`super::Plan`].
    pub row: Vec<u64>,
    /// See [`super::Plan`].
    pub text_id: Vec<u64>,
    /// See [`super::Plan`].
    pub cluster: Vec<u64>,
    /// See [`super::Plan`].
    pub role: Vec<u8>,
    /// See [`super::Plan`].
    pub source: Vec<u16>,
    /// Rows of the first store that took longer tokens from another: their text was cut to the
    /// limit of one role and is now used in the other too.
    pub lengthened: u64,
}

/// Merges the rows of stores. Two rows are one when their texts are (all 128 bits of
/// [`identity`]) and their `form` is equal; the row comes where it came first. `form` says per row
/// which prompt stands before the text, `source` its source in the merged list, `max_length` the
/// limit in tokens by role. Roles are joined. Clusters that share a text become one, named as the
/// first row in it was. Counts rows on `job`.
///
/// Memory: about 32 bytes per merged row beside the result.
///
/// Errors: `Usage` for columns of another length, `Corrupt`, `Cancelled`.
pub fn merge_rows(
    job: &Job,
    stores: &Stores,
    form: &[u8],
    source: &[u16],
    max_length: [u32; 3],
) -> Result<Merged> {
    if form.len() as u64 != stores.rows() || source.len() != form.len() {
        return Err(Error::usage(
            format!("{} forms, {} sources, {} rows", form.len(), source.len(), stores.rows()),
            "Pass one form and one source per row",
        ));
    }
    let views = stores.views()?;
    let first_store = stores.starts().get(1).copied().unwrap_or(0);
    let limit = |role: u8| max_length.get(usize::from(role)).copied().unwrap_or(0);
    let mut merged = Merged::default();
    let mut clusters = Clusters::default();
    let mut table: HashTable<u64> = HashTable::new();
    let columns = views
        .iter()
        .flat_map(|view| (0..view.offsets.len().saturating_sub(1)).map(move |local| (view, local)));
    for (row, ((view, local), (form_of, source))) in
        columns.zip(form.iter().zip(source)).enumerate()
    {
        if row % CHECK_ROWS == 0 {
            job.check()?;
        }
        job.advance(1);
        let broken = || view.shard.broken(local);
        let id = *view.text_id.get(local).ok_or_else(broken)?;
        let cluster = *view.cluster.get(local).ok_or_else(broken)?;
        let role = *view.role.get(local).ok_or_else(broken)?;
        clusters.join(id, cluster);
        let mut failed = None;
        let found = table.find(hash(id, *form_of), |there| {
            let at = *there as usize;
            let Some(other) = merged.row.get(at).copied() else { return false };
            merged.text_id.get(at) == Some(&id)
                && form.get(other as usize) == Some(form_of)
                && same_text(stores, &views, other, view, local).unwrap_or_else(|e| {
                    failed.get_or_insert(e);
                    false
                })
        });
        if let Some(e) = failed {
            return Err(e);
        }
        let Some(at) = found.map(|at| *at as usize) else {
            let at = merged.row.len() as u64;
            let rehash = |r: &u64| {
                let id = merged.text_id.get(*r as usize).copied().unwrap_or(0);
                let from = merged.row.get(*r as usize).copied().unwrap_or(0) as usize;
                hash(id, form.get(from).copied().unwrap_or(0))
            };
            table.insert_unique(hash(id, *form_of), at, rehash);
            merged.row_of.push(at);
            merged.row.push(row as u64);
            merged.text_id.push(id);
            merged.cluster.push(cluster);
            merged.role.push(role);
            merged.source.push(*source);
            continue;
        };
        merged.row_of.push(at as u64);
        if let (Some(from), Some(joined), Some(first)) =
            (merged.row.get_mut(at), merged.role.get_mut(at), merged.source.get_mut(at))
        {
            // A role that was joined before has the tokens of the longer limit already.
            if limit(role) > limit(*joined) {
                merged.lengthened += u64::from(*from < first_store);
                *from = row as u64;
            }
            if *joined != role {
                *joined = 2;
            }
            *first = (*first).min(*source);
        }
    }
    clusters.name(&mut merged.cluster);
    Ok(merged)
}

/// The key of the table. `text_id` is a hash already; forms are few and go to the other end.
fn hash(text_id: u64, form: u8) -> u64 {
    text_id ^ (u64::from(form) << 56)
}

/// Whether two texts of one `text_id` are one: equal bytes, or equal 128-bit identities.
fn same_text(stores: &Stores, views: &[View], row: u64, view: &View, local: usize) -> Result<bool> {
    let (shard, at) = stores.locate(row)?;
    let Some(other) = views.get(shard) else { return Ok(false) };
    let (a, b) = (other.text(at)?, view.text(local)?);
    let text = |bytes, view: &View, local| {
        std::str::from_utf8(bytes).map_err(|e| {
            Error::corrupt(view.shard.raw.path(), format!("its text {local} is not UTF-8 ({e})"))
        })
    };
    Ok(a == b || identity(text(a, other, at)?) == identity(text(b, view, local)?))
}

/// Near-duplicate clusters that grow together: union-find over text ids. A cluster bears the id of
/// a text, so a row that says "text t is in cluster c" joins the two; texts alone cost nothing.
#[derive(Default)]
struct Clusters {
    parent: HashMap<u64, u64>,
}

impl Clusters {
    fn join(&mut self, text: u64, cluster: u64) {
        if text != cluster {
            let (a, b) = (self.find(text), self.find(cluster));
            if a != b {
                self.parent.insert(a, b);
            }
            self.parent.entry(b).or_insert(b);
        }
    }

    fn find(&mut self, id: u64) -> u64 {
        let mut root = id;
        while let Some(up) = self.parent.get(&root).copied().filter(|up| *up != root) {
            root = up;
        }
        let mut at = id;
        while at != root {
            at = self.parent.insert(at, root).unwrap_or(root);
        }
        root
    }

    /// Gives all rows of a component the cluster that the first of them had.
    fn name(&mut self, cluster: &mut [u64]) {
        let mut names: HashMap<u64, u64> = HashMap::new();
        for c in cluster {
            if self.parent.contains_key(c) {
                let root = self.find(*c);
                *c = *names.entry(root).or_insert(*c);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_grow_together_and_keep_the_first_name() {
        let mut clusters = Clusters::default();
        // Store one: 1 and 2 in cluster 1; 5 alone. Store two: 2, 5 and 9 in cluster 9.
        for (text, cluster) in [(1, 1), (2, 1), (5, 5), (2, 9), (5, 9), (9, 9), (7, 8)] {
            clusters.join(text, cluster);
        }
        let mut column = [1, 1, 5, 9, 8, 3];
        clusters.name(&mut column);
        assert_eq!(column, [1, 1, 1, 1, 8, 3]);
    }
}
