"""What a loss is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch


class Share(Protocol):
    """A global batch among ranks: :class:`embkit.train.parallel.Share`."""

    start: int
    world: int
    rows: int
    ring: bool
    batch_size: int

    def gather(self, x: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """Rows of every rank, differentiable; then, bool, whether a place has one."""

    def gather_own(self, x: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """The same with a gradient for own rows only."""

    def pass_on(self, tensor: torch.Tensor, *, back: bool = False) -> Callable[[], torch.Tensor]:
        """To a neighbour, while the like comes from the other one."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over ranks."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """What a loss needs of a batch beside the embeddings; b rows, H hard negatives each.

    Losses never mask by row number: two rows may be the same text, or copies of each other. Each
    side carries a key (the text's near-duplicate cluster, or the class), and a candidate is masked
    when its key equals the positive's, or when its own query's key equals the row's: Gemini's rule
    ``q_i = q_j OR p_i = p_j``. Keys are dense int32 per global batch, so they cannot collide.

    Attributes:
        kind: of the task.
        query_key, positive_key: int32 [b]. hard_key: int32 [b, H].
        hard_mask: bool [b, H], False where a row has fewer than H hard negatives.
        score: float32 [b], gold similarity of an STS pair; of other kinds a teacher's score of the
            positive, not finite without one.
        weight: float32 [b] of each row in the loss.
        hard_score: float32 [b, H], a teacher's scores of the hard negatives, not finite where
            there is none.
    """

    kind: str
    query_key: torch.Tensor
    positive_key: torch.Tensor
    hard_key: torch.Tensor
    hard_mask: torch.Tensor
    score: torch.Tensor
    weight: torch.Tensor
    hard_score: torch.Tensor | None = None

    def to(self, device: torch.device) -> Sides:
        """The same on a device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "kind"}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Embeddings of a batch's rows with their keys, all on one device.

    Attributes:
        q, p: raw [b, D]. hard: raw [b, H, D], or None without hard negatives.
        sides: on the same device.
        guide: a guide's vectors of the three, [b, W], [b, W] and [b, H, W] or None; None without.
    """

    q: torch.Tensor
    p: torch.Tensor
    hard: torch.Tensor | None
    sides: Sides
    guide: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loss gives.

    Attributes:
        loss: (), with everything that is added to it.
        per_dim: [K], of each width in the order of the widths, before they are weighed and added.
        d_temperature, d_projection: () of a learned temperature and [D, W] of a projection, from
            :func:`embkit.losses.value_and_grad`.
    """

    loss: torch.Tensor
    per_dim: torch.Tensor
    d_temperature: torch.Tensor | None = None
    d_projection: torch.Tensor | None = None


def shares(weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Weights over their sum; zeros when that is zero."""
    return weight / torch.where(total > 0, total, 1)
