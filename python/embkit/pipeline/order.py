"""The stages of a run: their order, which of them a recipe has, and what each leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

from embkit.errors import UsageError, nearest
from embkit.pipeline.llm import STAGES as LLM_STAGES
from embkit.recipe import Recipe

STAGES = (
    "read",
    "dedup",
    "tokenize",
    "prefinetune",
    "mine",
    "finetune",
    "soup",
    "evaluate",
    "export",
)
# With what a recipe may switch on.
EVERY = (
    *("synth", "read", "dedup", "filter", "judge", "tokenize", "prefinetune", "mine", "relabel"),
    *("mix", "finetune", "soup", "evaluate", "export"),
)
# What each stage publishes in the run directory; scores/ also serves the soup's choice on dev.
OUTPUTS = {
    "synth": ("synth-*",),
    "read": ("records",),
    "dedup": ("clean",),
    "filter": ("filtered",),
    "judge": ("judged",),
    "tokenize": ("store",),
    "prefinetune": ("init", "pre"),
    "mine": ("mined",),
    "relabel": ("relabelled", "store-relabelled", "mined-relabelled"),
    "mix": ("mix",),
    "finetune": ("ft-*",),
    "soup": ("soup", "uniform", "slerp", "search", "mixed"),
    "evaluate": ("scores",),
    "export": ("model",),
}


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe runs, in order."""
    off = {"filter": not recipe.filter.enabled, "mix": not recipe.mix.on}
    off |= {name: not getattr(recipe, name).on for name in LLM_STAGES}
    return tuple(name for name in EVERY if not off.get(name, False))


def place(stage: str | None) -> int | None:
    """Where a stage stands among all."""
    if stage is not None and stage not in EVERY:
        raise UsageError(f"There is no stage {stage!r}; {nearest(stage, EVERY)}")
    return None if stage is None else EVERY.index(stage)


def clear(out: Path, from_stage: str | None) -> None:
    """Remove the outputs of a stage and of all after it."""
    for name in reversed(() if from_stage is None else EVERY[place(from_stage) :]):
        for pattern in OUTPUTS[name]:
            for path in [*out.glob(pattern), *out.glob(f".partial-{pattern}-*")]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
