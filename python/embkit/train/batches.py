"""A step's batch as torch tensors on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from embkit.data.batches import Batch as Filled
from embkit.data.batches import Batches
from embkit.losses import Sides


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that go through the encoder together: ids, mask int64 [b, L], prompt_len int64 [b]."""

    ids: torch.Tensor
    mask: torch.Tensor
    prompt_len: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's input, valid until the next is taken.

    Attributes:
        filled: the buffers and what the plan says of the step.
        sides: keys, masks, scores and weights of the loss.
        micro: the encoder's input; their embeddings, one after another, are [R, D].
        query, positive: int64 [b], places of each side in those embeddings.
        hard: int64 [b, H].
    """

    filled: Filled
    sides: Sides
    micro: list[MicroBatch]
    query: torch.Tensor
    positive: torch.Tensor
    hard: torch.Tensor

    @classmethod
    def of(cls, filled: Filled, device: torch.device) -> Batch:
        """View the buffer as tensors; for a GPU one asynchronous copy moves the whole step."""
        buffer = torch.from_numpy(filled.buffer)
        if device.type != "cpu":
            buffer = buffer.to(device, non_blocking=True)
            filled.busy = torch.cuda.Event()
            filled.busy.record()
        view = partial(filled.view, buffer, dtype=partial(getattr, torch))
        ids, mask, prompt_len = view("tokens"), view("mask"), view("prompt_len")
        micro = [
            MicroBatch(
                ids=ids[m.tokens].reshape(-1, m.longest),
                mask=mask[m.tokens].reshape(-1, m.longest),
                prompt_len=prompt_len[m.rows],
            )
            for m in filled.micro
        ]
        names = ("query_key", "positive_key", "hard_key", "hard_mask", "score", "weight")
        sides = Sides(kind=filled.kind, **{name: view(name) for name in names})
        places = {name: view(name) for name in ("query", "positive", "hard")}
        return cls(filled=filled, sides=sides, micro=micro, **places)


def stream(
    batches: Batches,
    start: int,
    stop: int,
    *,
    threads: int,
    device: torch.device,
    before: Callable[[int], Any] | None = None,
) -> Iterator[Batch]:
    """The batches of steps ``start`` to ``stop`` in order, assembled ahead by threads."""
    ahead = batches.stream(start, stop, threads=threads, before=before)
    try:
        for filled in ahead:
            yield Batch.of(filled, device)
    finally:
        ahead.close()  # type: ignore[attr-defined]


def allocator(device: torch.device) -> Any:
    """What gives :class:`Batches` its buffers: pinned memory where the model is on a GPU."""
    if device.type != "cuda":
        return None

    def pinned(size: int) -> np.ndarray:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    return pinned
