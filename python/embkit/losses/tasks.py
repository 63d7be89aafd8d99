"""Each kind of task and the kernel that is its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from embkit import kernels
from embkit.recipe import Train


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
        score: float32 [b], gold similarity of an STS pair (zeros otherwise).
        weight: float32 [b] of each row in the loss.
    """

    kind: str
    query_key: torch.Tensor
    positive_key: torch.Tensor
    hard_key: torch.Tensor
    hard_mask: torch.Tensor
    score: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a loss gives: ``loss`` (), and ``per_dim`` [K] in the order of the widths."""

    loss: torch.Tensor
    per_dim: torch.Tensor


def compute(
    embeddings: torch.Tensor,
    query: torch.Tensor,
    positive: torch.Tensor,
    hard: torch.Tensor,
    sides: Sides,
    *,
    dims: Sequence[int],
    config: Train,
) -> Outcome:
    """The loss of one batch of one task.

    Args:
        embeddings: raw [R, D], one per distinct row of the batch.
        query, positive: int64 [B], hard: int64 [B, H]: positions of each side in ``embeddings``.
        sides: kind of the task, keys, masks, scores and weights.
        dims: MRL widths; their losses are added.
        config: temperature of InfoNCE, scale of CoSENT.
    """
    device = embeddings.device

    def side(index: torch.Tensor) -> torch.Tensor:
        # index_select, not indexing: its backward adds repeated rows in a fixed order.
        flat = embeddings.index_select(0, index.reshape(-1).to(device))
        return flat.reshape(*index.shape, embeddings.shape[1])

    q_BD, p_BD = side(query), side(positive)
    if sides.kind == "sts":
        scores = sides.score.to(device)
        loss, per_dim = kernels.cosent((q_BD, p_BD), scores, dims, scale=config.cosent_scale)
        return Outcome(loss=loss, per_dim=per_dim)
    own = hard.shape[1] > 0
    loss, per_dim = kernels.infonce(
        q_BD,
        p_BD,
        dims,
        hard=side(hard) if own else None,
        query_ids=sides.query_key.to(device),
        passage_ids=sides.positive_key.to(device),
        hard_ids=sides.hard_key.to(device) if own else None,
        hard_mask=sides.hard_mask.to(device) if own else None,
        row_weights=sides.weight.to(device),
        temperature=config.temperature,
    )
    return Outcome(loss=loss, per_dim=per_dim)


def explain(config: Train) -> str:
    """Who is a negative of whom, for each kind of task, with the numbers of a configuration.

    >>> print(explain(Train(batch_size=4)).splitlines()[0])
    retrieval: InfoNCE, temperature 0.02, 4 rows of one task.
    """
    b, h = config.batch_size, config.hard_negatives
    others = f"the {b - 1} other rows' positives"
    if config.dynamic.on:
        drawn = f"a slice of those mined for it, which moves on by {config.dynamic.rule}"
    else:
        drawn = "drawn anew each epoch from those mined for it"
    own = f" and its own {h} hard negatives, {drawn}" if h else ""
    return "\n".join(
        [
            f"retrieval: InfoNCE, temperature {config.temperature:g}, {b} rows of one task.",
            f"  candidates of a query: its positive, {others}{own}.",
            "  no negative: a passage in the near-duplicate cluster of the query's positive;",
            "    the positive of a row whose query is in the same cluster; other rows' hard",
            "    negatives; other queries.",
            f"classification: InfoNCE, temperature {config.temperature:g}, {b} rows of one task.",
            "  positive of a text: another text of its class, drawn anew each epoch.",
            f"  candidates: its positive and {others}; texts of its own class are no negatives.",
            f"sts: CoSENT, scale {config.cosent_scale:g}, {b} pairs of one task.",
            "  each pair is ranked against every pair of another gold score; no other negatives.",
        ]
    )
