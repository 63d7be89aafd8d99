"""Distilling a teacher's embeddings into a student's, at one or several MRL widths.

    cosine:  loss^k_i = 1 - cos(x^k_i, t^k_i) = |u - v|^2 / 2,   u, v the unit prefixes
    l2:      loss^k_i = |x^k_i - t^k_i|^2                         raw vectors

averaged over rows with weights. The half square keeps the digits that `1 - cos` loses when the
student is close to its teacher; a zero prefix has cosine 0, and gets loss 1 and no gradient.

Plain torch: the op reads two [B, D] matrices and writes one. At B = 8192 and D = 3072 in bf16 that
is 151 MB, 35 us of an H200; the float32 copies that torch makes on the way are some 1.5 GB forward
and backward, about 0.35 ms of a training step that takes seconds. A kernel would not pay.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._common import accumulate_dtype, prefix_inverse_norms, resolve_dims, weigh_dims


def embedding_distill(
    student: Tensor,
    teacher: Tensor,
    dims: Sequence[int] | None = None,
    *,
    distance: Literal["cosine", "l2"] = "cosine",
    row_weights: Tensor | None = None,
    dim_weights: Sequence[float] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean distance of each embedding from its teacher's.

    EmbeddingGemma adds it for queries, positives and hard negatives: one call on all of them
    together weighs by rows, one call each weighs the three sides alike. A student of another width
    than its teacher is projected into the teacher's space first, by a layer of the student's
    (projecting the teacher instead lets both collapse).

    Args:
        student: raw embeddings [B, D].
        teacher: of the same rows [B, D]; gets no gradient.
        dims: prefix widths in any order; None means the full width alone, as it is published.
            More than one needs a teacher whose prefixes are embeddings too.
        distance: ``"cosine"`` (1 - cosine, as jina-embeddings-v5) or ``"l2"`` (squared).
        row_weights: [B], not negative; they divide by their sum. None means 1 each.
        dim_weights: [K] in the order of `dims`; None means 1 each.

    Returns:
        The loss (), summed over widths with `dim_weights`, and each width's loss [K], detached;
        0 for no rows or no weight. float32 (float64 for float64).

    Raises:
        ValueError: shapes, dims or the distance's name do not fit.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> embedding_distill(x, torch.tensor([[6.0, 8.0], [0.0, 1.0]]))[0].item()
        0.5
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student is {tuple(student.shape)}, teacher is {tuple(teacher.shape)}; "
            "want equal [B, D]"
        )
    if distance not in ("cosine", "l2"):
        raise ValueError(f"distance {distance!r} is unknown; use 'cosine' or 'l2'")
    batch, width = student.shape
    if row_weights is not None and row_weights.shape != (batch,):
        raise ValueError(f"row_weights has shape {tuple(row_weights.shape)}, want ({batch},)")
    ascending, order = resolve_dims(dims, width)
    with torch.autocast(student.device.type, enabled=False):
        acc = accumulate_dtype(student, teacher)
        x, t = student.to(acc), teacher.detach().to(acc)
        weights = x.new_ones(batch) if row_weights is None else row_weights.detach().to(acc)
        share = weights / weights.sum().clamp(min=torch.finfo(acc).tiny)
        rows = _cosine(x, t, ascending) if distance == "cosine" else _square(x, t, ascending)
        per_width = (rows * share).sum(1)
    total, per_dim = weigh_dims(per_width, order, dim_weights)
    return total, per_dim.detach()


def embedding_distill_naive(
    student: Tensor,
    teacher: Tensor,
    dims: Sequence[int] | None = None,
    *,
    distance: Literal["cosine", "l2"] = "cosine",
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification of `embedding_distill`: each row and width in plain autograd."""
    weights = torch.ones(len(student)) if row_weights is None else row_weights
    losses = []
    for d in dims or [student.shape[1]]:
        x, t = student[:, :d], teacher[:, :d].detach()
        if distance == "cosine":
            row = 1 - torch.nn.functional.cosine_similarity(x, t, eps=1e-30)
        else:
            row = (x - t).square().sum(1)
        losses.append((row * weights).sum() / weights.sum())
    per_dim = torch.stack(losses)
    return per_dim.sum(), per_dim


def _cosine(x: Tensor, t: Tensor, dims: Sequence[int]) -> Tensor:
    """1 - cosine [K, B]."""
    a, b = prefix_inverse_norms(x, dims), prefix_inverse_norms(t, dims)
    rows = []
    for k, d in enumerate(dims):
        apart = x[:, :d] * a[k, :, None] - t[:, :d] * b[k, :, None]
        rows.append(apart.square().sum(1) / 2)
    # |u|^2 + |v|^2 is 2, less 1 for each zero vector.
    zeros = (a == 0).to(x.dtype) + (b == 0).to(x.dtype)
    return torch.stack(rows) + zeros / 2


def _square(x: Tensor, t: Tensor, dims: Sequence[int]) -> Tensor:
    """Squared distance [K, B]."""
    total: list[Tensor] = []
    low = 0
    for d in dims:
        part = (x[:, low:d] - t[:, low:d]).square().sum(1)
        total.append(total[-1] + part if total else part)
        low = d
    return torch.stack(total)
