"""Near-duplicate removal and decontamination of records.

The similarity work is Rust's (exact + MinHash LSH + exact verification; n-gram spans); here its
results are joined with the example tables, counted and explained in ``report.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data.clean import ACTIONS, clean_examples
from embkit.data.records import KIND, Records, as_directory, write_records
from embkit.data.sources import read_jsonl
from embkit.data.tables import Array, Examples, Shard, Texts
from embkit.errors import UsageError, nearest
from embkit.progress import bar
from embkit.stage import stage

_SAMPLES = 20
_EXCERPT = 160


def dedup(
    records: Any,
    *,
    out: Path | str,
    threshold: float = 0.8,
    against: Any = None,
    action: str = "merge",
    words: int = 13,
    chars: int = 50,
    seed: int = 0,
    fresh: bool = False,
) -> Records:
    """Merge near-duplicates and remove what leaks into the evaluation sets.

    Args:
        records: a Records, a records directory, or anything :func:`embkit.data.read` takes.
        out: the directory to publish (again records).
        threshold: Jaccard similarity from which two texts count as near-duplicates.
        against: evaluation data: a data folder (its dev/ and test/), a split folder, JSON lines
            files, a records directory, or a list of these. Of a retrieval set the queries and the
            judged passages count, of a classification set the test texts.
        action: what becomes of near-duplicates: ``"merge"``, ``"drop"`` or ``"mark"``.
        words: a run of this many words in common with an evaluation text is a leak.
        chars: ... and it must have at least this many characters.
        seed: of the MinHash permutations.
        fresh: do it again even when it is done.

    Raises:
        UsageError: unknown action, threshold outside (0, 1], or ``against`` holds no texts.
    """
    if action not in ACTIONS:
        raise UsageError(f"Unknown action {action!r}; {nearest(action, ACTIONS)}")
    if not 0 < threshold <= 1:
        raise UsageError(f"threshold = {threshold} is out of range.", fix="above 0, at most 1")
    records = as_directory(records, out)
    evaluation = _paths(against)
    params = {
        "threshold": threshold,
        "action": action,
        "words": words,
        "chars": chars,
        "seed": seed,
    }
    inputs = [records.dir, *evaluation]
    with stage(out, name="dedup", params=params, inputs=inputs, kind=KIND, fresh=fresh) as work:
        if not work.done:
            _run(records, evaluation, work, params)
    return Records.open(out)


def _run(records: Records, evaluation: list[Path], work: Any, params: dict[str, Any]) -> None:
    texts = records.texts
    threshold, seed = params["threshold"], params["seed"]
    with bar("Near-duplicates", total=len(texts), unit="texts") as progress:
        representative, similarity, pairs = _rust.near_duplicates(
            texts.shards, threshold=threshold, seed=seed, progress=progress.update
        )
        progress.update(len(texts))
    representative = np.asarray(representative, np.uint64)
    leaked, leaks = np.zeros(len(texts), bool), {"evaluation_texts": 0}
    if evaluation:
        leaked, leaks = _leaks(texts, evaluation, params)
    tables, counts = {}, {}
    for name, table in records.tasks().items():
        tables[name], counts[name] = clean_examples(
            table, representative=representative, leaked=leaked, action=params["action"]
        )
    cluster = texts.text_id[representative]
    container.save(
        work.dir / "clusters.safetensors",
        {
            "text_id": texts.text_id,
            "cluster": cluster,
            "representative": representative,
            "similarity": np.asarray(similarity, np.float32),
        },
        kind="embkit.clusters",
    )
    report: dict[str, Any] = {
        "texts": {
            "before": len(texts),
            "near_duplicates": int((representative != np.arange(len(texts))).sum()),
            "pairs_checked": int(pairs),
        },
        "examples": counts,
        "clusters": _largest(texts, representative, similarity),
        "leaks": leaks,
    }
    texts = Texts(shards=texts.shards, text_id=texts.text_id, cluster=cluster)
    texts, tables = compact(texts, tables)
    report["texts"]["after"] = len(texts)
    write_records(work, texts, tables, records.manifest["sources"], report)


def compact(texts: Texts, tables: dict[str, Examples]) -> tuple[Texts, dict[str, Examples]]:
    """Drop the texts that no example names and renumber the rows."""
    used = np.zeros(len(texts), bool)
    for table in tables.values():
        used[table.rows()] = True
    new_row = np.cumsum(used).astype(np.uint64) - np.uint64(1)
    return texts.keep(used), {name: t.mapped(new_row) for name, t in tables.items()}


# ---------------------------------------------------------------- leaks


def _leaks(
    texts: Texts, evaluation: list[Path], params: dict[str, Any]
) -> tuple[Array, dict[str, Any]]:
    """Which training texts are in the evaluation sets: exactly, nearly, or by a run of words."""
    held = evaluation_texts(evaluation)
    exact = np.isin(texts.text_id, held.text_id)
    with bar("Near-duplicates of eval", total=len(texts) + len(held), unit="texts") as progress:
        near, near_to = _near(texts, held, params, progress)
    with bar("Leaks", total=len(texts), unit="texts") as progress:
        found = _rust.contamination(
            texts.shards, held.shards, words=params["words"], chars=params["chars"]
        )
        progress.update(len(texts))
    train_row, eval_row, overlap = found["train_row"], found["eval_row"], found["overlap"]
    start, end = found["start"], found["end"]
    span = np.zeros(len(texts), bool)
    span[train_row] = True
    leaked = exact | near | span
    samples = []
    order = np.argsort(-np.asarray(overlap), kind="stable")[:_SAMPLES]
    for i in order.tolist():
        text = texts.get(int(train_row[i]))
        raw = text.encode()[int(start[i]) : int(end[i])]
        samples.append(
            {
                "train": _short(text),
                "evaluation": _short(held.get(int(eval_row[i]))),
                "span": _short(raw.decode("utf-8", "replace")),
                "start": int(start[i]),
                "end": int(end[i]),
                "overlap": round(float(overlap[i]), 4),
            }
        )
    nearly = [
        {"train": _short(texts.get(int(row))), "evaluation": _short(held.get(int(near_to[row])))}
        for row in np.flatnonzero(near & ~exact)[:_SAMPLES].tolist()
    ]
    return leaked, {
        "evaluation_texts": len(held),
        "texts": int(leaked.sum()),
        "exact": int(exact.sum()),
        "near": int((near & ~exact).sum()),
        "span": int((span & ~exact & ~near).sum()),
        "spans": samples,
        "near_samples": nearly,
        "common": _common(held, found),
    }


def _common(held: Texts, found: dict[str, Any]) -> dict[str, Any]:
    """Runs of words that too many training texts share to be leaks: reported, not removed."""
    ngrams, only = found["common"], found["common_only_rows"]
    shown = [
        {
            "span": _short(held.get(row).encode()[start:end].decode("utf-8", "replace")),
            "training_texts": rows,
        }
        for row, start, end, rows in found["common_samples"][:_SAMPLES]
    ]
    return {"ngrams": ngrams, "texts_with_nothing_else": only, "samples": shown}


def _near(texts: Texts, held: Texts, params: dict[str, Any], progress: Any) -> tuple[Array, Array]:
    """Training texts in the near-duplicate cluster of an evaluation text, and which one."""
    representative, _, _ = _rust.near_duplicates(
        [*texts.shards, *held.shards],
        threshold=params["threshold"],
        seed=params["seed"],
        progress=progress.update,
    )
    progress.update(len(texts) + len(held))
    representative = np.asarray(representative, np.int64)
    member = np.full(len(representative), -1, np.int64)  # an evaluation text of each cluster
    member[representative[len(texts) :][::-1]] = np.arange(len(held))[::-1]
    near_to = member[representative[: len(texts)]]
    return near_to >= 0, near_to


def evaluation_texts(paths: Sequence[Path]) -> Texts:
    """The texts of evaluation data that training must not have seen.

    Raises:
        UsageError: a path holds no evaluation texts.
    """
    lines: list[bytes] = []
    builder = _rust.RecordsBuilder()
    for path in paths:
        found = _held_out(path)
        if not found:
            raise UsageError(
                "No evaluation texts here.",
                where=path,
                fix="give a data folder with dev/ or test/, or a JSON lines file",
            )
        lines += [json.dumps({"text": t, "label": "x"}, ensure_ascii=False).encode() for t in found]
    builder.add_lines(b"\n".join(lines) + b"\n", "evaluation", "evaluation", "classification")
    parsed = builder.finish()
    shard: Shard = (parsed["text"], np.asarray(parsed["text_offsets"], np.uint64))
    ids = np.asarray(parsed["text_id"], np.uint64)
    return Texts(shards=[shard], text_id=ids, cluster=ids)


def _held_out(path: Path) -> list[str]:
    from embkit.evaluate.tasks import held_out_texts, is_split

    if path.is_file():
        return _strings(path)
    if (path / "manifest.json").is_file():
        return list(Records.open(path).texts)
    splits = [path] if is_split(path) else [p for p in (path / "dev", path / "test") if p.is_dir()]
    return [text for split in splits for text in held_out_texts(split)]


def _strings(path: Path) -> list[str]:
    """Every text of a JSON lines file, whatever its columns; ids and labels are no texts."""
    out: list[str] = []
    for row in read_jsonl(path):
        for key, value in row.items():
            if key in ("_id", "id", "label", "query_id", "corpus_id", "title"):
                continue
            values = value if isinstance(value, list) else [value]
            out += [v for v in values if isinstance(v, str) and v.strip()]
    return out


def _paths(against: Any) -> list[Path]:
    if against is None:
        return []
    items = against if isinstance(against, (list, tuple)) else [against]
    paths = [Path(getattr(item, "path", None) or item) for item in items]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(2, "No such evaluation data", str(path))
    return paths


# ---------------------------------------------------------------- the report


def _largest(texts: Texts, representative: Array, similarity: Array) -> dict[str, Any]:
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
                "representative": _short(texts.get(head)),
                "members": [
                    {"text": _short(texts.get(i)), "similarity": round(float(similarity[i]), 4)}
                    for i in others
                ],
            }
        )
    return {"count": int((size > 1).sum()), "largest": largest}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
