"""`infonce` and `value_and_grads`: arguments checked, directions added, widths and rows weighed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import accumulate_dtype, resolve_dims, take_rows, weigh_dims
from .op import infonce_rows, infonce_sum
from .problem import Problem

REDUCTIONS = ("mean", "sum", "none")


def infonce(
    q: Tensor,
    p: Tensor,
    dims: Sequence[int] | None = None,
    *,
    hard: Tensor | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    passage_query_ids: Tensor | None = None,
    hard_ids: Tensor | None = None,
    hard_query_ids: Tensor | None = None,
    passage_mask: Tensor | None = None,
    hard_mask: Tensor | None = None,
    positive_index: Tensor | None = None,
    positive_offsets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    dim_weights: Sequence[float] | Tensor | None = None,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    include_positive: bool = True,
    in_batch: bool = True,
    same_tower: bool = False,
    doc_doc: bool = False,
    symmetric: bool = False,
    hardness_alpha: float = 0.0,
    margin: float | None = None,
    margin_relative: bool = False,
    guide_query: Tensor | None = None,
    guide_passage: Tensor | None = None,
    guide_hard: Tensor | None = None,
    guide_margin: float = 0.0,
    guide_relative: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contrastive loss with in-batch and hard negatives at several embedding widths.

    For row i and each width, with cosines s of the prefixes (normalised here: pass raw vectors),
    z = s / temperature and nLSE over the row's negatives: softplus(nLSE - z_pos), which is
    cross-entropy over the positive and the negatives. A row without negatives has loss 0 and
    gradient 0; so has a zero vector's cosine.

    Args:
        q: queries [B, D], any float dtype; arithmetic is float32 (float64 for float64 inputs).
        p: passages [N, D], N >= B, of which row i's positive is `positive_index[i]`.
        dims: prefix widths in any order; None means (D,).
        hard: [B, H, D] own hard negatives of each row, or [M, D] negatives of every row.
        query_ids: identity of each query [B], int32 or int64. In all ids, a negative value is
            padding: it equals nothing, itself included.
        passage_ids: identity of each passage [N] (text, cluster or class, as the task says).
            Passage j is no negative of row i when it has the id of any of i's positives ...
        passage_query_ids: ... or when this id [N] of the query it is a positive of equals
            query_ids[i]. Default: `query_ids` for the first B passages; required with a
            `positive_index`.
        hard_ids: identity of hard negatives [B, H] or [M]; dropped when equal to a positive's
            passage id (so it needs `passage_ids`).
        hard_query_ids: identity of the query of each hard negative, where it is the positive of
            one, shaped as `hard_ids`; dropped when equal to query_ids[i].
        passage_mask: bool [N], False for padding passages that are nobody's negative.
        hard_mask: bool [B, H] or [M], False for padding.
        positive_index: int64 or int32 [B] (default 0..B-1), or with `positive_offsets` a jagged
            list of passages: row i's positives are positive_index[offsets[i]:offsets[i+1]],
            distinct. Several positives: mean over them of softplus(nLSE - z_pos), none in nLSE.
            A row without positives has loss 0 (and still counts in the mean: weigh it 0).
        positive_offsets: int [B + 1], see `positive_index`.
        temperature: > 0; a one-element tensor gets a gradient.
        dim_weights: [K] in the order of `dims`; None means 1 each, losses simply added.
        row_weights: [B], >= 0, differentiable. The mean divides by their sum (0 if that is 0).
        reduction: "mean", "sum" or "none".
        include_positive: False leaves the positive out of the denominator, loss nLSE - z_pos
            (Gemini Embedding 1 and EmbeddingGemma as printed).
        in_batch: False drops passages as negatives: hard negatives only (Conan, Nemotron).
        same_tower: add other queries to each row's negatives (Gecko, SamToNe, Qwen3), masked by
            query id and by positives' ids.
        doc_doc: add s(positive_i, passage_j) with the masks of passages (Qwen3).
        symmetric: mean with the loss of the opposite direction: each positive against all
            queries, without hard negatives; `same_tower` and `doc_doc` change roles there.
        hardness_alpha: adds alpha * s, gradient stopped, to hard negatives' logits
            (EmbeddingGemma: 5.0).
        margin: drop a negative whose cosine exceeds the positive's (the lowest, if several) by
            more than this, per width, gradient stopped (Qwen3: 0.1). May be negative.
        margin_relative: the margin is a share of the positive's absolute cosine: -0.05 keeps what
            is at most 95 % of a cosine above 0 (NV-Retriever's rule). No Triton kernel: the
            reference runs on every device.
        guide_query, guide_passage: vectors of another model [B, W] and [N, W], which decide what
            is a negative (GISTEmbed): a candidate goes when the guide's cosine of its pair (query
            and passage, query and query, or positive and passage) exceeds that of the row's query
            and positive by more than `guide_margin`. Raw vectors; no gradient. No Triton kernel.
        guide_hard: the same of `hard`, shaped as it but for the width.
        guide_margin, guide_relative: as `margin` and `margin_relative`, of the guide's cosines.

    Returns:
        The loss, summed over widths with `dim_weights`, and the unweighted loss at each width in
        the order of `dims`, detached: () and [K], or [B] and [K, B] for reduction="none".
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, ids or options that do not fit together.
        TypeError: embeddings that are not floating point, or ids that are not integers.

    Example:
        >>> q, p = torch.eye(3), torch.eye(3)
        >>> loss, per_dim = infonce(q, p, (3, 2), temperature=1.0)
        >>> [round(x, 4) for x in per_dim.tolist()]
        [0.5514, 0.7338]
    """
    _check_embeddings(q, p, hard)
    batch, columns = q.shape[0], p.shape[0]
    ascending, order = resolve_dims(dims, q.shape[1])
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}; use one of {', '.join(REDUCTIONS)}")
    if not (in_batch or same_tower or doc_doc or hard is not None):
        raise ValueError("in_batch=False without hard negatives leaves no candidate at all")
    if positive_offsets is not None:
        if positive_index is None:
            raise ValueError("positive_offsets needs positive_index (the jagged values)")
        if doc_doc or symmetric:
            raise ValueError("doc_doc and symmetric need one positive a row, not positive_offsets")
        _check_ids("positive_offsets", positive_offsets, (batch + 1,))
    elif positive_index is not None:
        _check_ids("positive_index", positive_index, (batch,))
    elif columns < batch:
        raise ValueError(f"{batch} queries but {columns} passages; give positive_index")
    if hard_ids is not None and (passage_ids is None or hard is None):
        raise ValueError("hard_ids are compared with passage_ids of the positives: pass both")
    if hard_query_ids is not None and (query_ids is None or hard is None):
        raise ValueError("hard_query_ids are compared with query_ids: pass both, and hard")
    if hard_mask is not None and hard is None:
        raise ValueError("hard_mask without hard")
    if query_ids is not None and passage_query_ids is None:
        if positive_index is not None:
            raise ValueError("query_ids with positive_index needs passage_query_ids [N]")
        passage_query_ids = torch.nn.functional.pad(query_ids, (0, columns - batch), value=-1)
    hard_shape = () if hard is None else tuple(hard.shape[:-1])
    for name, ids, shape in (
        ("query_ids", query_ids, (batch,)),
        ("passage_ids", passage_ids, (columns,)),
        ("passage_query_ids", passage_query_ids, (columns,)),
        ("hard_ids", hard_ids, hard_shape),
        ("hard_query_ids", hard_query_ids, hard_shape),
        ("passage_mask", passage_mask, (columns,)),
        ("hard_mask", hard_mask, hard_shape),
    ):
        if ids is not None:
            _check_ids(name, ids, shape)

    if isinstance(temperature, Tensor):
        tau = temperature.reshape(())
    elif temperature > 0:
        tau = torch.tensor(temperature, dtype=accumulate_dtype(q, p, hard), device=q.device)
    else:
        raise ValueError(f"temperature={temperature} must be > 0")

    _check_guide(q, p, hard, guide_query, guide_passage, guide_hard)
    arange = torch.arange(batch, device=q.device)
    index = arange if positive_index is None else positive_index.to(torch.int64)
    forward = Problem(
        dims=ascending,
        positive_index=index,
        positive_offsets=positive_offsets,
        query_ids=query_ids,
        passage_ids=passage_ids,
        passage_query_ids=passage_query_ids,
        hard_ids=hard_ids,
        hard_query_ids=hard_query_ids,
        passage_mask=None if passage_mask is None else passage_mask.bool(),
        hard_mask=None if hard_mask is None else hard_mask.bool(),
        include_positive=include_positive,
        in_batch=in_batch,
        same_tower=same_tower,
        doc_doc=doc_doc,
        hardness_alpha=float(hardness_alpha),
        margin=None if margin is None else float(margin),
        margin_relative=margin_relative,
        guide_query=guide_query,
        guide_passage=guide_passage,
        guide_hard=guide_hard,
        guide_margin=float(guide_margin),
        guide_relative=guide_relative,
    )
    directions: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Problem]]
    directions = [(q, p, hard, tau, forward)]
    if symmetric:
        if not in_batch:
            raise ValueError("symmetric needs in_batch: the reverse direction has nothing else")
        own = p[:batch] if positive_index is None else take_rows(p, index)
        own_ids = None if passage_ids is None else take_rows(passage_ids, index)
        reverse = Problem(
            dims=ascending,
            positive_index=arange,
            query_ids=own_ids,
            passage_ids=query_ids,
            passage_query_ids=own_ids,
            include_positive=include_positive,
            same_tower=doc_doc,
            doc_doc=same_tower,
            margin=forward.margin,
            margin_relative=margin_relative,
            guide_query=None if guide_passage is None else take_rows(guide_passage, index),
            guide_passage=guide_query,
            guide_margin=forward.guide_margin,
            guide_relative=guide_relative,
        )
        directions.append((own, q, None, tau, reverse))

    row_b = _row_weights(row_weights, q.new_ones(batch, dtype=accumulate_dtype(q, p, hard)))
    row_b = row_b / len(directions)
    if reduction == "none":
        rows_kb = torch.stack([infonce_rows(*direction) for direction in directions]).sum(0) * row_b
        loss, per_dim = weigh_dims(rows_kb, order, dim_weights)
        return loss, per_dim.detach()
    if reduction == "mean":
        # An empty micro-batch has weights 0: its loss is 0, not NaN.
        total = row_b.sum() * len(directions)
        row_b = row_b / torch.where(total > 0, total, 1)
    dim_k = _dim_weights(dim_weights, order, row_b)
    results = [infonce_sum(*direction, dim_k[:, None] * row_b) for direction in directions]
    loss = torch.stack([loss for loss, _ in results]).sum()
    per_dim = (torch.stack([rows for _, rows in results]).sum(0) * row_b.detach()).sum(1)
    return loss, torch.stack([per_dim[i] for i in order])


def value_and_grads(
    q: Tensor,
    p: Tensor,
    dims: Sequence[int] | None = None,
    *,
    hard: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Loss and gradients in one call, detached from any graph: what GradCache needs.

    Args:
        q, p, dims, hard, temperature: as for `infonce`.
        **options: every other keyword of `infonce`; reduction "mean" or "sum".

    Returns:
        (loss (), loss_per_dim [K], dq, dp, d_hard or None, d_temperature ()), gradients in the
        dtype of their inputs, all of the sum over widths.

    Raises:
        ValueError: reduction="none", which has no one gradient.

    Example:
        >>> loss, per_dim, dq, dp, dhard, dtau = value_and_grads(torch.eye(2), torch.eye(2))
        >>> dq.shape, dhard
        (torch.Size([2, 2]), None)
    """
    if options.get("reduction") == "none":
        raise ValueError("value_and_grads needs reduction 'mean' or 'sum'")
    with torch.enable_grad():
        q_leaf, p_leaf = q.detach().requires_grad_(), p.detach().requires_grad_()
        dtype = accumulate_dtype(q, p, hard)
        tau = torch.as_tensor(temperature, dtype=dtype, device=q.device).detach().reshape(())
        tau = tau.clone().requires_grad_()
        hard_leaf = None if hard is None else hard.detach().requires_grad_()
        wanted = [q_leaf, p_leaf, tau, *([] if hard_leaf is None else [hard_leaf])]
        loss, per_dim = infonce(q_leaf, p_leaf, dims, hard=hard_leaf, temperature=tau, **options)
        dq, dp, dtau, *rest = torch.autograd.grad(loss, wanted)
    return loss.detach(), per_dim.detach(), dq, dp, rest[0] if rest else None, dtau


def _row_weights(row_weights: Tensor | None, ones: Tensor) -> Tensor:
    if row_weights is None:
        return ones
    if row_weights.shape != ones.shape:
        raise ValueError(
            f"row_weights has shape {tuple(row_weights.shape)}, q has {len(ones)} rows"
        )
    return row_weights.to(ones.dtype)


def _dim_weights(
    dim_weights: Sequence[float] | Tensor | None, order: Sequence[int], like: Tensor
) -> Tensor:
    """Weights [K] in ascending order of widths."""
    if dim_weights is None:
        return like.new_ones(len(order))
    weights = torch.as_tensor(dim_weights, dtype=like.dtype, device=like.device)
    if weights.shape != (len(order),):
        raise ValueError(f"dim_weights has shape {tuple(weights.shape)}, dims has {len(order)}")
    return torch.stack([weights[order.index(k)] for k in range(len(order))])


def _check_embeddings(q: Tensor, p: Tensor, hard: Tensor | None) -> None:
    for name, x, ranks in (("q", q, (2,)), ("p", p, (2,)), ("hard", hard, (2, 3))):
        if x is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, want floating point")
        if x.dim() not in ranks:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, want rank {ranks}")
        if x.shape[-1] != q.shape[-1]:
            raise ValueError(f"{name} is {x.shape[-1]} wide, q is {q.shape[-1]}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    if hard is not None and hard.dim() == 3 and hard.shape[0] != q.shape[0]:
        raise ValueError(f"hard has {hard.shape[0]} rows, q has {q.shape[0]}")


def _check_guide(
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    guide_query: Tensor | None,
    guide_passage: Tensor | None,
    guide_hard: Tensor | None,
) -> None:
    if guide_query is None and guide_passage is None and guide_hard is None:
        return
    if guide_query is None or guide_passage is None or (guide_hard is None) != (hard is None):
        raise ValueError("a guide has vectors of queries, passages and, where there are any, hard")
    for name, x, like in (
        ("guide_query", guide_query, q),
        ("guide_passage", guide_passage, p),
        ("guide_hard", guide_hard, hard),
    ):
        if x is None or like is None:
            continue
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, want floating point")
        want = (*like.shape[:-1], guide_query.shape[-1])
        if tuple(x.shape) != want:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, want {want}")
        if x.requires_grad:
            raise ValueError(f"{name} has a graph, and a guide gets no gradient: detach it")


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} has dtype {ids.dtype}, want integers")
    if tuple(ids.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, want {shape}")
