"""Types and ranges of the settings of a training stage, also where Python gives them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from embkit.recipe.schema import require

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "bool": (bool,), "str": (str,),
}  # fmt: skip
_WORDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}
# Name to the least and the most; what is left out here has its check where it is explained.
_RANGES: dict[str, tuple[float, float]] = {
    "keep_checkpoints": (1, math.inf),
    "log_every": (1, math.inf),
    "hard_negatives": (0, 2**31 - 1),
    "seed": (-(2**63), 2**63 - 1),
    "mixture_cap": (0, math.inf),
    "weight_decay": (0, math.inf),
    "clip_norm": (0, math.inf),
    "warmup_ratio": (0, 1),
    "decay_ratio": (0, 1),
    "min_lr_ratio": (0, 1),
}


def in_limits(settings: Any) -> None:
    """Check the plain numbers, words and switches of a dataclass.

    Raises:
        UsageError: a value of another type, no finite number, or out of its range.
    """
    for field in dataclasses.fields(settings):
        kind, value = str(field.type), getattr(settings, field.name)
        if kind not in _TYPES:
            continue
        require(
            isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool)),
            f"{field.name} = {value!r} is no {_WORDS[kind]}.",
            f"give a {_WORDS[kind]}" if kind != "bool" else "give true or false",
        )
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"{field.name} = {value} is no finite number.",
            "give a number",
        )
        least, most = _RANGES.get(field.name, (-math.inf, math.inf))
        require(
            kind not in ("int", "float") or least <= value <= most,
            f"{field.name} = {value} is out of range.",
            f"give at least {least:g}" + (f" and at most {most:g}" if most < math.inf else ""),
        )
