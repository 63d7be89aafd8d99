"""AdamW with decoupled weight decay, rates by part, clipping, schedules, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from embkit.errors import CorruptError
from embkit.recipe import Train
from embkit.train.groups import described, groups
from embkit.train.sharding import like, whole

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALE, _GROW = 2.0**16, 2000  # of fp16: the first factor, and good steps until it doubles


def warmup_steps(config: Train) -> int:
    """Steps of the warm-up."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * config.steps)


def learning_rate(config: Train, step: int) -> float:
    """Rate of a step, counted from 0: linear warm-up to ``lr``, then the schedule.

    >>> learning_rate(Train(steps=10, lr=1.0, warmup_ratio=0.2, schedule="linear"), 0)
    0.5
    """
    warmup = warmup_steps(config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, config.steps - math.ceil(config.decay_ratio * config.steps))
        if step < start:
            return config.lr
    share = (step - start) / max(config.steps - start, 1)
    fall = 0.5 * (1 + math.cos(math.pi * share)) if config.schedule == "cosine" else 1 - share
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * fall)


class Optimizer:
    """Steps the trainable parameters of a module, and gives its state as named tensors.

    Args:
        module: what is trained, in the groups of :func:`embkit.train.groups.groups`.
        config: lr and its scales, weight_decay, clip_norm, betas, eps, adamw, ema, precision.

    Attributes:
        scale: what the loss is multiplied by before its gradient is taken: 1, but for fp16, whose
            small gradients would be zero.
    """

    def __init__(self, module: nn.Module, config: Train) -> None:
        self.named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in self.named]
        self.clip_norm, self.ema = config.clip_norm, config.ema
        # Fused is one pass over memory; elementwise, so as deterministic as the plain form.
        self.fused = config.adamw == "fused"
        self.adamw = torch.optim.AdamW(
            groups(module, config),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=self.fused,
            foreach=not self.fused,
        )
        self.count = 0
        self.scaled = config.precision == "fp16"
        self.scale, self._good = (_SCALE if self.scaled else 1.0), 0
        self._average = [p.detach().clone() for p in self.parameters] if self.ema else []

    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups as a checkpoint names them; [] for the plain ones."""
        return described(self.adamw.param_groups)

    def step(self, rate: float) -> float:
        """Clip, update, clear the gradients; returns the norm before clipping.

        When the norm is no finite number nothing is updated. For fp16 that is how the scale is
        found: it is halved then.
        """
        gradients: list[Any] = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaled and gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or math.inf)
        value = float(whole(norm))
        if math.isfinite(value):
            for group in self.adamw.param_groups:
                group["lr"] = rate * group["lr_scale"]
            self.adamw.step()
            self.count += 1
            if self._average:
                live: list[Any] = [p.detach() for p in self.parameters]
                torch._foreach_lerp_(self._average, live, 1 - self.ema)
        if self.scaled:
            self._rescale(math.isfinite(value))
        self.clear()
        return value

    def clear(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def adopt_average(self) -> None:
        """Put the averaged weights in the place of the last ones; nothing without ``ema``."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self._average, strict=False):
                parameter.copy_(average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Averaged weights in the place of the live ones inside; nothing without ``ema``."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self._average, strict=False):
                live = parameter.detach().clone()
                parameter.copy_(average)
                average.copy_(live)

    def tensors(self) -> tuple[dict[str, torch.Tensor], int]:
        """Moments and averages by parameter name, and the number of updates behind them.

        With sharded weights every rank must call this.
        """
        out = {}
        for name, parameter in self.named:
            state = self.adamw.state.get(parameter, {})
            for key in _MOMENTS:
                out[f"{key}.{name}"] = whole(state.get(key, torch.zeros_like(parameter)).detach())
        for (name, _), average in zip(self.named, self._average, strict=False):
            out[f"ema.{name}"] = whole(average)
        if self.scaled:
            out["loss_scale"] = torch.tensor([self.scale, self._good], dtype=torch.float64)
        return out, self.count

    def restore(self, tensors: Mapping[str, torch.Tensor], count: int) -> None:
        """Put back what :meth:`tensors` gave.

        Raises:
            CorruptError: the tensors are of another model or other settings.
        """
        kinds = (*_MOMENTS, *(["ema"] if self.ema else []))
        wanted = {f"{key}.{name}": p.shape for name, p in self.named for key in kinds}
        if self.scaled:
            wanted["loss_scale"] = torch.Size([2])
        if {k: v.shape for k, v in tensors.items()} != wanted:
            raise CorruptError(
                "The optimizer state of the checkpoint is of another model.",
                fix="run the stage again with --fresh",
            )
        for name, parameter in self.named:
            self.adamw.state[parameter] = {
                "step": torch.tensor(
                    float(count), device=parameter.device if self.fused else "cpu"
                ),
                **{key: like(tensors[f"{key}.{name}"], parameter) for key in _MOMENTS},
            }
        if self.ema:
            self._average = [like(tensors[f"ema.{name}"], p) for name, p in self.named]
        if self.scaled:
            self.scale, self._good = (float(x) for x in tensors["loss_scale"])  # type: ignore[assignment]
        self.count = count

    def _rescale(self, good: bool) -> None:
        self._good = self._good + 1 if good else 0
        if not good:
            self.scale /= 2
        elif self._good == _GROW:
            self.scale, self._good = self.scale * 2, 0
