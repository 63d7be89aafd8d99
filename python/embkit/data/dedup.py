"""The dedup stage: duplicates merged, contradictions found, leaks into evaluation sets removed.

The similarity work is Rust's (exact forms, MinHash LSH with exact verification, n-gram runs); here
its results are joined with the example tables, counted and explained in ``report.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data import leaks
from embkit.data.clean import ACTIONS, CONFLICTS, clean_examples
from embkit.data.records import KIND, Records, as_directory, write_records
from embkit.data.tables import Array, Examples, Texts, counts_of
from embkit.errors import UsageError, nearest
from embkit.progress import bar
from embkit.stage import Stage, stage

METHODS = ("near", "exact")
_SAMPLES = 20
_LAST = np.iinfo(np.uint16).max


def dedup(
    records: Any,
    *,
    out: Path | str,
    method: str = "near",
    threshold: float = 0.8,
    action: str = "merge",
    conflicts: str = "keep",
    priority: Sequence[str] = (),
    punctuation: str = "keep",
    against: Any = None,
    leaked: str = "remove",
    words: int = 13,
    chars: int = 50,
    units: str = "auto",
    common: int = 10,
    seed: int = 0,
    memory: int = 0,
    fresh: bool = False,
) -> Records:
    """Merge duplicates and remove what leaks into the evaluation sets.

    Args:
        records: a Records, a records directory, or anything :func:`embkit.data.read` takes.
        out: the directory to publish (again records).
        method: ``"near"``, or ``"exact"``: only texts with the same normalised form.
        threshold: Jaccard similarity from which two texts count as near-duplicates, in (0, 1].
        action: what becomes of duplicates: ``"merge"``, ``"drop"`` or ``"mark"``.
        conflicts: what becomes of examples that contradict each other (a text that is a positive
            and a negative of one query, a pair with two scores, a text with two labels):
            ``"keep"`` or ``"drop"``.
        priority: names of sources, the best first; of duplicates the text of the better source
            stays. Sources that are not named come after those that are.
        punctuation: of ``"exact"``: ``"keep"``, or ``"drop"`` to compare words alone.
        against: evaluation data: a data folder (its dev/ and test/), a split folder, a BEIR folder,
            JSON lines files, a records directory, or a list of these. Of a retrieval set the
            queries and the judged passages count, of a classification set the test texts.
        leaked: what becomes of examples with leaked texts: ``"remove"``, or ``"mark"``, which only
            writes ``leaks.safetensors`` and the report.
        words: a run of this many words in common with an evaluation text is a leak.
        chars: the same in characters, for scripts without spaces.
        units: of runs: ``"auto"`` (by the script of each text), ``"words"`` or ``"chars"``.
        common: a run in more training texts than this is a fixed phrase, and no leak.
        seed: of the MinHash permutations.
        memory: bytes that near-duplicate search may use beside the texts; beyond them it goes
            through files in the output's partial directory. 0: no limit. No effect on the result.
        fresh: do it again even when it is done.

    Raises:
        UsageError: an unknown choice or source, a number out of range, a memory limit that is too
            small (says the least), or ``against`` holds no texts.
        FileNotFoundError: ``against`` names nothing.
    """
    for name, value, allowed in (
        ("method", method, METHODS),
        ("action", action, ACTIONS),
        ("conflicts", conflicts, CONFLICTS),
        ("punctuation", punctuation, ("keep", "drop")),
        ("leaked", leaked, leaks.ACTIONS),
        ("units", units, leaks.UNITS),
    ):
        if value not in allowed:
            raise UsageError(f"Unknown {name} {value!r}; {nearest(value, allowed)}")
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold = {threshold} is out of range.", fix="above 0, at most 1")
    if min(words, chars) < 1 or common < 0 or memory < 0:
        raise UsageError(
            f"words = {words}, chars = {chars}, common = {common}, memory = {memory}: "
            "one is out of range.",
            fix="words and chars are at least 1, common and memory at least 0",
        )
    records = as_directory(records, out)
    evaluation = _paths(against)
    params: dict[str, Any] = {
        "method": method,
        "threshold": threshold,
        "action": action,
        "conflicts": conflicts,
        "priority": list(priority),
        "punctuation": punctuation,
        "leaked": leaked,
        "words": words,
        "chars": chars,
        "units": units,
        "common": common,
        "seed": seed,
    }
    ranks = source_ranks(records.manifest["sources"], priority)
    inputs = [records.dir, *evaluation]
    with stage(out, name="dedup", params=params, inputs=inputs, kind=KIND, fresh=fresh) as work:
        if not work.done:
            _run(records, evaluation, work, params, ranks, memory)
    return Records.open(out)


def _run(
    records: Records,
    evaluation: list[Path],
    work: Stage,
    params: Mapping[str, Any],
    ranks: Array,
    memory: int,
) -> None:
    texts, tables = records.texts, records.tasks()
    rank = text_ranks(tables, len(texts), ranks) if len(params["priority"]) else None
    representative, similarity, checked = _duplicates(texts, rank, work, params, memory)
    gone, leak_report = np.zeros(len(texts), bool), None
    if evaluation:
        found = leaks.find(texts, leaks.held_out(evaluation), params)
        found.save(work.dir / "leaks.safetensors", texts)
        leak_report = found.report(texts)
        if params["leaked"] == "remove":
            gone = found.leaked
    counts, samples = {}, {}
    for name, table in tables.items():
        done = clean_examples(
            table,
            representative=representative,
            leaked=gone,
            action=params["action"],
            conflicts=params["conflicts"],
        )
        tables[name], counts[name] = done.table, done.counts
        samples[name] = [
            [leaks.short(texts.get(int(row))) for row in pair]
            for pair in done.conflicts[:_SAMPLES].tolist()
        ]
    cluster = texts.text_id[representative]
    container.save(
        work.dir / "clusters.safetensors",
        {
            "text_id": texts.text_id,
            "cluster": cluster,
            "representative": representative,
            "similarity": similarity,
        },
        kind="embkit.clusters",
    )
    report: dict[str, Any] = {
        "texts": {
            "before": len(texts),
            "duplicates": int((representative != np.arange(len(texts))).sum()),
            "pairs_checked": checked,
        },
        "examples": counts,
        "conflicts": samples,
        "clusters": _clusters(texts, representative, similarity),
        "leaks": leak_report or {"evaluation_texts": 0},
    }
    texts = Texts(shards=texts.shards, text_id=texts.text_id, cluster=cluster)
    texts, tables = compact(texts, tables)
    report["texts"]["after"] = len(texts)
    write_records(work, texts, tables, records.manifest["sources"], report)


def _duplicates(
    texts: Texts, rank: Array | None, work: Stage, params: Mapping[str, Any], memory: int
) -> tuple[Array, Array, int]:
    """Representative (U64) and similarity to it (F32) of each text, and the pairs compared."""
    spill = work.dir / "spill"
    spill.mkdir(exist_ok=True)
    options: dict[str, Any] = {"memory": memory, "spill": str(spill)}
    with bar("Duplicates", total=len(texts), unit="texts") as progress:
        if params["method"] == "exact":
            representative = _rust.exact_duplicates(
                texts.shards,
                punctuation=params["punctuation"],
                priority=rank,
                progress=progress.update,
                **options,
            )
            similarity, checked = np.ones(len(texts), np.float32), 0
        else:
            representative, similarity, checked = _rust.near_duplicates(
                texts.shards,
                threshold=params["threshold"],
                seed=params["seed"],
                priority=rank,
                progress=progress.update,
                **options,
            )
        progress.update(len(texts))
    shutil.rmtree(spill)
    return np.asarray(representative, np.uint64), np.asarray(similarity, np.float32), int(checked)


def source_ranks(sources: Sequence[Mapping[str, str]], priority: Sequence[str]) -> Array:
    """U16 per source: its place in ``priority``, those that are not named last.

    Raises:
        UsageError: a name that is no source.
    """
    names = [source["name"] for source in sources]
    for name in priority:
        if name not in names:
            raise UsageError(f"priority names {name!r}, which is no source; {nearest(name, names)}")
    order = {name: i for i, name in enumerate(dict.fromkeys(priority))}
    return np.array([order.get(name, len(order)) for name in names], np.uint16)


def text_ranks(tables: Mapping[str, Examples], texts: int, ranks: Array) -> Array:
    """U16 [texts]: the best rank of the sources whose examples name a text."""
    out = np.full(texts, _LAST, np.uint16)
    for table in tables.values():
        rank = ranks[table.provenance]
        np.minimum.at(out, table.query, rank)
        np.minimum.at(out, table.positive, np.repeat(rank, counts_of(table.positive_offsets)))
        np.minimum.at(out, table.negative, np.repeat(rank, counts_of(table.negative_offsets)))
    return out


def compact(texts: Texts, tables: dict[str, Examples]) -> tuple[Texts, dict[str, Examples]]:
    """Drop the texts that no example names and renumber the rows."""
    used = np.zeros(len(texts), bool)
    for table in tables.values():
        used[table.rows()] = True
    new_row = np.cumsum(used).astype(np.uint64) - np.uint64(1)
    return texts.keep(used), {name: t.mapped(new_row) for name, t in tables.items()}


def _paths(against: Any) -> list[Path]:
    if against is None:
        return []
    items = against if isinstance(against, (list, tuple)) else [against]
    paths = [Path(getattr(item, "path", None) or item) for item in items]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "No such evaluation data", str(path))
    return paths


def _clusters(texts: Texts, representative: Array, similarity: Array) -> dict[str, Any]:
    """How many clusters there are and what is in the largest."""
    size = np.bincount(representative.astype(np.int64), minlength=len(texts))
    heads = np.argsort(-size, kind="stable")[:_SAMPLES]
    largest = []
    for head in heads[size[heads] > 1].tolist():
        members = np.flatnonzero(representative == head)
        others = members[members != head][:3].tolist()
        largest.append(
            {
                "size": int(size[head]),
                "representative": leaks.short(texts.get(head)),
                "members": [
                    {
                        "text": leaks.short(texts.get(i)),
                        "similarity": round(float(similarity[i]), 4),
                    }
                    for i in others
                ],
            }
        )
    return {"count": int((size > 1).sum()), "largest": largest}


def summary(report: Mapping[str, Any]) -> str:
    """The report of a dedup stage as a screen of text."""
    texts, clusters, found = report["texts"], report["clusters"], report["leaks"]
    lines = [
        f"  {texts['before']:,} distinct texts, {texts['duplicates']:,} of them duplicates in "
        f"{clusters['count']:,} clusters; {texts['after']:,} texts are left"
    ]
    columns = ("before", "leaked", "duplicates", "same_text", "conflicting", "merged", "after")
    width = max(map(len, ("examples", *report["examples"])))
    lines.append(
        f"  {'examples':>{width}}" + "".join(f" {c.replace('_', ' '):>11}" for c in columns)
    )
    for name, counts in report["examples"].items():
        lines.append(f"  {name:>{width}}" + "".join(f" {counts[c]:>11,}" for c in columns))
    contradictions = sum(counts["conflicts"] for counts in report["examples"].values())
    if contradictions:
        lines.append(f"  {contradictions:,} contradictions between examples, see report.json")
    for cluster in clusters["largest"][:5]:
        lines.append(f"  {cluster['size']:>8,} x {cluster['representative'][:90]}")
    if found["evaluation_texts"]:
        lines.append(
            f"  {found['texts']:,} texts leak into evaluation sets: {found['exact']:,} whole, "
            f"{found['near']:,} nearly, {found['span']:,} by a run"
        )
        lines += [f"  {s['texts']:>8,} in {name}" for name, s in found["sets"].items()]
    return "\n".join(lines)
