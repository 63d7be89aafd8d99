"""Bench group `kernels`: fused losses and pooling beside the eager formulation users write."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional

from embkit import kernels
from embkit.bench import Case


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _gemm_limit(device: str, dtype: torch.dtype) -> float:
    """Matrix-product FLOP/s of this run, random data."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(4):
        a @ a
    if device == "cuda":
        torch.cuda.synchronize()
    return 4 * 2 * n**3 / max(time.perf_counter() - started, 1e-9)


def _close(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)
        assert error < 2e-2, f"relative difference {float(error):.2e}"


def _infonce(width: int, dims: tuple[int, ...], quick: bool) -> Case:
    device = _device()
    b = 8192 if device == "cuda" else (512 if quick else 2048)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(b, width, generator=generator).to(device, dtype)
    p = (q.cpu().float() + torch.randn(b, width, generator=generator)).to(device, dtype)
    temperature = 0.05

    def ours() -> tuple[torch.Tensor, ...]:
        a, c = q.detach().requires_grad_(), p.detach().requires_grad_()
        loss, _ = kernels.infonce(a, c, dims, temperature=temperature)
        return loss.detach(), *torch.autograd.grad(loss, (a, c))

    def eager() -> tuple[torch.Tensor, ...]:
        a, c = q.detach().requires_grad_(), p.detach().requires_grad_()
        target = torch.arange(b, device=device)
        loss = torch.zeros((), device=device)
        for d in dims:
            scores = functional.normalize(a[:, :d]) @ functional.normalize(c[:, :d]).T
            loss = loss + functional.cross_entropy(scores.float() / temperature, target)
        return loss.detach(), *torch.autograd.grad(loss, (a, c))

    return Case(
        name=f"kernels.infonce.{width}",
        unit="FLOP/s",
        work=3 * 2 * b * b * width,
        ours=ours,
        rivals={"eager torch": eager},
        check=_close,
        limit=("GEMM", _gemm_limit(device, dtype)),
        floor="1x eager",
        goal="1.9x eager on a GPU",
        facts={"n": b, "d": width, "k": len(dims), "device": device, "dtype": str(dtype)},
    )


def infonce_768(quick: bool) -> Case:
    """Widths 256, 512 and 768."""
    return _infonce(768, (256, 512, 768), quick)


def infonce_3072(quick: bool) -> Case:
    """Widths 768, 1536 and 3072: Gemini Embedding's."""
    return _infonce(3072, (768, 1536, 3072), quick)


def mean_pool(quick: bool) -> Case:
    """Padded states, real-text-like ragged lengths, H = 768, forward and backward."""
    device = _device()
    b, length, h = (2048 if device == "cuda" else 64), 512, 768
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, length, h, generator=generator).to(device, dtype)
    lengths = torch.randint(1, length + 1, (b,), generator=generator).to(device)
    real = torch.arange(length, device=device) < lengths[:, None]
    mask = real.to(dtype)

    def ours() -> tuple[torch.Tensor, ...]:
        s = x.detach().requires_grad_()
        y = kernels.mean_pool(s, mask=real)
        return y.detach(), *torch.autograd.grad(y.square().sum(), s)

    def eager() -> tuple[torch.Tensor, ...]:
        s = x.detach().requires_grad_()
        y = (s * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return y.detach(), *torch.autograd.grad(y.square().sum(), s)

    size = x.element_size() * h * (int(lengths.sum()) + b * length)
    copy = torch.empty_like(x)
    started = time.perf_counter()
    for _ in range(4):
        copy.copy_(x)
    if device == "cuda":
        torch.cuda.synchronize()
    bandwidth = 4 * 2 * x.numel() * x.element_size() / max(time.perf_counter() - started, 1e-9)
    return Case(
        name="kernels.mean_pool",
        unit="B/s",
        work=size,
        ours=ours,
        rivals={"eager torch": eager},
        check=_close,
        limit=("copy", bandwidth),
        floor="1x eager",
        goal="1.15x the one-read floor on a GPU",
        facts={"n": b, "d": h, "device": device, "dtype": str(dtype)},
    )


CASES = (infonce_768, infonce_3072, mean_pool)
