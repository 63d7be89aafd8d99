"""What `embkit evaluate` does with its words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError

if TYPE_CHECKING:
    from embkit.model import Encoder


def evaluate(
    model: Path,
    on: Path | None,
    *,
    tasks: str | None,
    against: Path | None,
    dims: str | None,
    precision: str,
    leaks: Path | None,
    held_out: Sequence[Path],
    cache: Path | None,
    out: Path | None,
    fresh: bool,
    bf16: bool = False,
) -> str:
    """The text to print: JSON of :func:`embkit.evaluate.evaluate`, or a table of tasks of mteb.

    Raises:
        UsageError: neither a folder nor tasks, both, or options that need tasks without them.
    """
    widths = _widths(dims)
    if (on is None) == (tasks is None):
        raise UsageError(
            "Give a folder of sets or --tasks, one of them.",
            fix=f"embkit evaluate {model} FOLDER, or --tasks STSBenchmark,FOLDER",
        )
    if on is not None:
        of_mteb = {"--against": against, "--leaks": leaks, "--cache": cache}
        needs = [name for name, value in of_mteb.items() if value is not None]
        needs += ["--precision"] if precision != "float" else []
        if needs:
            raise UsageError(f"{needs[0]} goes with --tasks.", fix=f"write --tasks {on}")
        from embkit.evaluate.run import evaluate as score

        result = score(_encoder(model, bf16), on, dims=widths, out=out, fresh=fresh)
        return json.dumps(result, indent=1)
    if bool(held_out) != (leaks is not None):
        raise UsageError(
            "--leaks and --held-out go together.",
            fix="--leaks names the dedup stage, --held-out what it was run --against",
        )
    from embkit.evaluate.benchmark import evaluate_tasks
    from embkit.evaluate.leaked import leaked_texts
    from embkit.evaluate.table import table

    more: dict[str, Any] = {}
    if against is not None:
        other = _name(against)
        other += "-2" * (other == _name(model))
        more = {"against": _encoder(against, bf16), "against_name": other}
    found = evaluate_tasks(
        _encoder(model, bf16),
        _names(tasks or ""),
        name=_name(model),
        dims=widths,
        precisions=[word.strip() for word in precision.split(",")],
        cache=cache,
        leaked=leaked_texts(leaks, held_out) if leaks is not None else (),
        out=out,
        fresh=fresh,
        **more,
    )
    return table(found)


def _encoder(model: Path, bf16: bool) -> Encoder:
    """A model, in bfloat16 when asked for: its digest is another then, and so are kept vectors."""
    from embkit.model import Encoder

    encoder = Encoder.from_pretrained(model).prepack()
    return encoder.bfloat16() if bf16 else encoder


def _names(tasks: str) -> list[str]:
    """Names between commas; a comma in parentheses belongs to a benchmark's name."""
    return [name.strip() for name in re.split(r",(?![^(]*\))", tasks) if name.strip()]


def _widths(dims: str | None) -> list[int] | None:
    if dims is None:
        return None
    try:
        return [int(word) for word in dims.split(",")]
    except ValueError:
        raise UsageError(
            f"{dims!r} is no list of widths.", fix="write for example 768,256"
        ) from None


def _name(model: Path) -> str:
    """``organisation/model`` for mteb's files, from the last two names of a path."""
    parts = [p for p in model.absolute().parts if p not in ("/", "")]
    return "/".join(parts[-2:]) if len(parts) > 1 else f"local/{parts[-1]}"
