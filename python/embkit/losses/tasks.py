"""Each kind of task and the kernel that is its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from embkit import kernels
from embkit.recipe import Train


class Share(Protocol):
    """A global batch among ranks: :class:`embkit.train.parallel.Share`."""

    start: int
    world: int
    rows: int
    ring: bool

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
    share: Share | None = None,
    in_batch: bool = True,
) -> Outcome:
    """The loss of one batch of one task.

    Args:
        embeddings: raw [R, D], one per distinct row of the batch.
        query, positive: int64 [B], hard: int64 [B, H]: positions of each side in ``embeddings``.
        sides: kind of the task, keys, masks, scores and weights.
        dims: MRL widths; their losses are added.
        config: temperature of InfoNCE, scale of CoSENT.
        share: the ranks that have the batch between them; all arguments are of this rank's rows
            then, and what is returned is its part of a sum over ranks.
        in_batch: whether other rows' positives are negatives; False leaves hard negatives only.
    """
    device = embeddings.device

    def side(index: torch.Tensor) -> torch.Tensor:
        # index_select, not indexing: its backward adds repeated rows in a fixed order.
        flat = embeddings.index_select(0, index.reshape(-1).to(device))
        return flat.reshape(*index.shape, embeddings.shape[1])

    q_BD, p_BD = side(query), side(positive)
    if sides.kind == "sts":
        return _cosent(q_BD, p_BD, sides.score.to(device), dims, config, share)
    own = hard.shape[1] > 0
    query_key, positive_key = sides.query_key.to(device), sides.positive_key.to(device)
    weight = sides.weight.to(device)
    options: dict[str, Any] = {}
    if share is None:
        options = {"passage_ids": positive_key, "row_weights": weight}
        p_ND = p_BD
    elif in_batch and share.ring:
        loss, per_dim = kernels.infonce_ring(
            q_BD,
            p_BD,
            dims,
            ring=share,
            query_ids=query_key,
            passage_ids=positive_key,
            row_weights=_shares(weight, share.sum(weight.sum())),
            hard=side(hard) if own else None,
            hard_ids=sides.hard_key.to(device) if own else None,
            hard_mask=sides.hard_mask.to(device) if own else None,
            temperature=config.temperature,
        )
        return Outcome(loss=loss, per_dim=per_dim)
    elif in_batch:
        # Own rows against the passages of all ranks. Rows are weighed by the sum over ranks.
        p_ND, keys, query_keys, weights, there = share.gather(p_BD, positive_key, query_key, weight)
        places = torch.arange(share.start, share.start + len(q_BD), device=device)
        options = {
            "passage_ids": keys,
            "passage_query_ids": query_keys,
            "passage_mask": there,
            "positive_index": places,
            "row_weights": _shares(weight, weights.sum()),
            "reduction": "sum",
        }
    else:  # a row's candidates are its own: nothing is gathered but the sum of the weights
        p_ND = p_BD
        total = share.sum(weight.sum())
        options = {
            "passage_ids": positive_key,
            "row_weights": _shares(weight, total),
            "reduction": "sum",
        }
    loss, per_dim = kernels.infonce(
        q_BD,
        p_ND,
        dims,
        hard=side(hard) if own else None,
        query_ids=query_key,
        hard_ids=sides.hard_key.to(device) if own else None,
        hard_mask=sides.hard_mask.to(device) if own else None,
        temperature=config.temperature,
        in_batch=in_batch,
        **options,
    )
    return Outcome(loss=loss, per_dim=per_dim)


def value_and_grad(
    embeddings: torch.Tensor, *args: Any, **options: Any
) -> tuple[Outcome, torch.Tensor]:
    """The loss of a batch, detached, and its gradient by embedding [R, D], float32 for half types.

    Args:
        embeddings: as for :func:`compute`, with or without a graph, which is not used.
        *args, **options: as for :func:`compute`.
    """
    # Half types hold an embedding; the sum of its gradients from all its places needs more.
    half = embeddings.dtype in (torch.bfloat16, torch.float16)
    leaf = (embeddings.float() if half else embeddings).detach().requires_grad_()
    with torch.enable_grad():
        out = compute(leaf, *args, **options)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
    return Outcome(loss=out.loss.detach(), per_dim=out.per_dim.detach()), gradient


def _cosent(
    a_BD: torch.Tensor,
    b_BD: torch.Tensor,
    labels: torch.Tensor,
    dims: Sequence[int],
    config: Train,
    share: Share | None,
) -> Outcome:
    if share is None:
        loss, per_dim = kernels.cosent((a_BD, b_BD), labels, dims, scale=config.cosent_scale)
        return Outcome(loss=loss, per_dim=per_dim)
    # A cosine needs its own pair only: K numbers a pair go around, not embeddings. Every rank then
    # has the whole loss and the gradient of its own cosines; empty places have no label.
    ascending = sorted(dims)
    cosine_BK = kernels.prefix_cosine(a_BD, b_BD, ascending).t()
    all_NK, all_labels, there = share.gather_own(cosine_BK, labels)
    all_labels = torch.where(there, all_labels, torch.nan)
    loss, per_dim = kernels.cosent(all_NK.t(), all_labels, scale=config.cosent_scale)
    order = torch.tensor([ascending.index(d) for d in dims], device=per_dim.device)
    # The value is counted once over ranks; the gradient is this rank's own already.
    return Outcome(
        loss=loss - loss.detach() * (1 - 1 / share.world),
        per_dim=per_dim.index_select(0, order) / share.world,
    )


def _shares(weight: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Weights over their sum; zeros when that is zero."""
    return weight / torch.where(total > 0, total, 1)


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
