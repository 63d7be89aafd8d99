"""What the rows of the group `recipes` share: their worlds, seeds as one result, a row's case."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Case, Reported, Sample
from embkit.bench import recipes_data as real
from embkit.bench.recipes_cells import Plan, World
from embkit.evaluate.compare import paired_bootstrap

SEEDS = (0, 1, 2)

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


def case_of(
    name: str,
    a: Found,
    b: Found,
    peer: str,
    facts: Mapping[str, Any],
    goal: str | None = None,
    of: str = "retrieval",
) -> Case:
    """A row: results ``a`` beside ``b``, and the interval of their difference in kind ``of``."""
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
