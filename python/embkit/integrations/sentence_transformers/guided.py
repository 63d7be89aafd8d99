"""GISTEmbedLoss and its cached form on `embkit.kernels.infonce`.

The original broadcasts both models' embeddings to B x N x D for each similarity; here cosines are
products, the guide's masks are made block by block, and neither matrix is kept. One difference: a
text is never a negative of itself. In the original it is where the guide takes anchor and positive
for equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses as st
from sentence_transformers.util import all_gather_with_grad, batch_to_device, get_rank
from torch import Tensor

from embkit.integrations.sentence_transformers.widths import Fused, Widths
from embkit.kernels import infonce


class GISTEmbedLoss(Fused, st.GISTEmbedLoss):
    """sentence-transformers' loss, its arguments and value."""

    @property
    def fused(self) -> bool:
        """Always: the original has no other similarity."""
        return True

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of texts in two or three columns: anchor, positive and perhaps a negative."""
        return self.loss_at(sentence_features, labels, Widths())

    def loss_at(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor, widths: Widths
    ) -> Tensor:
        """The loss of all widths, from one embedding of the texts by either model.

        Raises:
            ValueError: neither two nor three columns.
        """
        columns = list(sentence_features)
        if len(columns) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 columns, got {len(columns)}")
        # Copies for the guide: modules write what they make into the features.
        guide_columns = [dict(column) for column in columns]
        embeddings = embed_columns(self.model, columns)
        with torch.no_grad():
            if self.must_retokenize:
                guide_columns = [self._retokenized(column) for column in columns]
            guides = embed_columns(self.guide, guide_columns)
        return guided_loss(self, embeddings, guides, widths)

    def _retokenized(self, features: dict[str, Any]) -> dict[str, Any]:
        """The same texts as the guide's tokenizer has them."""
        ids = features["input_ids"]
        bounds = features.get("cu_seq_lens_q")
        if bounds is not None:  # rows packed into one
            ids = [part.tolist() for part in ids[0].tensor_split(bounds[1:-1].cpu())]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return dict(batch_to_device(self.guide.preprocess(texts), self.guide.device))


class CachedGISTEmbedLoss(Fused, st.CachedGISTEmbedLoss):
    """The loss of cached gradients, with the original's arguments and value."""

    @property
    def fused(self) -> bool:
        """Always: the original has no other similarity."""
        return True

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        reps_guided: list[list[Tensor]],
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of mini-batches of embeddings; `with_backward` leaves their gradients.

        Raises:
            ValueError: the two models have embedded another number of columns.
        """
        if len(reps) != len(reps_guided):
            raise ValueError(f"{len(reps)} columns, {len(reps_guided)} by the guide")
        embeddings, guides = ([torch.cat(c) for c in columns] for columns in (reps, reps_guided))
        loss = guided_loss(self, embeddings, guides, self.widths.drawn())
        if not with_backward:
            return loss
        loss.backward()
        return loss.detach()


def guided_loss(
    settings: Any, embeddings: Sequence[Tensor], guides: Sequence[Tensor], widths: Widths
) -> Tensor:
    """The loss of anchors, positives and columns of negatives [B, D], with the guide's [B, G].

    Args:
        settings: has `temperature`, `margin`, `margin_strategy`, `contrast_anchors`,
            `contrast_positives`, `gather_across_devices`.
    """
    anchors, place = embeddings[0], torch.arange(len(embeddings[0]), device=embeddings[0].device)
    columns, guide_columns = list(embeddings[1:]), list(guides[1:])
    if settings.gather_across_devices:  # candidates; anchors stay with their rank
        columns = [all_gather_with_grad(column) for column in columns]
        guide_columns = [all_gather_with_grad(column).detach() for column in guide_columns]
        place = place + get_rank() * len(anchors)
    more: dict[str, Any] = {}
    if len(columns) > 1:
        more = {"hard": torch.cat(columns[1:]), "guide_hard": torch.cat(guide_columns[1:])}
    loss, _ = infonce(
        anchors, columns[0], widths.dims, positive_index=place, temperature=settings.temperature,
        same_tower=settings.contrast_anchors, doc_doc=settings.contrast_positives,
        guide_query=guides[0], guide_passage=guide_columns[0], guide_margin=-settings.margin,
        guide_relative=settings.margin_strategy == "relative", dim_weights=widths.weights, **more,
    )  # fmt: skip
    return loss
