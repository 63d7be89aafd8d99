"""Which settings of a run decide its model: they are its identity, the others may change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from embkit.errors import UsageError, nearest
from embkit.recipe import Train
from embkit.recipe.schema import changed

# Settings that are newer than the others: not among a run's as long as they change nothing, so that
# runs begun before go on.
_LATER = ("prompt_dropout", "projection_lr_scale", "layer_lr_decay", "batch_sizes")
_DEFAULTS = Train()
# Settings that change what is seen or how fast, not one bit of the model.
_FREE = (
    "data_threads", "log_every", "checkpoint_every", "keep_checkpoints", "watch", "graph_memory",
    "sharding", "shard_ranks", "cpu_offload", "gather", "rank_timeout", "teacher", "device",
)  # fmt: skip


def with_overrides(config: Train | None, overrides: Mapping[str, Any]) -> Train:
    """Settings with single ones replaced; raises UsageError with the nearest name."""
    known = {f.name for f in dataclasses.fields(Train)}
    for key in overrides:
        if key not in known:
            raise UsageError(f"Unknown setting {key!r}.", fix=nearest(key, known))
    return dataclasses.replace(config or Train(), **overrides)


def decisive(config: Train) -> dict[str, Any]:
    """The settings that decide the model, as JSON types."""
    plain = dataclasses.asdict(dataclasses.replace(config, tasks=dict(config.tasks)))
    plain["betas"] = list(config.betas)
    off = () if config.refresh_every else ("refresh_every", "refresh_lag")
    if config.dynamic.on:
        plain["dynamic"] = dataclasses.asdict(config.dynamic.resolved())
    else:
        off = (*off, "dynamic")
    if config.watch.best == "export":
        plain["best"] = config.watch.evaluate_every
    off = (*off, *(name for name in _LATER if plain[name] == getattr(_DEFAULTS, name)))
    plain["loss"] = changed(config.loss)
    off = (*off, *(name for name in ("loss", "losses") if not plain[name]))
    for part in plain["parts"]:
        if not part["loss"]:
            del part["loss"]
    return {key: value for key, value in plain.items() if key not in (*_FREE, *off)}


def judges(config: Train) -> list[str]:
    """The evaluation sets of a run whose output they decide."""
    on = config.watch.evaluate_on
    return [on] if config.watch.best == "export" and on is not None else []
