"""Whole runs: `embkit demo`, `run`, `explain`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from embkit.cli.words import Fresh, Set

# The quickstart's learning rates are for random weights; trained ones would not survive them.
_GENTLE = (
    "prefinetune.lr=5e-5",
    "finetune.lr=2e-5",
    "runs=[{seed = 0}, {seed = 1, lr = 3e-5}, {seed = 2, cosent_scale = 5.0}]",
)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/quickstart"),
    data: Annotated[
        Path | None, typer.Option("--data", help="A data folder in place of the bundled one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Start from this model, not from scratch.")
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
) -> None:
    """The main job on bundled data: a laptop needs about six minutes."""
    overrides = []
    if data is not None:
        overrides.append(f"data.path={json.dumps(str(data))}")
    if model is not None:
        overrides += [f"model.path={json.dumps(model)}", *_GENTLE]
    overrides += set_ or []
    run("quickstart", out=out, set_=overrides, from_=None, fresh=fresh, dry_run=False)


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a built-in one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory (default runs/NAME).")
    ] = None,
    set_: Set = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Redo this stage and the ones after it.")
    ] = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and sizes; do nothing.")
    ] = False,
) -> None:
    """All stages of a recipe; finished ones are skipped, a killed one resumes."""
    from embkit import pipeline
    from embkit import recipe as recipes

    loaded = recipes.load(recipe, overrides=set_ or ())
    target = out or Path("runs") / loaded.name
    if dry_run:
        print(pipeline.describe(loaded, out=target))
        return
    try:
        pipeline.run(loaded, out=target, from_stage=from_, fresh=fresh)
    except KeyboardInterrupt:  # Typer ends with 130 and says nothing
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        raise


def explain(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a built-in one.")],
    ranks: Annotated[int, typer.Option("--ranks", help="Processes that train together.")] = 1,
    set_: Set = None,
) -> None:
    """The resolved recipe with the origin of each value, and who is a negative of whom."""
    from embkit import pipeline

    print(pipeline.explain(recipe, overrides=set_ or (), ranks=ranks))
