"""Rows of the group `recipes` with and without one ingredient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embkit.bench import Case
from embkit.bench import recipes_data as real
from embkit.bench.recipes_cells import Cell, Plan, World
from embkit.bench.recipes_rows import REAL, SEEDS, case_of, found, world_of


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
    # The filter leaves these two fewer examples than a batch: the start model does not know them.
    large = [t for t in plan.fine if t not in ("scifact_train", "mbpp_train")]
    kept = {"tasks": dict.fromkeys((*large, *plan.sts, *plan.labels), 1.0)}
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
        "format": Ablation(
            on=replace(base, form="prompted", start="pre-prompted"), off=base,
            expected="better (Gecko)",
        ),
        "prefinetune": Ablation(
            on=base, off=replace(base, start="random"),
            expected="better (Gemini Embedding, Gecko)",
        ),
        "soup": Ablation(
            on=replace(base, soup=SEEDS), off=base, best=True,
            expected="better than the best run (Gemini Embedding, EmbeddingGemma)",
        ),
        "filter": Ablation(
            on=replace(base, form="filtered", train=kept),
            off=replace(base, form="noisy", train=kept),
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
    return case_of(f"recipes.{name}", on, off, peer, facts, of=one.kinds[0])


def _ablation_maker(name: str) -> Callable[[bool], Case]:
    def make(quick: bool) -> Case:
        world, seeds = world_of(quick)
        case = ablation(world, name, ablations(world.plan)[name], seeds=seeds)
        case.close = world.close if quick else None
        return case

    make.__name__ = name
    return make


CASES: tuple[Callable[[bool], Case], ...] = tuple(_ablation_maker(n) for n in ablations(REAL))
