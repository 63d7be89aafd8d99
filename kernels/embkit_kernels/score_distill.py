"""Distilling a teacher's scores: its softmax over a positive and hard negatives into a student's.

    t = softmax(teacher scores / T),   s^k = softmax(cosines of the prefixes k / temperature)
    loss^k_i = KL(t || s^k) = sum over candidates of t (log t - log s^k)

a row at a time, over what the teacher has scored. Its gradient is that of the cross-entropy, and it
is 0 where the student agrees.

Plain torch: B (1 + H) cosines, next to nothing beside the B^2 of InfoNCE.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype, resolve_dims
from .cosent import prefix_cosine


def score_distill(
    q: Tensor,
    p: Tensor,
    hard: Tensor,
    scores: Tensor,
    dims: Sequence[int] | None = None,
    *,
    temperature: float | Tensor = 0.05,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Divergence of each row's softmax over its candidates from the teacher's.

    Args:
        q, p: raw embeddings [B, D]. hard: own hard negatives [B, H, D].
        scores: the teacher's, [B, 1 + H], the positive's first; one that is not finite leaves its
            candidate out.
        dims: prefix widths in any order; None means (D,).
        temperature: of the cosines; a one-element tensor gets a gradient.
        teacher_temperature: of the scores.

    Returns:
        The divergences [K, B] in the order of `dims`, differentiable, and whether a row counts [B]:
        the others have no score of the positive, or of no hard negative, and are 0. float32
        (float64 for float64 embeddings).

    Raises:
        ValueError: shapes or dims that do not fit.

    Example:
        >>> x = torch.eye(2)
        >>> rows, used = score_distill(x, x, x.flip(0)[:, None], torch.tensor([[2.0, 1], [1, 2]]))
        >>> [round(r, 2) for r in rows[0].tolist()], used.tolist()
        ([4.8, 14.04], [True, True])
    """
    batch, each = hard.shape[:2] if hard.dim() == 3 else (-1, 0)
    if q.dim() != 2 or p.shape != q.shape or hard.shape[::2] != q.shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, p {tuple(p.shape)}, hard {tuple(hard.shape)}; want [B, D] "
            "twice and [B, H, D]"
        )
    if scores.shape != (batch, 1 + each):
        raise ValueError(f"scores has shape {tuple(scores.shape)}, want {(batch, 1 + each)}")
    ascending, order = resolve_dims(dims, q.shape[1])
    there = scores.isfinite()
    used = there[:, 0] & there[:, 1:].any(1)
    there = there & used[:, None]
    with torch.autocast(q.device.type, enabled=False):
        acc = accumulate_dtype(q, p, hard)
        gold = torch.where(there, scores.to(acc) / teacher_temperature, -torch.inf)
        # A row that does not count is a softmax of one thing: no NaN on the way to its 0.
        gold = torch.cat([gold[:, :1].masked_fill(~used[:, None], 0), gold[:, 1:]], 1)
        alone = torch.cat([there[:, :1] | ~used[:, None], there[:, 1:]], 1)
        gold = gold.log_softmax(1).masked_fill(~alone, 0)
        rows_q = q[:, None].expand(-1, each, -1).reshape(-1, q.shape[1])
        own = prefix_cosine(q, p, ascending)
        others = prefix_cosine(rows_q, hard.reshape(-1, q.shape[1]), ascending)
        cosine = torch.cat([own[..., None], others.reshape(len(ascending), batch, each)], 2)
        mine = (cosine / temperature).masked_fill(~alone, -torch.inf).log_softmax(2)
        apart = alone * gold.exp() * (gold - mine.masked_fill(~alone, 0))
        rows = apart.sum(2)
    return torch.stack([rows[i] for i in order]), used


def score_distill_naive(
    q: Tensor,
    p: Tensor,
    hard: Tensor,
    scores: Tensor,
    dims: Sequence[int] | None = None,
    *,
    temperature: float | Tensor = 0.05,
    teacher_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The specification of `score_distill`: each row and width in plain autograd."""
    found: list[Tensor] = []
    used: list[bool] = []
    for d in dims or [q.shape[1]]:
        unit = [torch.nn.functional.normalize(x[..., :d], dim=-1) for x in (q, p, hard)]
        rows, used = [], []
        for u, v, n, gold in zip(*unit, scores, strict=True):
            keep = gold.isfinite()
            used.append(bool(keep[0] and keep[1:].any()))
            if not used[-1]:
                rows.append(u.sum() * 0)
                continue
            mine = torch.cat([(v @ u)[None], n @ u])[keep] / temperature
            t = (gold[keep].to(u.dtype) / teacher_temperature).softmax(0)
            rows.append((t * (t.log() - mine.log_softmax(0))).sum())
        found.append(torch.stack(rows))
    return torch.stack(found), torch.tensor(used)
