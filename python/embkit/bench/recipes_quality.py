"""The row `recipes.quality`: from raw pairs to a model in the same CPU seconds, beside
sentence-transformers' best of six settings.

Both start from the same random weights and have the same cleaned pairs, widths, tokenizer and
lengths. Tokenization and every stage of the training are inside the budget, so that speed becomes
steps: as many as fit by a probe of forty. Each side chooses among its settings (six,
and four of ours) on dev/, with one seed. The chosen setting of ours is trained again with the steps
that keep the budget by what whole runs took. The peer's settings all get steps until their run took
the budget or more, the chosen one for each seed until it took no less than ours. Both are scored
on test/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from embkit.bench import Case
from embkit.bench import recipes_data as real
from embkit.bench.recipes_cells import Cell, World
from embkit.bench.recipes_rows import REAL, case_of, found, world_of
from embkit.bench.rivals import interpreter
from embkit.errors import EmbkitError

BUDGET = 100.0  # CPU seconds
PAIRS = tuple(dict.fromkeys((*real.PRE, *real.FINE)))
PLAN = replace(REAL, pre=(), fine=PAIRS, passage=256)

# sentence-transformers' documented recipe, with what a user would try.
GRID: tuple[Mapping[str, Any], ...] = (
    {"batch": 64, "lr": 2e-3},
    {"batch": 128, "lr": 1e-3},
    {"batch": 128, "lr": 3e-3},
    {"batch": 256, "lr": 3e-3},
    {"batch": 128, "lr": 3e-3, "sampler": "round_robin"},
    {"batch": 128, "lr": 3e-3, "labels": True},
)
FIRST = {"tasks": dict.fromkeys(real.PRE, 1.0), "batch_size": 256}
OURS: tuple[Mapping[str, Any], ...] = (
    {"batch_size": 256, "lr": 3e-3, "ema": 0.97},
    {"batch_size": 128, "lr": 3e-3, "ema": 0.97},
    {"batch_size": 256, "lr": 1e-3, "ema": 0.97, "first": {**FIRST, "share": 0.5}},
    {"batch_size": 256, "lr": 2e-3, "ema": 0.97, "first": {**FIRST, "share": 0.5}},
)


def our_cell(more: Mapping[str, Any], budget: float) -> Cell:
    """One of our settings within a budget."""
    train = {"tasks": "size, 0.8", "hard_negatives": 0, **more}
    return Cell(train=train, mined=False, start="random", budget=budget)


def kept(world: World, cell: Cell) -> Cell:
    """Our cell with steps whose run takes its budget, to the hundredth share if three runs find it.

    A probe is of the first steps only, and whole runs are up to a quarter slower.
    """
    steps = world.steps(cell)
    for _ in range(3):
        about = world.trained(cell)[1]
        spent = about["before"]
        share = (cell.budget - spent) / (about["cpu"] - spent)
        if abs(share - 1) < 0.01:
            break
        steps = [max(1, round(n * share)) for n in steps]
        settings = {**cell.train, "steps": steps[0]}
        if len(steps) > 1:
            settings["first"] = {**settings["first"], "steps": steps[1]}
        cell = replace(cell, train=settings)
    return cell


def at_least(world: World, cell: Cell, seconds: float) -> Cell:
    """The peer's cell with steps whose run took these CPU seconds or more."""
    for _ in range(5):
        about = world.trained(cell)[1]
        if about["cpu"] >= seconds:
            return cell
        steps = math.ceil(1.02 * about["steps"] * seconds / about["cpu"])
        cell = replace(cell, peer={**(cell.peer or {}), "steps": steps})
    raise EmbkitError(
        f"five runs of {cell.peer} all took less than {seconds:.0f} CPU seconds: the machine is "
        "too unsteady for this row; give it the machine alone"
    )


def quality(world: World, *, seeds: tuple[int, ...], budget: float) -> Case:
    """Our model beside sentence-transformers' best of six, on the test sets."""
    interpreter()  # says what to do where there is none
    ours = [our_cell(more, budget) for more in OURS]
    theirs = [Cell(peer=more, start="random", budget=budget) for more in GRID]
    for cell in (*ours, *theirs):
        world.steps(cell)  # all probes first, so that they alone need a quiet machine
    theirs = [at_least(world, cell, budget) for cell in theirs]
    chosen, tried = {}, {}
    for who, cells in (("embkit", ours), ("sentence-transformers", theirs)):
        results = [world.result(cell) for cell in cells]
        scores = [found([r], kinds=("retrieval",)).kinds for r in results]
        chosen[who] = cells[int(np.argmax([s["retrieval"] for s in scores]))]
        tried[who] = [
            {"settings": dict(c.peer or c.train), "dev": s, "cpu": r["cpu"], "steps": r["steps"]}
            for c, s, r in zip(cells, scores, results, strict=True)
        ]
    us, them = chosen
    chosen[us] = kept(world, chosen[us])
    runs = {us: [replace(chosen[us], seed=seed) for seed in seeds]}
    runs[them] = [
        at_least(world, replace(chosen[them], seed=cell.seed), world.trained(cell)[1]["cpu"])
        for cell in runs[us]
    ]
    took = {who: [world.trained(cell)[1] for cell in each] for who, each in runs.items()}
    a, b = (
        found([world.result(replace(cell, split="test")) for cell in each], kinds=("retrieval",))
        for each in runs.values()
    )
    facts = {
        "tried": tried,
        "chosen": {who: asdict(cell) for who, cell in chosen.items()},
        "budget": budget,
        "cpu_seconds": {who: [about["cpu"] for about in each] for who, each in took.items()},
        "steps": {who: [about["steps"] for about in each] for who, each in took.items()},
    }
    return case_of("recipes.quality", a, b, "sentence-transformers, best of 6", facts, ">= +1.0")


def best_of_six(quick: bool) -> Case:
    """The row of the quality goal."""
    world, seeds = world_of(quick)
    if not quick:
        world = World(world.home / "quality", world.data, PLAN)
    case = quality(world, seeds=seeds, budget=4.0 if quick else BUDGET)
    case.close = world.close if quick else None
    return case


best_of_six.__name__ = "quality"
CASES: tuple[Callable[[bool], Case], ...] = (best_of_six,)
