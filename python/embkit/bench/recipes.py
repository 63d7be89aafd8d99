"""The group `recipes`: what each ingredient of a recipe does on real data, and how far it goes.

Every row is a mean over seeds of a small encoder that was trained for minutes on one core, beside
the same without one ingredient, or beside sentence-transformers in the same CPU seconds. The
difference comes with its 95% interval, by drawing queries again. Rows share cells, and cells are
kept (:mod:`embkit.bench.recipes_cells`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Case, Reported, Sample
from embkit.bench import recipes_data as real
from embkit.bench.recipes_cells import Cell, Plan, World
from embkit.bench.rivals import interpreter
from embkit.evaluate.compare import paired_bootstrap

SEEDS = (0, 1, 2)
BUDGET = 30.0  # CPU seconds of a training that is compared with sentence-transformers

REAL = Plan(
    pre=real.PRE, fine=real.FINE, sts=("stsb",), labels=real.LABELS,
    model={"hidden": 128, "layers": 1, "heads": 4, "intermediate": 256, "dims": (128, 64, 32)},
    vocab=16000, query=32, passage=64,
    prefinetune={"steps": 400, "batch_size": 256, "lr": 3e-3, "temperature": 0.05},
    finetune={
        "steps": 60, "batch_size": 128, "lr": 1e-3, "temperature": 0.05, "cosent_scale": 5.0,
    },
    rules={"k": 32, "candidates": 128},
)  # fmt: skip
QUICK = Plan(
    pre=("retrieval",), fine=("retrieval",), sts=("sts",), labels=("classification",),
    model={"hidden": 32, "layers": 1, "heads": 2, "intermediate": 32, "dims": (32, 16)},
    vocab=2000, query=16, passage=24,
    prefinetune={"steps": 6, "batch_size": 64, "lr": 3e-3, "temperature": 0.05},
    finetune={"steps": 4, "batch_size": 32, "lr": 1e-3, "temperature": 0.05},
    rules={"k": 8, "candidates": 32},
)  # fmt: skip

# sentence-transformers' documented recipe, with what a user would try; the best on dev/ counts.
GRID: tuple[Mapping[str, Any], ...] = (
    {"batch": 64, "lr": 5e-4},
    {"batch": 128, "lr": 1e-3},
    {"batch": 128, "lr": 3e-3},
    {"batch": 256, "lr": 2e-3, "cached": True, "sampler": "round_robin"},
    {"batch": 128, "lr": 1e-3, "hard": 2},
    {"batch": 128, "lr": 2e-3, "hard": 1, "labels": True, "sampler": "round_robin"},
)
# Ours, the same number; `our_cell` says which tasks.
OURS: tuple[Mapping[str, Any], ...] = (
    {"lr": 1e-3, "hard_negatives": 0},
    {"lr": 1e-3, "hard_negatives": 0, "ema": 0.95},
    {"lr": 2e-3, "hard_negatives": 0, "ema": 0.97, "batch_size": 256},
    {"lr": 3e-3, "hard_negatives": 0, "ema": 0.97, "batch_size": 256},
    {"lr": 3e-3, "hard_negatives": 0, "ema": 0.95, "batch_size": 512},
    {"lr": 2e-3, "hard_negatives": 2, "ema": 0.97},
)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One ingredient.

    Attributes:
        on, off: the cells with and without it, for any seed.
        expected: what the papers report.
        kinds: kinds of tasks that the mean is over. dim: the width that is scored; 0 the full one.
        best: ``off`` is the best of its seeds, not their mean.
    """

    on: Cell
    off: Cell
    expected: str
    kinds: tuple[str, ...] = ("retrieval",)
    dim: int = 0
    best: bool = False


def ablations(plan: Plan) -> dict[str, Ablation]:
    """The ingredients by name."""
    base = Cell(train={"tasks": "uniform"}, mined=False)
    steps, batch = plan.finetune["steps"], plan.finetune["batch_size"]
    some = [task for task in plan.fine if task in real.FEW]
    again = {"tasks": dict.fromkeys(some or plan.fine, 1.0), "hard_rule": "top", "steps": 2 * steps}
    again["hard_negatives"] = 2
    form = "few" if some else "plain"
    widths = tuple(plan.model["dims"])
    cut = replace(base, dims=widths), replace(base, widths=widths[:1], dims=widths)
    parts = (
        {"tasks": dict.fromkeys(plan.fine, 1.0), "batch_size": batch // 2, "hard_negatives": 2},
        {"tasks": dict.fromkeys(plan.sts, 1.0), "batch_size": batch // 2, "weight": 0.8},
    )
    labels = dict.fromkeys(plan.labels, 1.0)
    apart = plan.shares(retrieval=0.5, sts=0.5, labels=0.0)
    return {
        "hard_negatives": Ablation(
            on=replace(base, train={**base.train, "hard_negatives": 2}, mined=True), off=base,
            expected="better (Gemini Embedding, Gecko, Conan-embedding)",
        ),
        "dynamic": Ablation(
            on=Cell(form=form, train={**again, "dynamic": {"rule": "conan-v2", "first": 0}}),
            off=Cell(form=form, train=again), expected="better (Conan-embedding)",
        ),
        "balance": Ablation(
            on=Cell(train={"parts": parts}),
            off=Cell(train={"tasks": apart, "hard_negatives": 2}),
            kinds=("retrieval", "sts"), expected="better (Conan-embedding)",
        ),
        "matryoshka.narrow": Ablation(
            on=cut[0], off=cut[1], dim=widths[-1],
            expected="better (Gemini Embedding, Gecko)",
        ),
        "matryoshka.full": Ablation(
            on=cut[0], off=cut[1], expected="as good (Gemini Embedding, Gecko)",
        ),
        "format": Ablation(on=replace(base, form="prompted"), off=base, expected="better (Gecko)"),
        "prefinetune": Ablation(
            on=base, off=replace(base, start="random"),
            expected="better (Gemini Embedding, Gecko)",
        ),
        "soup": Ablation(
            on=replace(base, soup=SEEDS), off=base, best=True,
            expected="better than the best run (Gemini Embedding, EmbeddingGemma)",
        ),
        "filter": Ablation(
            on=replace(base, form="filtered"), off=replace(base, form="noisy"),
            expected="better (Conan-embedding, Gemini Embedding)",
        ),
        "uniform": Ablation(
            on=base, off=replace(base, train={"tasks": "size"}),
            kinds=("retrieval", "sts", "classification"), expected="better (Gecko)",
        ),
        "identity_mask": Ablation(
            on=Cell(train={"tasks": labels}, mined=False),
            off=Cell(train={"tasks": labels, "loss": {"mask": "off"}}, mined=False),
            kinds=("classification",), expected="better at classification (Gemini Embedding)",
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Cells of some seeds as one: scores by kind, means of queries or texts, means of seeds.

    ``spread`` is the standard deviation over seeds, empty for one.
    """

    kinds: Mapping[str, float]
    spread: Mapping[str, float]
    items: Mapping[str, Mapping[str, Any]]
    seeds: list[float]
    cpu: float


def found(results: list[dict[str, Any]], *, dim: int = 0, kinds: tuple[str, ...]) -> Found:
    """Join the results of seeds at a width (the full one for 0); ``seeds`` is over ``kinds``."""
    width = str(dim or max(map(int, results[0]["scores"])))
    scores = [result["scores"][width] for result in results]
    items = [result["items"][width] for result in results]
    return Found(
        kinds={kind: float(np.mean([s[kind] for s in scores])) for kind in scores[0]},
        spread={
            kind: float(np.std([s[kind] for s in scores], ddof=1))
            for kind in scores[0]
            if len(scores) > 1
        },
        items={
            kind: {name: np.mean([i[kind][name] for i in items], axis=0) for name in items[0][kind]}
            for kind in items[0]
        },
        seeds=[float(np.mean([s[kind] for kind in kinds])) for s in scores],
        cpu=float(np.sum([result.get("cpu", 0.0) for result in results])),
    )


def ablation(world: World, name: str, one: Ablation, *, seeds: tuple[int, ...]) -> Case:
    """The row of an ingredient."""
    options: dict[str, Any] = {"dim": one.dim, "kinds": one.kinds}
    on_seeds = one.on.soup[:1] or seeds
    on = found([world.result(replace(one.on, seed=s)) for s in on_seeds], **options)
    off = found([world.result(replace(one.off, seed=s)) for s in seeds], **options)
    if one.best:
        best = int(np.argmax(off.seeds))
        off = found([world.result(replace(one.off, seed=seeds[best]))], **options)
    facts = {"expected": one.expected, "kinds": list(one.kinds), "steps": dict(world.plan.finetune)}
    peer = "without" if not one.best else "best run"
    return _case(f"recipes.{name}", on, off, peer, facts, of=one.kinds[0])


def our_cell(plan: Plan, more: Mapping[str, Any], budget: float) -> Cell:
    """One of our settings within a budget."""
    train = {"tasks": "size, 0.8", **more}
    return Cell(train=train, mined=more["hard_negatives"] > 0, budget=budget)


def quality(world: World, *, seeds: tuple[int, ...], budget: float) -> Case:
    """Our fine-tuned model beside sentence-transformers' best of six, on the test sets.

    Both choose among six settings by the mean nDCG@10 of dev/, with one seed; test/ is scored once,
    for the two that were chosen. Mining is not in the budget of either; tokenization is.
    """
    interpreter()  # says what to do where there is none
    ours = [our_cell(world.plan, more, budget) for more in OURS]
    theirs = [Cell(peer=more, budget=budget) for more in GRID]
    chosen, tried = {}, {}
    for who, cells in (("embkit", ours), ("sentence-transformers", theirs)):
        results = [world.result(cell) for cell in cells]
        scores = [found([r], kinds=("retrieval",)).kinds for r in results]
        chosen[who] = cells[int(np.argmax([s["retrieval"] for s in scores]))]
        tried[who] = [
            {"settings": dict(c.peer or c.train), "dev": s, "cpu": r["cpu"], "steps": r["steps"]}
            for c, s, r in zip(cells, scores, results, strict=True)
        ]
    a, b = (
        found(
            [world.result(replace(chosen[who], seed=s, split="test")) for s in seeds],
            kinds=("retrieval",),
        )
        for who in chosen
    )
    facts = {"tried": tried, "chosen": {w: asdict(c) for w, c in chosen.items()}, "budget": budget}
    return _case("recipes.quality", a, b, "sentence-transformers, best of 6", facts, ">= +1.0")


def _case(
    name: str,
    a: Found,
    b: Found,
    peer: str,
    facts: Mapping[str, Any],
    goal: str | None = None,
    of: str = "retrieval",
) -> Case:
    change = paired_bootstrap(a.items[of], b.items[of])
    kinds = {
        who: {k: [round(by[k], 2) for by in (f.kinds, f.spread) if by] for k in f.kinds}
        for who, f in (("embkit", a), (peer, b))
    }
    more = {
        "difference_of": of,
        "difference": round(change.mean, 3),
        "interval": [round(change.low, 3), round(change.high, 3)],
        "kinds_mean_sd": kinds,
        "by_seed": {"embkit": a.seeds, peer: b.seeds},
    }
    return Case(
        name=name, unit="% (mean of kinds)", work=1.0, rounds=1, goal=goal, two_threads=False,
        ours=lambda: Reported(float(np.mean(a.seeds)), Sample(a.cpu, a.cpu, 0)),
        rivals={peer: lambda: Reported(float(np.mean(b.seeds)), Sample(b.cpu, b.cpu, 0))},
        score=float, facts={**facts, **more},
    )  # fmt: skip


def world_of(quick: bool) -> tuple[World, tuple[int, ...]]:
    """The world of EMBKIT_REAL_DATA in the cache, or a small one of the demo's data; its seeds."""
    folder = real.source()
    if quick:
        bundled = Path(__file__).parents[1] / "demo" / "data"
        home = Path(tempfile.mkdtemp(prefix="embkit-bench-"))
        return World(home, bundled, QUICK), SEEDS[:1]
    if folder is None:
        raise ImportError("EMBKIT_REAL_DATA names no folder with pairs/ (docs/benchmarks.md)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = cache / "embkit" / "bench" / "recipes"
    return World(home, real.build(folder, home / "data"), REAL), SEEDS


def _ablation_maker(name: str) -> Callable[[bool], Case]:
    def make(quick: bool) -> Case:
        world, seeds = world_of(quick)
        case = ablation(world, name, ablations(world.plan)[name], seeds=seeds)
        case.close = world.close if quick else None
        return case

    make.__name__ = name
    return make


def best_of_six(quick: bool) -> Case:
    """The row of the quality goal."""
    world, seeds = world_of(quick)
    case = quality(world, seeds=seeds, budget=4.0 if quick else BUDGET)
    case.close = world.close if quick else None
    return case


best_of_six.__name__ = "quality"
CASES: tuple[Callable[[bool], Case], ...] = (
    *(_ablation_maker(name) for name in ablations(REAL)), best_of_six,
)  # fmt: skip
