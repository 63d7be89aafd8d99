"""InfoNCE written out row by row in plain autograd: the specification that tests compare with.

Every candidate of every row is a Python-level decision. Slow, O(B N K) memory, right in any dtype.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._common import MIN_NORM


def _unit(x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    return torch.where(norm > MIN_NORM, x / torch.where(norm > MIN_NORM, norm, 1), 0)


def _same(a: Tensor | None, i: int, b: Tensor | None, size: int) -> Tensor:
    """Columns j with a[i] == b[j], both real ids."""
    if a is None or b is None:
        return torch.zeros(size, dtype=torch.bool)
    return (b == a[i]) & (b >= 0) & (a[i] >= 0)


def infonce_naive(
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
    """The loss of `infonce`, same arguments and results, computed in the inputs' dtype on CPU."""
    batch, columns = q.shape[0], p.shape[0]
    index = torch.arange(batch) if positive_index is None else positive_index.long()
    offsets = torch.arange(batch + 1) if positive_offsets is None else positive_offsets
    if query_ids is not None and passage_query_ids is None:
        passage_query_ids = torch.cat([query_ids, query_ids.new_full((columns - batch,), -1)])

    def row_loss(i: int, width: int) -> Tensor:
        own = index[int(offsets[i]) : int(offsets[i + 1])]
        if len(own) == 0:
            return q[i].sum() * 0
        u, v, queries = _unit(q[i, :width]), _unit(p[:, :width]), _unit(q[:, :width])
        s_pos = (v[own] * u).sum(-1)
        terms = []

        def nearer(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            """Columns that a guide finds nearer than the lowest positive: a [W], b [n, W]."""
            if a is None or b is None or guide_query is None or guide_passage is None:
                return None
            t = (_unit(guide_passage[own]) @ _unit(guide_query[i])).min()
            limit = t + guide_margin * (t.abs() if guide_relative else 1)
            return _unit(b) @ _unit(a) > limit + 1e-6  # a copy of the positive is not above it

        def add(
            scores: Tensor, drop: Tensor, alpha: float = 0.0, guided: Tensor | None = None
        ) -> None:
            fixed = scores.detach()
            if guided is not None:
                drop = drop | guided
            if margin is not None:
                low = s_pos.min().detach()
                drop = drop | (fixed > low + margin * (low.abs() if margin_relative else 1))
            terms.append((scores / temperature + alpha * fixed)[~drop])

        passage = _same(query_ids, i, passage_query_ids, columns)
        for m in own:
            if passage_ids is not None:
                passage = passage | _same(passage_ids, int(m), passage_ids, columns)
        passage = passage | torch.isin(torch.arange(columns), own)
        if passage_mask is not None:
            passage = passage | ~passage_mask.bool()
        mine = None if guide_query is None else guide_query[i]
        if in_batch:
            add(v @ u, passage, guided=nearer(mine, guide_passage))
        if hard is not None:
            private = hard.dim() == 3
            h = hard[i] if private else hard
            ids = hard_ids[i] if hard_ids is not None and private else hard_ids
            theirs = hard_query_ids
            theirs = theirs[i] if theirs is not None and private else theirs
            drop = _same(query_ids, i, theirs, len(h))
            for m in own:
                drop = drop | _same(passage_ids, int(m), ids, len(h))
            if hard_mask is not None:
                drop = drop | ~(hard_mask[i] if private else hard_mask).bool()
            theirs = guide_hard[i] if guide_hard is not None and private else guide_hard
            add(_unit(h[:, :width]) @ u, drop, hardness_alpha, nearer(mine, theirs))
        if same_tower:
            drop = (torch.arange(batch) == i) | _same(query_ids, i, query_ids, batch)
            for j in range(batch):
                for theirs in index[int(offsets[j]) : int(offsets[j + 1])]:
                    for m in own:
                        drop[j] |= _same(passage_ids, int(m), passage_ids, columns)[theirs]
            add(queries @ u, drop, guided=nearer(mine, guide_query))
        if doc_doc:
            first = None if guide_passage is None else guide_passage[own[0]]
            add(v @ v[own[0]], passage, guided=nearer(first, guide_passage))

        negatives = torch.cat(terms)
        if len(negatives) == 0:
            return q[i].sum() * 0
        excess = torch.logsumexp(negatives, 0) - s_pos / temperature
        if include_positive:
            excess = torch.logaddexp(excess, torch.zeros_like(excess))
        return excess.mean()

    widths = [q.shape[1]] if dims is None else list(dims)
    rows = torch.stack([torch.stack([row_loss(i, d) for i in range(batch)]) for d in widths])
    if symmetric:
        own_ids = None if passage_ids is None else passage_ids[index]
        _, reverse = infonce_naive(
            p[index],
            q,
            dims,
            query_ids=own_ids,
            passage_ids=query_ids,
            passage_query_ids=own_ids,
            temperature=temperature,
            reduction="none",
            include_positive=include_positive,
            same_tower=doc_doc,
            doc_doc=same_tower,
            margin=margin,
            margin_relative=margin_relative,
            guide_query=None if guide_passage is None else guide_passage[index],
            guide_passage=guide_query,
            guide_margin=guide_margin,
            guide_relative=guide_relative,
        )
        rows = (rows + reverse) / 2
    weights = torch.ones(batch, dtype=q.dtype) if row_weights is None else row_weights
    rows = rows * weights
    scale = torch.ones(len(widths), dtype=q.dtype)
    if dim_weights is not None:
        scale = torch.as_tensor(dim_weights, dtype=q.dtype)
    if reduction == "none":
        return (rows * scale[:, None]).sum(0), rows
    per_dim = rows.sum(1)
    if reduction == "mean":
        per_dim = per_dim / (weights.sum() if bool(weights.sum() > 0) else 1)
    return (per_dim * scale).sum(), per_dim
