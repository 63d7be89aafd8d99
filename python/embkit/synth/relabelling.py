"""New positives and hard negatives by a language model: Gecko's second step, Gemini's negatives.

An embedder finds the N nearest passages of each query, the seed among them in any case. The same
language model ranks them twice: by the likelihood of the query after the passage, and by graded
relevance. The ranks are fused, 1 / (c + r_likelihood) + 1 / (c + r_relevance) with c = 0. The first
passage becomes the positive, the last the hard negative.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import container
from embkit.data.dedup import compact
from embkit.data.embeddings import Embeddings
from embkit.data.filter_score import ScoreFilter, Sides
from embkit.data.leaks import short
from embkit.data.records import KIND, Records, as_directory, write_records
from embkit.data.tables import Examples, Texts, offsets_of, owners
from embkit.errors import UsageError
from embkit.progress import bar, say
from embkit.recipe.schema import one_of
from embkit.search import Searcher
from embkit.stage import stage
from embkit.synth.asking import retrieval_tasks
from embkit.synth.llm import LLM
from embkit.synth.prompts import Prompt, Step, load, plain
from embkit.synth.score import graded, query_likelihoods
from embkit.synth.shards import Row, finish, run_shards

_SAMPLES = 20
_ENOUGH = 20  # queries from which a ranking is called no better than chance


@dataclass(frozen=True, kw_only=True)
class Relabel:
    """How passages are ranked and chosen.

    Attributes:
        tasks: retrieval tasks that are relabelled, out of their own passages; all when empty.
        candidates: N, passages that the model ranks for a query.
        constant: c of the fusion.
        positive: ``"best"``: the first passage (Gecko); ``"seed"``: positives stay as they are,
            only hard negatives are chosen (Gemini).
        negative: ``"last"`` of the ranking, ``"random"`` below the positive, or ``"none"``.
        negatives: hard negatives of a query.
        likelihood, relevance: prompts, by name or file.
        token_budget: of the embedder's batches. shard: queries of a shard. seed: of random ones.
    """

    tasks: tuple[str, ...] = ()
    candidates: int = 20
    constant: float = 0.0
    positive: str = "best"
    negative: str = "last"
    negatives: int = 1
    likelihood: str | Path | Prompt = "likelihood"
    relevance: str | Path | Prompt = "relevance"
    token_budget: int = 4096
    shard: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("positive", self.positive, ("best", "seed"))
        one_of("negative", self.negative, ("last", "random", "none"))
        if self.candidates < 2 or self.negatives < 1 or self.shard < 1 or self.seed < 0:
            raise UsageError("candidates, negatives, shard or seed is too small.")
        if not 0 <= self.constant < float("inf"):
            raise UsageError(f"constant = {self.constant} is out of range.", fix="0, or e.g. 60")


def fuse(
    likelihood: NDArray[np.floating], relevance: NDArray[np.floating], constant: float = 0.0
) -> NDArray[np.float64]:
    """Reciprocal rank fusion of two score lists F [n]: larger is better, ties by position.

    >>> fuse(np.array([3.0, 2.0, 1.0]), np.array([1.0, 3.0, 2.0])).round(3).tolist()
    [1.333, 1.5, 0.833]
    """
    total = np.zeros(len(likelihood))
    for scores in (likelihood, relevance):
        rank = np.empty(len(scores))
        rank[np.argsort(-np.asarray(scores), kind="stable")] = np.arange(1, len(scores) + 1)
        total += 1 / (constant + rank)
    return total


def chance(n: int, right: int = 1) -> float:
    """Expected reciprocal rank of the best of some right passages in a random order of n."""
    total, left = 0.0, 1.0
    for rank in range(1, n - right + 2):
        here = left * right / (n - rank + 1)
        total, left = total + here / rank, left - here
    return total


def relabel(
    records: Any,
    *,
    model: Any,
    llm: LLM,
    out: Path | str,
    how: Relabel | None = None,
    fresh: bool = False,
) -> Records:
    """Choose positives and hard negatives of every retrieval task; a stage.

    Args:
        records: what :func:`embkit.data.read` takes; its passages are the corpus, its positives the
            seeds. Other tasks pass as they are.
        model: the embedder: one that was trained on these pairs (``embkit.prefinetune``), as an
            ``Encoder``, directory or run.
        llm: a backend; the query likelihood needs its log-likelihoods.
        out: records directory to publish, with ``relabel-TASK.safetensors`` (candidates and scores)
            and ``report.json``: among others ``mrr``, the mean reciprocal rank of the seed in each
            ranking, beside chance. A relevance no better than chance is said aloud.
        how: settings.
        fresh: do it again even when it is done.

    An example whose candidates cannot be scored keeps its seed and gets no negative; it is counted.

    Raises:
        UsageError: no retrieval task, or a backend without log-likelihoods.
    """
    how = how or Relabel()
    likelihood, relevance = load(how.likelihood), load(how.relevance)
    if len(likelihood.steps) != 1 or not likelihood.steps[0].answer:
        raise UsageError(f"The prompt {likelihood.name!r} has no answer to be likely.")
    grades = relevance.graded
    records = as_directory(records, out)
    score = ScoreFilter(model=model, token_budget=how.token_budget)
    params: dict[str, Any] = {
        "llm": llm.params(), "embedder": score.params(), "likelihood": likelihood.digest,
        "relevance": relevance.digest, "candidates": how.candidates, "constant": how.constant,
        "positive": how.positive, "negative": how.negative, "negatives": how.negatives,
        "shard": how.shard, "seed": how.seed, **({"tasks": list(how.tasks)} if how.tasks else {}),
    }  # fmt: skip
    with stage(out, name="relabel", params=params, inputs=[records.dir], kind=KIND,
               fresh=fresh) as work:  # fmt: skip
        if not work.done:
            _run(records, work, score, llm, how, likelihood.steps[0], grades)
    return Records.open(out)


@dataclass(frozen=True)
class _Job:
    """One example: its query, seeds and candidates, as text rows."""

    task: str
    query: int
    seeds: tuple[int, ...]
    rows: tuple[int, ...]


def _run(
    records: Records, work: Any, score: ScoreFilter, llm: LLM, how: Relabel, likely: Step,
    grades: Step,
) -> None:  # fmt: skip
    texts, tables = records.texts, records.tasks()
    retrieval = retrieval_tasks(tables, how.tasks, records.dir)
    jobs = _candidates(texts, retrieval, score, how, work.dir)

    def judge(start: int, stop: int) -> list[Row]:
        part = jobs[start:stop]
        queries = [plain(texts.get(job.query), one_line=True) for job in part]
        passages = {row: texts.get(row) for job in part for row in job.rows}
        pairs = [
            (q, passages[row]) for q, job in zip(queries, part, strict=True) for row in job.rows
        ]
        ql, why_ql = query_likelihoods(
            llm, [likely.render({"passage": p}) for _, p in pairs], [q for q, _ in pairs]
        )
        rc, why_rc = graded(
            llm,
            [grades.render({"query": q, "passage": p}) for q, p in pairs],
            list(grades.labels.items()),
        )
        found, at = [], 0
        for job in part:
            here = slice(at, at + len(job.rows))
            at += len(job.rows)
            why = [a or b for a, b in zip(why_ql[here], why_rc[here], strict=True)]
            lists = {"ql": ql[here].tolist(), "rc": rc[here].tolist()}
            scores = {
                name: [None if reason else value for value, reason in zip(each, why, strict=True)]
                for name, each in lists.items()
            }
            found.append({**scores, "why": why})
        return found

    rows = run_shards(
        work.dir, len(jobs), how.shard, judge, llm=llm, label="Relabel", unit="queries"
    )
    after = dict(tables)
    report: dict[str, Any] = {"tasks": {}, "samples": [], "model": llm.name}
    for name, table in retrieval.items():
        mine = [(job, row) for job, row in zip(jobs, rows, strict=True) if job.task == name]
        after[name] = _chosen(table, texts, mine, how, work.dir, report)
    finish(work.dir)
    shutil.rmtree(work.dir / "embeddings", ignore_errors=True)  # no part of the output
    texts, after = compact(texts, after)
    write_records(work, texts, after, records.manifest["sources"], report)


def _candidates(
    texts: Texts, tables: dict[str, Examples], score: ScoreFilter, how: Relabel, directory: Path
) -> list[_Job]:
    """The nearest passages of each query; seeds that are not among them take the last places."""
    n = np.uint64(len(texts))
    corpus = np.unique(
        np.concatenate([x for t in tables.values() for x in (t.positive, t.negative)])
    )
    queries = np.unique(np.concatenate([t.query for t in tables.values()]))
    if len(corpus) < 2:
        raise UsageError("There are less than two passages to choose from.")
    # Sides takes row r as a query and texts + r as a passage.
    rows = np.concatenate([queries, corpus + n])
    vectors = Embeddings(
        directory / "embeddings", Sides(score, texts), Sides(score, texts), rows=rows,
        model=str(score.params()),
    )  # fmt: skip
    with bar("Embed", total=len(rows), unit="texts") as progress:
        vectors.fill(progress)
    of_corpus = vectors.get(corpus + n)
    jobs = []
    for name, table in tables.items():
        k = min(how.candidates, len(corpus))
        found = Searcher(vectors.get(table.query), of_corpus, k, engine="exact").search()
        near = corpus[found.row.astype(np.int64)].tolist()
        seeds: list[list[int]] = [[] for _ in range(len(table))]
        own = owners(table.positive_offsets).tolist()
        for i, row in zip(own, table.positive.tolist(), strict=True):
            seeds[i].append(int(row))
        for i, query in enumerate(table.query.tolist()):
            missing = [row for row in dict.fromkeys(seeds[i]) if row not in near[i]][: k - 1]
            others = [row for row in near[i] if row not in seeds[i]]
            drop = set(others[len(others) - len(missing) :]) if missing else set()
            chosen = [row for row in near[i] if row not in drop] + missing
            jobs.append(_Job(name, int(query), tuple(seeds[i]), tuple(map(int, chosen))))
    return jobs


def _chosen(
    table: Examples, texts: Texts, mine: list[tuple[_Job, Row]], how: Relabel, directory: Path,
    report: dict[str, Any],
) -> Examples:  # fmt: skip
    """The table with its new positives and negatives; scores to a file, counts to the report."""
    positives: list[list[int]] = []
    negatives: list[list[tuple[int, float]]] = []
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    ranks: list[int] = []
    mrr: dict[str, list[float]] = {"likelihood": [], "relevance": [], "chance": []}
    columns: dict[str, list[float]] = {"likelihood": [], "relevance": [], "fused": []}
    draw = np.random.default_rng([how.seed, len(table)])
    for job, row in mine:
        reasons.update(why for why in row["why"] if why)
        ok = [i for i, why in enumerate(row["why"]) if not why]
        ql = np.array([row["ql"][i] for i in ok], np.float64)
        rc = np.array([row["rc"][i] for i in ok], np.float64)
        fused = np.full(len(job.rows), np.nan)
        fused[ok] = fuse(ql, rc, how.constant)
        for name, values in (("likelihood", row["ql"]), ("relevance", row["rc"]), ("fused", fused)):
            columns[name] += [np.nan if v is None else float(v) for v in values]
        order = [ok[i] for i in np.argsort(-fused[ok], kind="stable").tolist()]
        ranked = [job.rows[i] for i in order]
        if len(ranked) < 2 or not set(ranked) & set(job.seeds):
            counts["unjudged"] += 1
            positives.append(list(job.seeds))
            negatives.append([])
            continue
        ranks.append(1 + min(ranked.index(seed) for seed in job.seeds if seed in ranked))
        right = np.array([job.rows[i] in job.seeds for i in ok])
        for name, found in (("likelihood", ql), ("relevance", rc)):  # ties count against the seed
            mrr[name].append(1 / (1 + int((found[~right] >= found[right].max()).sum())))
        mrr["chance"].append(chance(len(ok), int(right.sum())))
        best = [ranked[0]] if how.positive == "best" else list(job.seeds)
        changed = ranked[0] not in job.seeds
        counts["judged"] += 1
        counts["changed"] += changed
        positives.append(best)
        same = {int(texts.cluster[p]) for p in best}
        left = [i for i in order if int(texts.cluster[job.rows[i]]) not in same
                and job.rows[i] not in best]  # fmt: skip
        if how.negative == "random":
            left = [left[int(i)] for i in np.sort(draw.permutation(len(left))[: how.negatives])]
        elif how.negative == "none":
            left = []
        negatives.append([(job.rows[i], float(fused[i])) for i in left[-how.negatives :]])
        if changed and len(report["samples"]) < _SAMPLES:
            about = {"task": table.name, "query": short(texts.get(job.query))}
            report["samples"].append(about | {"seed": short(texts.get(job.seeds[0])),
                                              "best": short(texts.get(ranked[0]))})  # fmt: skip
    judged = max(counts["judged"], 1)
    means = {name: round(float(np.mean(values)), 6) for name, values in mrr.items() if values}
    if counts["judged"] >= _ENOUGH and means["relevance"] < 1.2 * means["chance"]:
        say(
            f"{table.name}: relevance ranks the seeds as chance does (mean reciprocal rank "
            f"{means['relevance']:.2f}, chance {means['chance']:.2f}, likelihood "
            f"{means['likelihood']:.2f}). For small models take --relevance yes-no."
        )
    report["tasks"][table.name] = {
        "examples": len(mine), "judged": counts["judged"], "unjudged": counts["unjudged"],
        "best_is_not_seed": counts["changed"],
        "share_best_is_not_seed": round(counts["changed"] / judged, 6),
        "candidates": sum(len(job.rows) for job, _ in mine),
        "rejected_candidates": dict(sorted(reasons.items())),
        "seed_rank_mean": round(float(np.mean(ranks)), 4) if ranks else None,
        "seed_mrr": round(float(np.mean([1 / r for r in ranks])), 6) if ranks else None,
        "mrr": means, "negatives": sum(map(len, negatives)),
    }  # fmt: skip
    container.save(
        directory / f"relabel-{table.name}.safetensors",
        {
            "offsets": offsets_of(np.array([len(job.rows) for job, _ in mine])),
            "text_id": texts.text_id[np.array([r for job, _ in mine for r in job.rows], np.int64)],
            **{name: np.array(values, np.float32) for name, values in columns.items()},
        },
        kind="embkit.relabel",
        metadata={"task": table.name},
    )
    flat = [pair for row in negatives for pair in row]
    return replace(
        table,
        positive_offsets=offsets_of(np.array(list(map(len, positives)))),
        positive=np.array([p for row in positives for p in row], np.uint64),
        negative_offsets=offsets_of(np.array(list(map(len, negatives)))),
        negative=np.array([row for row, _ in flat], np.uint64),
        negative_score=np.array([value for _, value in flat], np.float32),
    )
