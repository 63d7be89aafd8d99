"""Rows of the group `synth` with a real model (`make llm`): how well it ranks real passages.

Scores are kept in the cache by the digest of what decides them, shard by shard: a row that was
interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, Reported, Sample
from embkit.bench import recipes_data as real
from embkit.bench.llm import real_model
from embkit.bench.synth_sample import WORDS, Question, questions
from embkit.synth import fuse
from embkit.synth.prompts import load, plain
from embkit.synth.relabelling import chance
from embkit.synth.score import graded, query_likelihoods
from embkit.synth.shards import Row, run_shards

_VERSION = 1


def folder() -> Path:
    """Where the rows of this group keep what they have."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "embkit" / "bench" / "synth"


def real_data() -> Path:
    """The data folder of the group `recipes`, made of EMBKIT_REAL_DATA.

    Raises:
        ImportError: none is named.
    """
    found = real.source()
    if found is None:
        raise ImportError("EMBKIT_REAL_DATA names no folder with pairs/ (docs/benchmarks.md)")
    return real.build(found, folder().parent / "recipes" / "data")


def scores(llm: Any, asked: Sequence[Question], prompt: str, home: Path, shard: int) -> list[Row]:
    """Scores of every question's candidates by a prompt, ``score`` F64 [n], and CPU seconds.

    Args:
        prompt: ``likelihood`` or a prompt with labels.
        home: folder of the kept shards. shard: questions of one: a set, whose passages recur.
    """
    made = load(prompt)
    about = [_VERSION, shard, llm.params(), made.digest, [[q.query, q.passages] for q in asked]]
    digest = _rust.blake3(json.dumps(about).encode())[:16]
    kept = home / f"{made.name}-{digest}"
    kept.mkdir(parents=True, exist_ok=True)
    step = made.steps[0]

    def work(start: int, stop: int) -> list[Row]:
        part, begun = asked[start:stop], time.process_time()
        queries = [plain(q.query, one_line=True) for q in part for _ in q.passages]
        values = [
            {"query": query, "passage": passage}
            for query, passage in zip(queries, [p for q in part for p in q.passages], strict=True)
        ]
        prompts = [step.render(value) for value in values]
        if step.labels:
            found, why = graded(llm, prompts, list(step.labels.items()))
        else:
            found, why = query_likelihoods(llm, prompts, queries)
        if any(why):
            raise ValueError(f"A passage cannot be scored: {why}")
        spent = (time.process_time() - begun) / len(part)
        ends = np.cumsum([len(q.passages) for q in part])[:-1]
        return [{"score": row.tolist(), "cpu": spent} for row in np.split(found, ends)]

    return run_shards(kept, len(asked), shard, work, llm=llm, label=made.name, unit="questions")


def ranking(name: str, asked: Sequence[Question], found: dict[str, list[Row]]) -> Case:
    """The row: mean reciprocal rank of the first prompt's scores, beside BM25.

    Args:
        found: scores by prompt; those after the first may be of the first questions of each set
            alone.
    """
    ranks = {"BM25": [q.rank(-np.array(q.bm25)) for q in asked]}
    for prompt, rows in found.items():
        of = _match(asked, len(rows))
        ranks[prompt] = [q.rank(np.array(r["score"])) for q, r in zip(of, rows, strict=True)]
    main, *others = found
    facts: dict[str, Any] = {
        "questions": len(asked), "candidates": len(asked[0].passages), "words": WORDS,
        "chance": round(float(np.mean([chance(len(q.passages), len(q.right)) for q in asked])), 3),
        "sets": {who: _by_set(_match(asked, len(r)), r) for who, r in ranks.items()},
        "first": {who: round(float(np.mean([r == 1 for r in rs])), 3) for who, rs in ranks.items()},
    }  # fmt: skip
    for prompt in others:
        few = _match(asked, len(found[prompt]))
        both = [
            q.rank(fuse(np.array(a["score"]), np.array(b["score"])))
            for q, a, b in zip(few, _rows(asked, found[main], few), found[prompt], strict=True)
        ]
        same = [ranks[main][i] for i, q in enumerate(asked) if any(q is one for one in few)]
        facts[f"mrr_{main}_same_questions"] = round(_mrr(same), 4)
        facts[f"mrr_{prompt}"] = round(_mrr(ranks[prompt]), 4)
        facts[f"mrr_{main}+{prompt}"] = round(_mrr(both), 4)
        facts[f"questions_{prompt}"] = len(few)
    cpu = sum(row["cpu"] for row in found[main])
    facts["cpu_seconds"] = {
        who: round(sum(r["cpu"] for r in rows), 1) for who, rows in found.items()
    }
    return Case(
        name=name, unit="MRR", work=1.0, rounds=1, goal=">= 0.45", two_threads=False,
        ours=lambda: Reported(_mrr(ranks[main]), Sample(cpu, cpu, 0)),
        rivals={"BM25": lambda: Reported(_mrr(ranks["BM25"]), Sample(0, 0, 0))},
        score=float, facts=facts,
    )  # fmt: skip


def _mrr(ranks: Sequence[int]) -> float:
    return float(np.mean([1 / rank for rank in ranks]))


def _match(asked: Sequence[Question], count: int) -> list[Question]:
    """The first questions of each set, ``count`` in all."""
    if count == len(asked):
        return list(asked)
    names = list(dict.fromkeys(q.name for q in asked))
    found = []
    for name in names:
        found += [q for q in asked if q.name == name][: count // len(names)]
    return found


def _rows(asked: Sequence[Question], rows: list[Row], few: Sequence[Question]) -> list[Row]:
    place = {id(q): i for i, q in enumerate(asked)}
    return [rows[place[id(q)]] for q in few]


def _by_set(asked: Sequence[Question], ranks: Sequence[int]) -> dict[str, float]:
    by: dict[str, list[int]] = {}
    for question, rank in zip(asked, ranks, strict=True):
        by.setdefault(question.name.split("/")[-1], []).append(rank)
    return {name: round(_mrr(found), 4) for name, found in by.items()}


def _maker(hard: bool) -> Callable[[bool], Case]:
    def make(quick: bool) -> Case:
        data, llm = real_data(), real_model()
        each, graded_each = (2, 1) if quick else (25, 10)
        asked = questions(data, each=each, n=5 if quick else 20, hard=hard)
        few = _match(asked, len(asked) * graded_each // each)
        home = folder() / "rank"
        found = {
            "likelihood": scores(llm, asked, "likelihood", home, each),
            "yes-no": scores(llm, few, "yes-no", home, graded_each),
        }
        if not hard:  # four grades, which so small a model cannot give: fewer, and dear
            least = 1 if quick else 2
            few = _match(asked, len(asked) * least // each)
            found["relevance"] = scores(llm, few, "relevance", home, least)
        return ranking("synth.rank.hard" if hard else "synth.rank", asked, found)

    make.__name__ = "rank_hard" if hard else "rank_random"
    return make


CASES = (_maker(False), _maker(True))
