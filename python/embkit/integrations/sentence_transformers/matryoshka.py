"""MatryoshkaLoss that hands all widths to one call of a fused loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers.sentence_transformer import losses as st
from torch import Tensor, nn

from embkit.integrations.sentence_transformers.widths import Fused, Widths


class MatryoshkaLoss(st.MatryoshkaLoss):
    """sentence-transformers' loss modifier, its arguments and value.

    Around a loss of this package, every width is taken in one pass over the embeddings; around any
    other it runs the original's code, a loss for each width.
    """

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
        self.one_pass = isinstance(loss, Fused) and loss.fused
        if self.one_pass and self.uses_gradient_cache:
            # The original has put a loop over widths in the place of this method.
            del loss.calculate_loss
            setattr(loss, "widths", self._widths())  # noqa: B010

    def _widths(self) -> Widths:
        return Widths.of(self.matryoshka_dims, self.matryoshka_weights, self.n_dims_per_step)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The weighted sum of the losses at all widths, or those that the step draws."""
        if not self.one_pass or self.uses_gradient_cache:
            return super().forward(sentence_features, labels)
        return self.loss.loss_at(sentence_features, labels, self._widths().drawn())
