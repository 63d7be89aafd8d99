"""AdamW with decoupled weight decay on matrices, gradient clipping, learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from embkit.errors import CorruptError
from embkit.recipe import Train

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(config: Train, step: int) -> float:
    """Rate of a step, counted from 0: linear warm-up to ``lr``, then the schedule.

    >>> learning_rate(Train(steps=10, lr=1.0, warmup_ratio=0.2, schedule="linear"), 0)
    0.5
    """
    warmup = math.ceil(config.warmup_ratio * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(config.steps - warmup, 1)
    fall = 0.5 * (1 + math.cos(math.pi * share)) if config.schedule == "cosine" else 1 - share
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


class Optimizer:
    """Steps the trainable parameters of a module, and gives its state as named tensors.

    Args:
        module: parameters with two or more axes decay, biases and norms do not.
        config: lr, weight_decay, clip_norm, betas, eps.
    """

    def __init__(self, module: nn.Module, config: Train) -> None:
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        self.clip_norm = config.clip_norm
        groups = [
            {
                "params": [p for p in self.parameters if p.ndim >= 2],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,  # one pass over memory; elementwise, so as deterministic as the plain form
        )
        self.count = 0

    def step(self, rate: float) -> float:
        """Clip, update, clear the gradients; returns the norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf)
        value = float(norm)
        if math.isfinite(value):
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.adamw.step()
            self.count += 1
        self.adamw.zero_grad(set_to_none=True)
        return value

    def tensors(self) -> tuple[dict[str, torch.Tensor], int]:
        """Moments by parameter name, and the number of updates behind them."""
        out = {}
        for name, parameter in self.named:
            state = self.adamw.state.get(parameter, {})
            for key in _MOMENTS:
                out[f"{key}.{name}"] = state.get(key, torch.zeros_like(parameter)).detach()
        return out, self.count

    def restore(self, tensors: Mapping[str, torch.Tensor], count: int) -> None:
        """Put back what :meth:`tensors` gave.

        Raises:
            CorruptError: the tensors are of another model.
        """
        wanted = {f"{key}.{name}": p.shape for name, p in self.named for key in _MOMENTS}
        if {k: v.shape for k, v in tensors.items()} != wanted:
            raise CorruptError(
                "The optimizer state of the checkpoint is of another model.",
                fix="run the stage again with --fresh",
            )
        for name, parameter in self.named:
            self.adamw.state[parameter] = {
                "step": torch.tensor(float(count), device=parameter.device),
                **{key: tensors[f"{key}.{name}"].to(parameter.device) for key in _MOMENTS},
            }
        self.count = count
