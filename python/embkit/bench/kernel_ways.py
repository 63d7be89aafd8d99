"""What the kernels are measured against: the losses as users write them, and other fused ones.

Every way of InfoNCE takes raw rows q [B, D] and p [N, D] whose first B rows are the positives, and
adds up the mean losses of ascending prefix widths. Ways of other packages raise ImportError where
the package is missing and ValueError where it cannot do the case: the bench then says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from embkit import kernels

Way = Callable[..., tuple[Tensor, ...]]


def with_gradients(loss: Callable[..., Tensor]) -> Way:
    """Turn a scalar loss of some leaves into (loss, gradient of each leaf)."""

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = [x.detach().requires_grad_() for x in leaves]
        value = loss(*given)
        return value.detach(), *torch.autograd.grad(value, given)

    return step


def package(name: str) -> Any:
    """Import a rival, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed ({error}); see docs/kernels.md") from error


def infonce_ours(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """embkit's fused loss."""
    return kernels.infonce(q, p, dims, temperature=tau)[0]


def infonce_eager(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """MatryoshkaLoss over MultipleNegativesRankingLoss of sentence-transformers, written out.

    The scores are cast to float32: left in bf16, at temperature 0.05 they are off by 0.02.
    """
    target = torch.arange(q.shape[0], device=q.device)
    loss = q.new_zeros((), dtype=torch.float32)
    for d in dims:
        scores = functional.normalize(q[:, :d], dim=1) @ functional.normalize(p[:, :d], dim=1).T
        loss = loss + functional.cross_entropy(scores.float() / tau, target)
    return loss


def infonce_segments(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """The best that plain torch offers: a product a segment, prefix scores as running sums."""
    target = torch.arange(q.shape[0], device=q.device)
    loss = q.new_zeros((), dtype=torch.float32)
    raw = squares_q = squares_p = torch.zeros((), device=q.device)
    low = 0
    for d in dims:
        a, b = q[:, low:d], p[:, low:d]
        raw = raw + (a @ b.T).float()
        squares_q = squares_q + a.float().square().sum(1)
        squares_p = squares_p + b.float().square().sum(1)
        scores = raw * (squares_q.rsqrt() / tau)[:, None] * squares_p.rsqrt()[None, :]
        loss = loss + functional.cross_entropy(scores, target)
        low = d
    return loss


def infonce_memeff(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """memeff's fused Qwen3 loss over widths, with a margin that masks nothing."""
    if q.shape != p.shape:
        raise ValueError("memeff wants as many passages as queries")
    made = package("memeff").MemoryEfficientMatryoshkaQwen3Loss
    # stable=True would return gradients in another scale.
    loss: Tensor = made(tuple(dims), temperature=tau, margin=4.0, stable=False)(q, p)
    return loss


def infonce_infcl(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Inf-CL, a call a width: it knows no prefixes."""
    cal_flash_loss = package("inf_cl").cal_flash_loss
    loss = q.new_zeros((), dtype=torch.float32)
    for d in dims:
        a, b = functional.normalize(q[:, :d], dim=1), functional.normalize(p[:, :d], dim=1)
        loss = loss + cal_flash_loss(a.contiguous(), b.contiguous(), scale=1 / tau).mean()
    return loss


def infonce_liger(q: Tensor, p: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Liger's fused linear cross-entropy, passages as the classes, a call a width."""
    module = package("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction
    target = torch.arange(q.shape[0], device=q.device)
    loss = q.new_zeros((), dtype=torch.float32)
    for d in dims:
        a, b = functional.normalize(q[:, :d], dim=1) / tau, functional.normalize(p[:, :d], dim=1)
        found = function.apply(a.contiguous(), b.contiguous(), target)
        loss = loss + (found[0] if isinstance(found, tuple) else found)
    return loss


def pool_eager(x: Tensor, mask: Tensor) -> Tensor:
    """Pooling of sentence-transformers: [B, L, H] and a mask [B, L] in the dtype of x."""
    weight = mask[..., None].expand(x.shape)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def pool_packed_eager(x: Tensor, real: Tensor) -> Tensor:
    """[T, H] to padded first, as a layer that only knows [B, L, H] must; real: bool [B, L]."""
    padded = x.new_zeros(*real.shape, x.shape[1])
    padded[real] = x
    return pool_eager(padded, real.to(x.dtype))


def similarity_eager(
    q: Tensor, p: Tensor, dims: Sequence[int], k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Best k passages of each query at each width: scores (as `dtype`) and indexes [K, B, k]."""
    found = []
    for d in dims:
        scores = functional.normalize(q[:, :d], dim=1) @ functional.normalize(p[:, :d], dim=1).T
        found.append(scores.to(dtype).topk(k, dim=1))
    return torch.stack([f.values for f in found]), torch.stack([f.indices for f in found])


def cosent_eager(a: Tensor, b: Tensor, labels: Tensor, dims: Sequence[int]) -> Tensor:
    """CoSENTLoss of sentence-transformers with its B x B matrix, a call a width."""
    loss = a.new_zeros((), dtype=torch.float32)
    for d in dims:
        s = 20.0 * functional.cosine_similarity(a[:, :d].float(), b[:, :d].float())
        # terms[i, j] = s_i - s_j counts where pair i should score lower than pair j.
        terms = s[:, None] - s[None, :]
        terms = terms - (1 - (labels[:, None] < labels[None, :]).float()) * 1e12
        loss = loss + torch.logsumexp(torch.cat([s.new_zeros(1), terms.reshape(-1)]), 0)
    return loss
