"""CoSENTLoss on `embkit.kernels.cosent`: all widths at once, memory that does not grow with B^2."""

from __future__ import annotations

from collections.abc import Iterable

from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as st
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor

from embkit.integrations.sentence_transformers.widths import Fused, Widths
from embkit.kernels import cosent


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
        loss, _ = cosent((a, b), gold, widths.dims, scale=self.scale, dim_weights=widths.weights)
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of two sides [B, D] with gold scores [B] or [B, 1].

        Raises:
            ValueError: another number of labels than pairs.
        """
        a, b, gold = _checked(embeddings, labels)
        loss, _ = cosent(
            (a, b) if self.fused else self.similarity_fct(a, b), gold, scale=self.scale
        )
        return loss


def _checked(embeddings: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = embeddings[0], embeddings[1]
    if labels.numel() != len(a):
        raise ValueError(
            f"CoSENTLoss expects {len(a)} labels, one for each pair; got {tuple(labels.shape)}"
        )
    return a, b, labels.reshape(-1)
