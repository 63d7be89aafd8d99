"""How many candidates a query has: what the terms of a loss come to in a batch."""

from __future__ import annotations

from dataclasses import dataclass

from embkit.recipe import Loss


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Terms in the denominator of one query, before masks and margins drop any.

    Attributes:
        positive: 1, or 0 where a form leaves the row's own positive out.
        positives: of other rows. queries: of other rows.
        documents: cosines of the row's positive with other rows' positives.
        hard: hard negatives, the row's own or those of all rows.
    """

    positive: int
    positives: int
    queries: int
    documents: int
    hard: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.positive + self.positives + self.queries + self.documents + self.hard

    @classmethod
    def of(cls, loss: Loss, *, rows: int, hard: int) -> Candidates:
        """Those of a loss. Ranks that share a batch change nothing: they meet each other's rows.

        Args:
            rows: of the global batch. hard: negatives of each row.

        >>> Candidates.of(Loss(form="gecko"), rows=4, hard=1).total
        8
        """
        terms = loss.terms()
        return cls(
            positive=int(terms["include_positive"]),
            positives=(rows - 1) * terms["in_batch"],
            queries=(rows - 1) * terms["same_tower"],
            documents=(rows - 1) * terms["doc_doc"],
            hard=hard * (rows if loss.hard == "shared" else 1),
        )
