"""The score filter: pairs of query and positive whose cosine under a model is too low.

Each distinct text is embedded once per role, in blocks of files in the stage's partial directory: a
killed run keeps the blocks that are done, and memory holds a block whatever the corpus has.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embkit import container
from embkit.data.embeddings import Embeddings
from embkit.data.leaks import short
from embkit.data.tables import Array, Examples, Texts, owners
from embkit.errors import UsageError
from embkit.progress import bar

_SAMPLES = 20
_BINS = 40  # of the histogram, over [-1, 1]


@dataclass(frozen=True, kw_only=True)
class ScoreFilter:
    """Drop positives whose cosine with their query is below a threshold (Conan: 0.4).

    Attributes:
        model: an ``embkit.Encoder``, or a directory or id of an embkit or sentence-transformers
            model.
        threshold: a cosine; the threshold itself passes.
        prompts: texts put before ``"query"`` and ``"passage"`` texts; None for the model's own.
        token_budget: tokens of a micro-batch, padding included.

    Raises:
        UsageError: threshold outside -1 to 1, or an unknown role.
    """

    model: Any
    threshold: float = 0.4
    prompts: Mapping[str, str] | None = None
    token_budget: int = 4096

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise UsageError(
                f"threshold = {self.threshold} is no cosine.", fix="give -1 to 1, e.g. 0.4"
            )
        if self.token_budget < 1:
            raise UsageError(f"token_budget = {self.token_budget} is not positive.")
        for role in self.prompts or {}:
            if role not in ("query", "passage"):
                raise UsageError(f"prompts: unknown role {role!r}.", fix='"query" or "passage"')

    @cached_property
    def encoder(self) -> Any:
        """The model, loaded."""
        from embkit.model import Encoder

        if isinstance(self.model, Encoder):
            return self.model
        return Encoder.from_pretrained(self.model)

    @cached_property
    def sides(self) -> dict[str, str]:
        """The prompt of each role."""
        return {**self.encoder.prompts, **(self.prompts or {})}

    def params(self) -> dict[str, Any]:
        """What decides the scores, for the stage's digest."""
        return {
            "model": self.encoder.digest(),
            "threshold": float(self.threshold),
            "prompts": dict(sorted(self.sides.items())),
        }


@dataclass(frozen=True)
class Scores:
    """Cosine F32 of each positive of a task with its query; NaN where a rule took it out."""

    cosine: Array
    unlike: Array  # bool


class Sides:
    """The texts as rows that an encoder can embed: row r as query, texts + r as passage."""

    def __init__(self, score: ScoreFilter, texts: Texts) -> None:
        self.score, self.texts = score, texts
        self.pooling, self.dims = score.encoder.pooling, score.encoder.dims
        self.prompts = score.sides

    def encode_rows(self, _store: Any, rows: Array, *, progress: Callable[[int], object]) -> Array:
        n, out = len(self.texts), []
        border = int(np.searchsorted(rows, n))
        for role, part, before in (("query", rows[:border], 0), ("passage", rows[border:], border)):
            found = [self.texts.get(int(row) % n) for row in part]
            out.append(
                self.score.encoder.encode(
                    found,
                    role=role,
                    prompt=self.prompts[role],
                    token_budget=self.score.token_budget,
                    progress=lambda done, before=before: progress(before + done),
                )  # fmt: skip
            )
        return np.concatenate(out)


def score_pairs(
    score: ScoreFilter,
    texts: Texts,
    tables: Mapping[str, Examples],
    kept: Mapping[str, tuple[Array, ...]],
    directory: Path,
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Score the positives of every retrieval task.

    Args:
        score: model and threshold.
        texts: the texts that the tables name.
        tables: examples by task; only retrieval tasks are scored.
        kept: per task, bool of each query, positive (and negative): what the rules left.
        directory: where the blocks are, and where ``scores-TASK.safetensors`` go.

    Returns:
        The scores by task, and the part of the report.
    """
    pairs: dict[str, tuple[Array, Array, Array]] = {}
    for name, table in tables.items():
        if table.kind != "retrieval":
            continue
        own = owners(table.positive_offsets)
        wanted = np.flatnonzero(kept[name][0][own] & kept[name][1])
        passage = table.positive[wanted] + np.uint64(len(texts))
        pairs[name] = (wanted, table.query[own[wanted]], passage)
    parts = [side for _, query, passage in pairs.values() for side in (query, passage)]
    rows = np.unique(np.concatenate([np.zeros(0, np.uint64), *parts]))
    out: dict[str, Scores] = {}
    report: dict[str, Any] = {
        **score.params(), "embedded": len(rows), "pairs": 0, "dropped": 0, "tasks": {},
        "samples": [],
    }  # fmt: skip
    counts = np.zeros(_BINS, np.int64)
    blocks = directory / "embeddings"
    sides = Sides(score, texts)
    if len(rows):
        made = json.dumps([report["model"], report["prompts"]])
        vectors = Embeddings(blocks, sides, sides, rows=rows, model=made)
        with bar("Embed", total=len(rows), unit="texts") as progress:
            vectors.fill(progress)
    for name, (wanted, query, passage) in pairs.items():
        table = tables[name]
        cosine = np.full(len(table.positive), np.nan, np.float32)
        if len(wanted):
            cosine[wanted] = vectors.cosine(query, passage)
        unlike = cosine < np.float32(score.threshold)  # NaN is not below
        out[name] = Scores(cosine, unlike)
        container.save(
            directory / f"scores-{name}.safetensors",
            {"positive_offsets": table.positive_offsets, "score": cosine},
            kind="embkit.scores",
            metadata={"task": name, "threshold": repr(float(score.threshold))},
        )
        counts += np.histogram(cosine[wanted].clip(-1, 1), bins=_BINS, range=(-1, 1))[0]
        report["pairs"] += len(wanted)
        report["dropped"] += int(unlike.sum())
        report["tasks"][name] = {"pairs": len(wanted), "dropped": int(unlike.sum())}
        report["samples"] += _samples(texts, table, cosine, np.flatnonzero(unlike))
    report["histogram"] = {
        "edges": [round(-1 + 2 * i / _BINS, 4) for i in range(_BINS + 1)],
        "counts": counts.tolist(),
    }
    report["samples"] = report["samples"][:_SAMPLES]
    shutil.rmtree(blocks, ignore_errors=True)  # not part of the output
    return out, report


def _samples(texts: Texts, table: Examples, cosine: Array, at: Array) -> list[dict[str, Any]]:
    own = owners(table.positive_offsets)
    worst = at[np.argsort(cosine[at], kind="stable")][:_SAMPLES]
    return [
        {
            "task": table.name,
            "query": short(texts.get(int(table.query[own[i]]))),
            "positive": short(texts.get(int(table.positive[i]))),
            "score": round(float(cosine[i]), 4),
        }
        for i in worst.tolist()
    ]
