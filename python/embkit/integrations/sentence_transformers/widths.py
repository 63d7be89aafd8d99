"""What MatryoshkaLoss tells a fused loss: the widths of one call, and their weights."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Prefix widths of the embeddings.

    Attributes:
        dims: distinct, in any order; None is the whole embedding.
        weights: one for each; None is 1 each.
        per_step: how many of them a step draws; 0 or below all.
    """

    dims: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    per_step: int = -1

    @classmethod
    def of(cls, dims: Sequence[int], weights: Sequence[float], per_step: int) -> Widths:
        """Those of a MatryoshkaLoss, in its order."""
        return cls(dims=tuple(dims), weights=tuple(weights), per_step=per_step)

    def drawn(self) -> Widths:
        """The widths of a step, drawn from `random` as the original does.

        A width that is named twice is one of the summed weight.
        """
        if self.dims is None or self.weights is None:
            return self
        places: Iterable[int] = range(len(self.dims))
        if 0 < self.per_step < len(self.dims):
            places = random.sample(range(len(self.dims)), self.per_step)
        sums: dict[int, float] = {}
        for place in places:
            width = self.dims[place]
            sums[width] = sums.get(width, 0) + self.weights[place]
        return Widths(dims=tuple(sums), weights=tuple(sums.values()))

    def weigh(self, losses_K: Tensor, ascending: Sequence[int]) -> Tensor:
        """The weighted sum of one loss for each width, [K] in ascending order."""
        if self.dims is None or self.weights is None:
            return losses_K.sum()
        weight = dict(zip(self.dims, self.weights, strict=True))
        return (losses_K * losses_K.new_tensor([weight[d] for d in ascending])).sum()


class Fused:
    """A loss that takes all widths in one call: `loss_at(features, labels, widths)`, or, where its
    texts are embedded in mini-batches, those of its attribute.

    Attributes:
        widths: set by MatryoshkaLoss around a cached loss, which draws a step's itself.
    """

    widths: Widths = Widths()

    @property
    def fused(self) -> bool:
        """Whether its settings are ones that the kernels have."""
        raise NotImplementedError
