"""CoSENTLoss in memory that does not grow with B^2.

`embkit.kernels.cosent` takes all widths at once, in tiles of pairs. On a CPU no pair is looked at:

    sum of e^(z_i - z_j) over g_i < g_j = sum over g of (sum of e^-z at g) (sum of e^z below g)

in float64, where a cosine times the scale leaves room for both factors.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as st
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from embkit.integrations.sentence_transformers.widths import Fused, Widths
from embkit.kernels import _dispatch, cosent
from embkit.kernels._common import (
    accumulate_dtype,
    prefix_dots,
    prefix_inverse_norms,
    resolve_dims,
)

_LARGEST_SCALE = 300.0  # e^300 squared is a float64


class CoSENTLoss(Fused, st.CoSENTLoss):
    """sentence-transformers' loss, its arguments and value.

    A `similarity_fct` of the user's own gives the scores, which the kernel then ranks.
    """

    @property
    def fused(self) -> bool:
        """Whether the kernel has this similarity at every width."""
        return self.similarity_fct is pairwise_cos_sim

    def loss_at(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor, widths: Widths
    ) -> Tensor:
        """The loss of all widths, from one embedding of the texts."""
        embeddings = embed_columns(self.model, sentence_features)
        a, b, gold = _checked(embeddings, labels)
        return self._of_cosines(a, b, gold, widths)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of two sides [B, D] with gold scores [B] or [B, 1].

        Raises:
            ValueError: another number of labels than pairs.
        """
        a, b, gold = _checked(embeddings, labels)
        if self.fused:
            return self._of_cosines(a, b, gold, Widths())
        loss, _ = cosent(self.similarity_fct(a, b), gold, scale=self.scale)
        return loss

    def _of_cosines(self, a: Tensor, b: Tensor, gold: Tensor, widths: Widths) -> Tensor:
        plain = a.device.type == "cpu" and _dispatch.requested() == "auto"
        if plain and self.scale <= _LARGEST_SCALE:
            dims, _ = resolve_dims(widths.dims, a.shape[1])
            return widths.weigh(by_grade(a, b, gold, dims, self.scale), dims)
        loss, _ = cosent((a, b), gold, widths.dims, scale=self.scale, dim_weights=widths.weights)
        return loss


def by_grade(a: Tensor, b: Tensor, gold: Tensor, dims: tuple[int, ...], scale: float) -> Tensor:
    """The loss at each width, from sums over the pairs of each gold score.

    Args:
        a, b: sides [B, D]. gold: [B], any that can be sorted.
        dims: widths, ascending.
        scale: at most 300.

    Returns:
        [K], float32 (float64 for float64 sides).
    """
    dtype = accumulate_dtype(a, b)
    a, b = a.to(dtype), b.to(dtype)
    cosine_KB = prefix_dots(a, b, dims) * prefix_inverse_norms(a, dims)
    z_KB = (cosine_KB * prefix_inverse_norms(b, dims)).double() * scale
    grades, grade = torch.unique(gold, return_inverse=True)  # ascending
    empty_KG = z_KB.new_zeros(len(dims), len(grades))
    low_KG = empty_KG.index_add(1, grade, z_KB.exp())
    high_KG = empty_KG.index_add(1, grade, z_KB.neg().exp())
    pairs_K = (high_KG[:, 1:] * low_KG.cumsum(1)[:, :-1]).sum(1)
    return pairs_K.log1p().to(dtype)


def _checked(embeddings: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = embeddings[0], embeddings[1]
    if labels.numel() != len(a):
        raise ValueError(
            f"CoSENTLoss expects {len(a)} labels, one for each pair; got {tuple(labels.shape)}"
        )
    return a, b, labels.reshape(-1)
