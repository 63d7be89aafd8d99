"""Where the time of a run goes, and how much of the machine's arithmetic it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from embkit.data.batches import Batch as Filled
    from embkit.model import Encoder
    from embkit.train.batches import Batch


@dataclass
class Profile:
    """Seconds of a run by what they were spent on, and the tokens they were spent on."""

    wait: float = 0.0
    forward: float = 0.0
    loss: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    checkpoint: float = 0.0
    negatives: float = 0.0
    refresh: float = 0.0
    evaluation: float = 0.0
    other: float = 0.0
    tokens: int = 0
    padded: int = 0
    steps: int = 0
    flops: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all steps; checkpoints, evaluations and waits for a refresh are left out."""
        model = self.forward + self.loss + self.backward + self.optimizer
        return model + self.wait + self.negatives + self.other

    @property
    def overhead(self) -> float:
        """Share of a step outside forward, loss, backward and optimizer."""
        return (self.wait + self.negatives + self.other) / max(self.total, 1e-12)


class Clock:
    """Adds the time between laps to the fields of a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.last = profile, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        setattr(self.profile, name, getattr(self.profile, name) + now - self.last)
        self.last = now


class Speed:
    """Tokens per second, share of time waited for data, and MFU, from a profile's growth.

    MFU (model FLOP utilisation) counts what the model's definition asks for, on real tokens:
    6 FLOP per token and weight of a linear layer, 12 per pair of tokens, layer and unit of width
    in attention. Padding and what a cached gradient computes twice do not count.

    Args:
        world: ranks that share each batch; numbers are of all of them.
    """

    def __init__(self, profile: Profile, encoder: Encoder, *, world: int = 1) -> None:
        self.profile, self.world = profile, world
        self.linear, self.pair = _flops(encoder.backbone)
        self.peak = peak(encoder.device)
        self._before = (0, 0.0, 0.0, 0.0)

    def count(self, batch: Batch) -> None:
        """Add the work of a step to the profile."""
        self.profile.steps += 1
        for part in (batch.filled, *(other.filled for other in batch.others)):
            n = lengths(part)
            self.profile.tokens += part.tokens
            self.profile.padded += part.padded
            self.profile.flops += self.linear * part.tokens + self.pair * float((n * n).sum())

    def now(self) -> dict[str, float]:
        """Speed since the last call: ``seconds``, ``tokens_per_s``, ``wait``, ``mfu``."""
        p = self.profile
        after = (p.tokens, p.flops, p.total, p.wait)
        tokens, flops, seconds, wait = (b - a for a, b in zip(self._before, after, strict=True))
        self._before = after
        return self._of(tokens, flops, seconds, wait)

    def whole(self) -> dict[str, float]:
        """The same over all steps."""
        p = self.profile
        return self._of(p.tokens, p.flops, p.total, p.wait)

    def _of(self, tokens: float, flops: float, seconds: float, wait: float) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        return {
            "seconds": seconds,
            "tokens_per_s": self.world * tokens / seconds,
            "wait": wait / seconds,
            "mfu": flops / seconds / self.peak.flops,
        }


class Peak(NamedTuple):
    """FLOP/s of a device, and how they are known: ``"measured"`` or ``"table"``."""

    flops: float
    origin: str


# Dense bf16 tensor-core rates by the makers' data sheets, first match first.
_TABLE = (
    ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("B200", 2250e12), ("A100", 312e12),
    ("A10G", 70e12), ("A10", 125e12), ("L40S", 362e12), ("L4", 121e12), ("RTX 4090", 165e12),
    ("MI300X", 1307e12), ("MI250", 383e12),
)  # fmt: skip


def peak(device: torch.device) -> Peak:
    """Peak rate of a device: a GPU's from a table where it is listed, else a measured product."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, flops in _TABLE:
            if known in name:
                return Peak(flops, "table")
    return Peak(_measured(str(device), torch.get_num_threads()), "measured")


@cache
def _measured(device: str, threads: int) -> float:
    """Rate of a float32 product on a CPU (bf16 on a GPU), the best of four, in some 50 ms."""
    import torch

    n, dtype = (768, torch.float32) if device == "cpu" else (4096, torch.bfloat16)
    a = torch.ones(n, n, dtype=dtype, device=device)  # no random numbers: a run has its own
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        float((a @ a)[0, 0])
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def lengths(batch: Filled) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Tokens of each row of a batch, float64 [R]."""
    if "mask" in batch.fields:
        parts = [batch.rectangle(m)[1].sum(1) for m in batch.micro]
    else:
        parts = [np.diff(batch.cu_seqlens(m)) for m in batch.micro]
    return np.concatenate(parts).astype(np.float64)


def _flops(backbone: Any) -> tuple[float, float]:
    """FLOP of a training step per token, and per squared length of a row."""
    from torch import nn

    weights = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    config = backbone.config
    layers = int(getattr(config, "num_hidden_layers", 0))
    return 6.0 * weights, 12.0 * layers * int(getattr(config, "hidden_size", 0))
