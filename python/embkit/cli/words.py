"""Options that several verbs have, and what their words mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from embkit.errors import UsageError

Out = Annotated[Path, typer.Option("--out", help="Directory to publish.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value; repeatable."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget finished stages and redo them.")]
Settings = Annotated[
    str,
    typer.Option("--recipe", help="Recipe file or built-in name that gives the settings."),
]


def settings_of(recipe: str, overrides: list[str] | None) -> Any:
    """The recipe that gives a verb its settings."""
    from embkit import recipe as recipes

    return recipes.load(recipe, overrides=overrides or ())


def size_of(text: str) -> int:
    """A size such as 500M or 2G."""
    unit = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:].upper(), 0)
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no size.", fix="write for example 500M or 2G") from None


def numbers_of(text: str, option: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers.", where=option, fix="2,1,1") from None


def wrote(out: Path) -> None:
    """The last line of a verb; of several ranks the first says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"  wrote {out}")
