"""Row `recipes.gemini-smollm2`: Gemini's recipe on a real causal model, before and after.

SmolLM2-135M-Instruct (`make llm`) is made bidirectional, gets mean pooling and a random projection,
and goes through every stage of the recipe's small form but the search of a mixture. A step takes
many seconds on a core, so it is a few steps on a few hundred short pairs: whether the parts work
together and the model learns, not how good it gets. It has no peer but its own start.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from typing import Any

from embkit.bench import Case, llm
from embkit.bench import recipes_systems_data as folders
from embkit.bench.recipes_systems import Bench, System, bench_of, compared, demo, systems

_STEPS = {"batch_size": 32, "warmup_ratio": 0.25}

SYSTEM = System(
    recipe="gemini",
    data="short",
    table={
        "tokenizer": {"max_length_query": 16, "max_length_passage": 24},
        "model": {"bidirectional": True, "new_head": True, "dims": [384, 96]},
        "prefinetune": {
            **_STEPS, "steps": 8, "lr": 2e-4, "tasks": dict.fromkeys(folders.SHORT, 0.5),
        },
        "mine": {"candidates": 16},
        "finetune": {**_STEPS, "steps": 6, "lr": 1e-4},
        "mix": {"candidates": 0},
    },
    pre=folders.SHORT,
    fine=folders.SHORT,
    seeds=(0,),
)  # fmt: skip


def bench() -> Bench:
    """The bench of the row in the cache.

    Raises:
        ImportError: no real data, or no `make llm`.
    """
    model, whole = llm.directory(), bench_of(systems()["gemini"])
    home = whole.home.parent
    data = folders.short(whole.data, home / "data-short")
    return Bench(home, data, SYSTEM, model=model)


def start(of: Bench, seed: int) -> dict[str, Any]:
    """Scores of the model before training, as :meth:`Bench.score` gives them."""
    kept = of.home / f"start-{seed}.json"
    if not kept.is_file():
        kept.write_text(json.dumps(of.score(of.home / f"ours-{seed}" / "init" / "model")))
    return dict(json.loads(kept.read_text()))


def row(of: Bench) -> Case:
    """The exported model beside the one before training, on what was held out."""
    ours, before = [
        [run(seed) for seed in of.system.seeds] for run in (of.ours, partial(start, of))
    ]
    return compared("gemini-smollm2", of, ours, before, "before training", {})


def gemini_smollm2(quick: bool) -> Case:
    """The row; quick takes the demo data and a small BERT."""
    if not quick:
        return row(bench())
    few = demo(SYSTEM)
    table = {**few.system.table, "mix": SYSTEM.table["mix"]}
    few.system = dataclasses.replace(few.system, table=table)
    case = row(few)
    case.close = lambda: shutil.rmtree(few.home.parent, ignore_errors=True)
    return case


gemini_smollm2.__name__ = "gemini-smollm2"  # of --only
CASES = (gemini_smollm2,)
