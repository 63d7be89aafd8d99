"""Parameters in groups: which decay, and how their learning rate stands to the run's.

    projection          projection_lr_scale (its first numbers may be random, the others are not)
    blocks 1 to N       layer_lr_decay ** (N + 1 - i): the top one decays once
    token embeddings    layer_lr_decay ** (N + 1)
    the rest            1 (norms behind the blocks)

Adapters belong to the block that they are in. Frozen parameters are in no group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from embkit.errors import UsageError
from embkit.model.convert import blocks
from embkit.model.tuning import parameters_of

if TYPE_CHECKING:
    from embkit.recipe import Train


def groups(module: nn.Module, config: Train) -> list[dict[str, Any]]:
    """Groups for AdamW: ``params``, ``weight_decay``, and ``lr_scale``, a factor of the rate.

    Args:
        module: an Encoder, or any module where the rate is one for all. Parameters with two or
            more axes decay, biases and norms do not.
        config: weight_decay, projection_lr_scale, layer_lr_decay.

    Raises:
        UsageError: a rate for a projection that is not there or not trained, or for the blocks of
            a model that has none.
    """
    scales = lr_scales(module, config)
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if parameter.requires_grad:
            key = (scales.get(parameter, 1.0), parameter.ndim >= 2)
            found.setdefault(key, []).append(parameter)
    return [
        {
            "params": found[scale, decays],
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr_scale": scale,
        }
        for scale, decays in sorted(found, reverse=True)
    ]


def lr_scales(module: Any, config: Train) -> dict[nn.Parameter, float]:
    """Factors of the learning rate by parameter, of those that have another than 1."""
    scales: dict[nn.Parameter, float] = {}
    if config.layer_lr_decay != 1:
        body = blocks(module.backbone)
        parts = [parameters_of(module, "embeddings"), *(list(b.parameters()) for b in body)]
        for i, part in enumerate(parts):
            scales |= dict.fromkeys(part, config.layer_lr_decay ** (len(parts) - i))
    if config.projection_lr_scale != 1:
        own = [] if module.projection is None else list(module.projection.parameters())
        if not any(p.requires_grad for p in own):
            raise UsageError(
                f"projection_lr_scale = {config.projection_lr_scale}, and no projection trains.",
                where="projection_lr_scale",
                fix="give the model a projection (model.new_head), take it out of freeze, or leave "
                "projection_lr_scale out",
            )
        scales |= dict.fromkeys(own, config.projection_lr_scale)
    return scales


def described(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a checkpoint names them: how many parameters train at which rate and decay.

    Empty when all train at the run's rate. It checks, on resume, that the model still falls into
    the same parts (another version of transformers may name other blocks).
    """
    if all(group["lr_scale"] == 1 for group in found):
        return []
    return [
        {
            "lr_scale": group["lr_scale"],
            "weight_decay": group["weight_decay"],
            "parameters": len(group["params"]),
            "numbers": sum(p.numel() for p in group["params"]),
        }
        for group in found
    ]
