"""Recipes as TOML: read over the defaults, written resolved."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embkit.errors import UsageError
from embkit.recipe.schema import build, plain
from embkit.recipe.whole import Recipe

# What is said by task is one value: that of other data would name tasks that are not there.
_BY_TASK = tuple((s, k) for s in ("prefinetune", "finetune") for k in ("tasks", "batch_sizes"))


def builtin() -> dict[str, Path]:
    """Names and files of the recipes that ship with embkit."""
    folder = Path(__file__).parent.with_name("recipes")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(source: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a TOML file, or the name of a built-in recipe such as ``"quickstart"``.
        overrides: ``"section.key=value"`` strings, values in TOML syntax (bare words are strings).

    Raises:
        UsageError: unknown key (names the nearest), wrong type, or a value out of range.
        FileNotFoundError: no such file and no such built-in recipe.
    """
    table = read_table(source)
    for item in overrides:
        apply_override(table, item)
    return from_table(table, where=str(source))


def read_table(source: Path | str) -> dict[str, Any]:
    """The TOML table of a recipe file or built-in name, unchecked.

    With ``extends = "NAME"`` (a built-in recipe, or a file beside this one) it is laid over that
    recipe's: tables key by key; anything else, and weights and batch sizes of tasks, in the place
    of what was there; "off" takes a table away.

    Raises:
        UsageError: not TOML, or recipes that extend each other in a circle.
        FileNotFoundError: no such recipe.
    """
    return _read_table(source, ())


def _read_table(source: Path | str, over: tuple[Path, ...]) -> dict[str, Any]:
    path = builtin().get(str(source)) or Path(source)
    if not path.is_file():
        known = ", ".join(builtin())
        raise FileNotFoundError(2, f"No such recipe file; built-in recipes: {known}", str(path))
    if path in over:
        raise UsageError("The recipe extends itself.", where=path, fix="break the circle")
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The recipe is not valid TOML: {error}", where=path, fix="correct that line"
        ) from error
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise UsageError(f"extends = {base!r} names no recipe.", where=path)
    found = base if base in builtin() else path.parent / base
    return _laid_over(_read_table(found, (*over, path)), table)


def _laid_over(
    below: dict[str, Any], above: Mapping[str, Any], at: tuple[str, ...] = ()
) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        old, here = out.get(key), (*at, key)
        if _removes(value, old):
            del out[key]
            continue
        both = isinstance(old, dict) and isinstance(value, dict) and here not in _BY_TASK
        out[key] = _laid_over(old, value, here) if both else value  # type: ignore[arg-type]
    return out


def from_table(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from a TOML table; see :func:`load`."""
    return build(Recipe, table, where)


def apply_override(table: dict[str, Any], item: str) -> None:
    """Set one ``section.key=value`` in a TOML table."""
    key, eq, text = item.partition("=")
    if not eq or not key.strip():
        raise UsageError(
            f"--set {item!r} is not KEY=VALUE.", fix="write for example --set finetune.lr=2e-5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    at: Any = table
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise UsageError(f"--set {item!r}: {section} is no section.")
    if _removes(value, at.get(last)):
        del at[last]
    else:
        at[last] = value


def _removes(value: Any, old: Any) -> bool:
    """Whether "off" takes away a table, such as what is said of a task that other data lack."""
    return value == "off" and isinstance(old, dict)


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a plain table: every value, defaults included, None left out."""
    return plain(recipe)


def save(recipe: Recipe, path: Path | str) -> None:
    """Write the resolved recipe as TOML; loading it gives an equal recipe."""
    import tomli_w

    from embkit import _rust

    note = "# Resolved by embkit; `embkit run` with this file repeats the run.\n"
    _rust.publish_file(str(path), (note + tomli_w.dumps(to_table(recipe))).encode())
