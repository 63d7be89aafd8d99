"""InfoNCE of a batch in the form that a recipe asks for, alone or over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from embkit import kernels
from embkit.losses.sides import Outcome, Rows, Share, Sides, shares
from embkit.recipe import Loss


def contrastive(
    rows: Rows,
    dims: Sequence[int],
    loss: Loss,
    *,
    temperature: float | torch.Tensor,
    dim_weights: Sequence[float] | None,
    share: Share | None,
) -> Outcome:
    """The loss of this process's rows, against the candidates of all ranks."""
    terms = loss.terms()
    rows = replace(rows, sides=keyed(rows.sides, loss.mask))
    if loss.hard == "shared" and rows.hard is not None:
        rows = _shared(rows, share)
    options: dict[str, Any] = {"temperature": temperature, "dim_weights": dim_weights}
    if share is not None and share.ring and terms["in_batch"]:
        value, per_dim = _ring(rows, dims, terms, options, share)
        return Outcome(loss=value, per_dim=per_dim)
    rows, columns = _columns(rows, terms, share)
    sides, hard = rows.sides, rows.hard
    if rows.guide is not None:
        guide_q, guide_p, guide_hard = rows.guide
        columns |= {
            "guide_query": guide_q,
            "guide_passage": columns.pop("guide", guide_p),
            "guide_hard": None if hard is None else guide_hard,
            "guide_margin": loss.guide_margin,
            "guide_relative": loss.guide == "relative",
        }
    value, per_dim = kernels.infonce(
        rows.q,
        columns.pop("passages", rows.p),
        dims,
        hard=hard,
        query_ids=sides.query_key,
        passage_ids=columns.pop("keys", sides.positive_key),
        hard_ids=None if hard is None else sides.hard_key,
        hard_mask=None if hard is None else sides.hard_mask,
        **terms,
        **options,
        **columns,
    )
    return Outcome(loss=value, per_dim=per_dim)


def keyed(sides: Sides, mask: str) -> Sides:
    """The keys that a mask compares; a key of -1 equals nothing."""
    if mask == "keys":
        return sides
    none = torch.full_like(sides.query_key, -1)
    if mask == "positives":
        return replace(sides, query_key=none)
    return replace(sides, query_key=none, positive_key=none)


def _ring(
    rows: Rows, dims: Sequence[int], terms: dict[str, Any], options: dict[str, Any], share: Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """The passages of other ranks come by, one rank's at a time."""
    sides, hard, weight = rows.sides, rows.hard, rows.sides.weight
    never = {"in_batch", "doc_doc", "symmetric"}  # refused before the first step
    return kernels.infonce_ring(
        rows.q,
        rows.p,
        dims,
        ring=share,
        query_ids=sides.query_key,
        passage_ids=sides.positive_key,
        row_weights=shares(weight, share.sum(weight.sum())),
        hard=hard,
        hard_ids=None if hard is None else sides.hard_key,
        hard_mask=None if hard is None else sides.hard_mask,
        **{name: value for name, value in terms.items() if name not in never},
        **options,
    )


def _columns(rows: Rows, terms: dict[str, Any], share: Share | None) -> tuple[Rows, dict[str, Any]]:
    """Rows and passages that the kernel sees, and how it weighs them."""
    weight = rows.sides.weight
    if share is None:
        return rows, {"row_weights": weight}
    if terms["same_tower"] or terms["symmetric"]:
        return _everyone(rows, share)
    if not (terms["in_batch"] or terms["doc_doc"]):
        # A row's candidates are its own: nothing is gathered but the sum of the weights.
        total = share.sum(weight.sum())
        return rows, {"row_weights": shares(weight, total), "reduction": "sum"}
    # Own rows against the passages of all ranks. Rows are weighed by the sum over ranks.
    guide = [] if rows.guide is None else [rows.guide[1]]
    p_ND, keys, query_keys, weights, *guide, there = share.gather(
        rows.p, rows.sides.positive_key, rows.sides.query_key, weight, *guide
    )
    return rows, {
        **({"guide": guide[0]} if guide else {}),
        "passages": p_ND,
        "keys": keys,
        "passage_query_ids": query_keys,
        "passage_mask": there,
        "positive_index": torch.arange(
            share.start, share.start + len(rows.q), device=rows.q.device
        ),
        "row_weights": shares(weight, weights.sum()),
        "reduction": "sum",
    }


def _everyone(rows: Rows, share: Share) -> tuple[Rows, dict[str, Any]]:
    """The rows of all ranks, where queries are candidates too; those of others weigh nothing.

    Each rank repeats the similarities of all: world times the work of its share, and no message
    more than for passages alone.
    """
    sides, (own, width) = rows.sides, rows.q.shape
    guide = [] if rows.guide is None else list(rows.guide[:2])
    both, query_key, positive_key, weight, *guide, there = share.gather(
        torch.cat([rows.q, rows.p], 1), sides.query_key, sides.positive_key, sides.weight, *guide
    )
    # Empty places go: an absent query would be a candidate. Their number is known, so that a GPU
    # is not waited for.
    kept = torch.argsort(there.to(torch.uint8), descending=True, stable=True)[: share.batch_size]
    before, after = share.start, len(there) - share.start - own

    def spread(x: torch.Tensor, empty: float) -> torch.Tensor:
        ends = [x.new_full((n, *x.shape[1:]), empty) for n in (before, after)]
        return torch.cat([ends[0], x, ends[1]]).index_select(0, kept)

    made = replace(
        sides,
        query_key=query_key.index_select(0, kept),
        positive_key=positive_key.index_select(0, kept),
        weight=spread(sides.weight, 0),
    )
    hard = rows.hard
    if hard is not None and hard.ndim == 3:  # own ones; those that all rows share are there
        hard = spread(hard, 0)
        made = replace(
            made, hard_key=spread(sides.hard_key, -1), hard_mask=spread(sides.hard_mask, False)
        )
    if rows.guide is not None:
        of_hard = rows.guide[2]
        if of_hard is not None and of_hard.ndim == 3:
            of_hard = spread(of_hard, 0)
        guided = (guide[0].index_select(0, kept), guide[1].index_select(0, kept), of_hard)
    both = both.index_select(0, kept)
    return (
        Rows(
            q=both[:, :width],
            p=both[:, width:],
            hard=hard,
            sides=made,
            guide=None if rows.guide is None else guided,
        ),
        {"row_weights": shares(made.weight, weight.sum()), "reduction": "sum"},
    )


def _shared(rows: Rows, share: Share | None) -> Rows:
    """Hard negatives of every row against each: [M, D], over ranks M is that of all."""
    assert rows.hard is not None
    count, each, width = rows.hard.shape
    hard, key, mask = rows.hard.reshape(count, -1), rows.sides.hard_key, rows.sides.hard_mask
    of_hard = None if rows.guide is None else rows.guide[2]
    guide = [] if of_hard is None else [of_hard]
    if share is not None:
        hard, key, mask, *guide, there = share.gather(hard, key, mask, *guide)
        mask = mask & there[:, None]
    sides = replace(rows.sides, hard_key=key.reshape(-1), hard_mask=mask.reshape(-1))
    if rows.guide is not None and guide:
        flat = guide[0].reshape(-1, guide[0].shape[-1])
        rows = replace(rows, guide=(*rows.guide[:2], flat))
    return replace(rows, hard=hard.reshape(-1, width), sides=sides)
