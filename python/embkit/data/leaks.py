"""Decontamination: training texts that are in an evaluation set, wholly, nearly or by a run.

The comparisons are Rust's; here the evaluation sets are read, and what is found is explained set by
set, with the matched span and its overlap, so that a user can judge it before anything is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data.readers import beir_file, read_jsonl
from embkit.data.records import Records
from embkit.data.tables import Array, Shard, Texts, offsets_of, owners
from embkit.errors import UsageError
from embkit.progress import bar

ACTIONS = ("remove", "mark")
UNITS = ("auto", "words", "chars")
# How a text leaks: bits of the column ``how``.
WHOLE, RUN, NEAR = 1, 2, 4

_NONE = np.uint64(2**64 - 1)  # no near-duplicate
_SAMPLES = 20
_EXCERPT = 160
_NO_TEXT = ("_id", "id", "label", "query_id", "corpus_id", "title")


@dataclass(frozen=True)
class HeldOut:
    """Evaluation texts, set after set; a text of two sets is there twice.

    Attributes:
        shard: the texts of all sets.
        names: the sets.
        set_of: int64 [texts], the set of each text, ascending.
    """

    shard: Shard
    names: tuple[str, ...]
    set_of: Array

    def get(self, row: int) -> str:
        """One text."""
        text, offsets = self.shard
        return bytes(text[int(offsets[row]) : int(offsets[row + 1])]).decode()


def held_out(paths: Sequence[Path]) -> HeldOut:
    """The texts of evaluation data that training must not have seen.

    Args:
        paths: data folders (their dev/ and test/), split folders, BEIR folders, JSON lines files or
            records directories.

    Raises:
        UsageError: a path holds no evaluation texts: nothing to compare with must not pass for
            nothing found.
    """
    sets: dict[str, list[bytes]] = {}
    for path in paths:
        # A lone surrogate becomes a question mark: no training text can hold one.
        found = {n: [t.encode("utf-8", "replace") for t in texts] for n, texts in _sets(path)}
        found = {name: [t for t in texts if t.strip()] for name, texts in found.items()}
        if not any(found.values()):
            raise UsageError(
                "No evaluation texts here.",
                where=path,
                fix="give a data folder with dev/ or test/, a BEIR folder, or a JSON lines file",
            )
        for name, texts in found.items():
            sets.setdefault(name, []).extend(texts)
    texts = [t for found in sets.values() for t in found]
    shard = np.frombuffer(b"".join(texts), np.uint8), offsets_of(np.array([len(t) for t in texts]))
    set_of = np.repeat(np.arange(len(sets)), [len(found) for found in sets.values()])
    return HeldOut(shard, tuple(sets), set_of)


@dataclass(frozen=True)
class Leaks:
    """What training texts have in common with evaluation sets.

    Attributes:
        held: the evaluation texts.
        texts: number of training texts.
        row: int64 [hits], training texts, ascending.
        how: U8 [hits], bits: 1 equal to a whole text, 2 a shared run, 4 a near-duplicate.
        evaluation: int64 [hits], row of an evaluation text: of the longest run, else a near one.
        start, end: U64 [hits], bytes of the longest run in the training text; both 0 without one.
        overlap: F32 [hits], share of the training text's words that lie in shared runs.
        hit, set: int64: which hits are in which sets; a hit of two sets is there twice.
        common: runs that too many training texts share, for the report.
    """

    held: HeldOut
    texts: int
    row: Array
    how: Array
    evaluation: Array
    start: Array
    end: Array
    overlap: Array
    hit: Array
    set: Array
    common: Mapping[str, Any]

    @property
    def leaked(self) -> Array:
        """Bool [texts]."""
        out = np.zeros(self.texts, bool)
        out[self.row] = True
        return out

    def save(self, path: Path, texts: Texts) -> None:
        """Write the table that docs/formats.md describes."""
        container.save(
            path,
            {
                "text_id": texts.text_id[self.row],
                "how": self.how,
                "evaluation": self.evaluation.astype(np.uint64),
                "start": self.start,
                "end": self.end,
                "overlap": self.overlap,
                "sets": offsets_of(np.bincount(self.hit, minlength=len(self.row))),
                "set": self.set.astype(np.uint16),
            },
            kind="embkit.leaks",
        )

    def report(self, texts: Texts) -> dict[str, Any]:
        """Counts in all and by set, and samples of each kind."""
        whole, run, near = ((self.how & bit) > 0 for bit in (WHOLE, RUN, NEAR))
        runs = np.flatnonzero(run | whole)
        runs = runs[np.argsort(-self.overlap[runs], kind="stable")]
        by_set = np.bincount(self.set, minlength=len(self.held.names)).tolist()
        sizes = np.bincount(self.held.set_of, minlength=len(self.held.names)).tolist()
        return {
            "evaluation_texts": len(self.held.set_of),
            "texts": len(self.row),
            "exact": int(whole.sum()),
            "near": int((near & ~whole).sum()),
            "span": int((run & ~near & ~whole).sum()),
            "sets": {
                name: {
                    "evaluation_texts": size,
                    "texts": hits,
                    "share_of_training": round(hits / max(self.texts, 1), 6),
                }
                for name, size, hits in zip(self.held.names, sizes, by_set, strict=True)
            },
            "spans": [self._span(texts, i) for i in runs[:_SAMPLES].tolist()],
            "near_samples": [
                self._pair(texts, i) for i in np.flatnonzero(near & ~whole)[:_SAMPLES].tolist()
            ],
            "common": self.common,
        }

    def _pair(self, texts: Texts, i: int) -> dict[str, Any]:
        at = int(self.evaluation[i])
        return {
            "train": short(texts.get(int(self.row[i]))),
            "evaluation": short(self.held.get(at)),
            "set": self.held.names[int(self.held.set_of[at])],
        }

    def _span(self, texts: Texts, i: int) -> dict[str, Any]:
        start, end = int(self.start[i]), int(self.end[i])
        raw = texts.get(int(self.row[i])).encode()[start:end]
        return {
            **self._pair(texts, i),
            "span": short(raw.decode("utf-8", "replace")),
            "start": start,
            "end": end,
            "overlap": round(float(self.overlap[i]), 4),
        }


def find(texts: Texts, held: HeldOut, params: Mapping[str, Any]) -> Leaks:
    """Compare training texts with evaluation texts: whole, by runs, and as near-duplicates.

    Args:
        params: threshold, seed, words, chars, units, common of :func:`embkit.data.dedup`.
    """
    n = len(texts)
    with bar("Leaks, near", total=n, unit="texts") as progress:
        near_row, _ = _rust.near_matches(
            texts.shards,
            [held.shard],
            threshold=params["threshold"],
            seed=params["seed"],
            progress=progress.update,
        )
        progress.update(n)
    with bar("Leaks, runs", total=n, unit="texts") as progress:
        found = _rust.contamination(
            texts.shards,
            [held.shard],
            words=params["words"],
            chars=params["chars"],
            units=params["units"],
            common=params["common"],
            sets=held.set_of.astype(np.uint32),
            progress=progress.update,
        )
        progress.update(n)
    near_at = np.flatnonzero(near_row != _NONE)
    row = np.union1d(near_at, found["train_row"]).astype(np.int64)
    run_at = np.searchsorted(row, found["train_row"])
    near_hit = np.searchsorted(row, near_at)
    how = np.zeros(len(row), np.uint8)
    how[near_hit] |= NEAR
    how[run_at] |= np.where(found["whole"], WHOLE, RUN).astype(np.uint8)

    def spread(values: Array, dtype: Any) -> Array:
        out = np.zeros(len(row), dtype)
        out[run_at] = values
        return out

    evaluation = np.zeros(len(row), np.int64)
    evaluation[near_hit] = near_row[near_at].astype(np.int64)
    near_set = held.set_of[evaluation[near_hit]]
    evaluation[run_at] = found["eval_row"]
    sets = (
        np.concatenate([near_hit, run_at[owners(found["set_offsets"])]]),
        np.concatenate([near_set, found["sets"].astype(np.int64)]),
    )
    hit, of_set = np.unique(np.stack(sets), axis=1)
    return Leaks(
        held=held,
        texts=n,
        row=row,
        how=how,
        evaluation=evaluation,
        start=spread(found["start"], np.uint64),
        end=spread(found["end"], np.uint64),
        overlap=spread(found["overlap"], np.float32),
        hit=hit,
        set=of_set,
        common=_common(held, found),
    )


def _common(held: HeldOut, found: Mapping[str, Any]) -> dict[str, Any]:
    """Runs that too many training texts share to be leaks: reported, not removed."""
    samples = [
        {
            "span": short(held.get(row).encode()[start:end].decode("utf-8", "replace")),
            "training_texts": rows,
        }
        for row, start, end, rows in found["common_samples"][:_SAMPLES]
    ]
    return {
        "ngrams": found["common"],
        "texts_with_nothing_else": found["common_only_rows"],
        "samples": samples,
    }


def _sets(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Names and texts of the sets below a path."""
    from embkit.evaluate.kinds import held_out_sets, is_split, texts_of
    from embkit.evaluate.tasks import load_retrieval

    if path.is_file():
        yield path.name, _strings(path)
    elif (path / "manifest.json").is_file():
        yield path.name, list(Records.open(path).texts)
    elif beir_file(path, "queries") is not None:
        yield path.name, texts_of(load_retrieval(path))
    else:
        nested = [p for p in (path / "dev", path / "test") if p.is_dir()]
        for split in [path] if is_split(path) else nested:
            for name, texts in held_out_sets(split):
                yield f"{split.name}/{name}", texts


def _strings(path: Path) -> list[str]:
    """Every text of a JSON lines file, whatever its columns; ids and labels are no texts."""
    out: list[str] = []
    for row in read_jsonl(path):
        for key, value in row.items():
            if key not in _NO_TEXT:
                values = value if isinstance(value, list) else [value]
                out += [v for v in values if isinstance(v, str) and v.strip()]
    return out


def short(text: str) -> str:
    """A text for a report: on one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
