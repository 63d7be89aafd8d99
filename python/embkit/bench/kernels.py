"""Bench group `kernels`: fused losses and pooling beside eager, compiled and other fused forms.

On a GPU the sizes are those of docs/kernels.md, in bf16; on a CPU they are small, in float32, and
the ways are the torch references. Rates count the least work that gives the result: three products
of B x N x D for a loss with both gradients, each byte read or written once for pooling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from embkit import kernels
from embkit.bench import Case, Sample
from embkit.bench import kernel_ways as ways
from embkit.bench.kernel_clock import (
    Timed,
    comparable,
    copy_rate,
    device,
    dtype,
    gemm_rate,
    gpu_sample,
    inputs,
)

TAU = 0.05
TOLERANCE = 2e-2
"""Between ways: the eager ones round scores to bf16."""


def _gpu() -> bool:
    return device().type == "cuda"


def _close(ours: Any, theirs: Any) -> None:
    ours, theirs = (getattr(found, "value", found) for found in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)
        assert error < TOLERANCE, f"relative difference {float(error):.2e}"


def _facts(**facts: Any) -> dict[str, Any]:
    return facts | {"device": device().type, "dtype": str(dtype()).removeprefix("torch.")}


def _times(
    floor_ms: float, output_bytes: int, forward: Callable[[], Sample] | None = None
) -> Callable[[Mapping[str, Sample]], Mapping[str, Any]]:
    """Facts from the medians: milliseconds of each way, against the floor, memory of its own."""

    def derive(medians: Mapping[str, Sample]) -> Mapping[str, Any]:
        found: dict[str, Any] = {
            "ms": {name: round(s.wall * 1e3, 4) for name, s in medians.items()},
            "floor_ms": round(floor_ms, 4),
            "times_floor": round(medians["embkit"].wall * 1e3 / floor_ms, 3),
        }
        if _gpu():  # on CPU the peak is of resident memory, and says little of one call
            found["extra_bytes"] = {
                name: max(0, s.peak - output_bytes) for name, s in medians.items()
            }
        if forward is not None and _gpu():
            found["forward_ms"] = round(forward().wall * 1e3, 4)
        return found

    return derive


def _case(
    name: str, unit: str, work: float, ours: Timed, rivals: Mapping[str, Timed], **fields: Any
) -> Case:
    able, unable = comparable(ours, rivals, _close)
    if _gpu():  # ways measure themselves
        fields |= {"rounds": 3}
    return Case(
        name=name, unit=unit, work=work, ours=ours, rivals=able, skipped=unable,
        check=_close, **fields,
    )  # fmt: skip


def _infonce(
    name: str, width: int, dims: tuple[int, ...], quick: bool, goal: str, *, columns: int = 1
) -> Case:
    b = 8192 if _gpu() else (256 if quick else 2048)
    n = b * columns

    def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
        q, p = (torch.randn(rows, width, device=device(), generator=rng) for rows in (b, n))
        p[:b] += q  # positives: the loss is neither tiny, where eager cancels, nor log n
        return q.to(dtype()), p.to(dtype())

    sets = inputs(draw)

    def way(loss: Callable[..., Tensor]) -> Timed:
        return Timed(ways.with_gradients(lambda q, p: loss(q, p, dims, TAU)), sets)

    rivals = {"eager torch": ways.infonce_eager}
    if _gpu():
        rivals |= {
            "torch.compile": torch.compile(ways.infonce_eager),
            "torch.compile of segments": torch.compile(ways.infonce_segments),
            "memeff": ways.infonce_memeff,
            "inf-cl": ways.infonce_infcl,
            "liger": ways.infonce_liger,
        }
    giga = 1e12 if _gpu() else 1e9
    work = 3 * 2 * b * n * width
    output = 4 + (b + n) * width * torch.finfo(dtype()).bits // 8
    forward = lambda q, p: (ways.infonce_ours(q, p, dims, TAU),)  # noqa: E731
    return _case(
        name, "TFLOP/s" if _gpu() else "GFLOP/s", work / giga,
        way(ways.infonce_ours), {peer: way(loss) for peer, loss in rivals.items()},
        limit=("matrix product", gemm_rate() / giga), floor="1x eager", goal=goal,
        facts=_facts(n=b, columns=n, d=width, k=len(dims), temperature=TAU),
        # What a design without a B x N matrix must do: four products, as docs/kernels.md counts.
        derive=_times(work / 3 * 4 / gemm_rate() * 1e3, output,
                      functools.partial(gpu_sample, forward, sets)),
    )  # fmt: skip


def infonce_768(quick: bool) -> Case:
    """Widths 256, 512 and 768."""
    return _infonce("kernels.infonce.768", 768, (256, 512, 768), quick, "1.1 ms on an H200")


def infonce_1024(quick: bool) -> Case:
    """Widths 256, 512 and 1024."""
    return _infonce("kernels.infonce.1024", 1024, (256, 512, 1024), quick, "1.3 ms on an H200")


def infonce_3072(quick: bool) -> Case:
    """Widths 768, 1536 and 3072: Gemini Embedding's."""
    goal = "3.2 ms on an H200, 1.9x eager, 1.1x torch.compile, 3x memeff, 5x inf-cl"
    return _infonce("kernels.infonce.3072", 3072, (768, 1536, 3072), quick, goal)


def infonce_65536(quick: bool) -> Case:
    """Eight passages for each query, as after a gather over eight ranks: 65,536 on a GPU."""
    goal = "25.7 ms on an H200, at most 0.5 GB besides inputs and outputs"
    return _infonce(
        "kernels.infonce.65536", 3072, (768, 1536, 3072), quick, goal, columns=8 if _gpu() else 4
    )


def _mean_pool(width: int, layout: str, quick: bool) -> Case:
    """Ragged lengths, half to all of the longest; 2^20 token places on a GPU."""
    length = 512
    b = 2048 if _gpu() else (16 if quick else 64)
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (b,), generator=rng).to(device())
    real = torch.arange(length, device=device()) < lengths[:, None]
    weight = torch.randn(b, width, generator=rng).to(device(), dtype())
    tokens, packed = int(lengths.sum()), layout == "packed"
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
    shape = (tokens, width) if packed else (b, length, width)
    sets = inputs(
        lambda rng: (torch.randn(shape, device=device(), generator=rng, dtype=dtype()),)
    )  # fmt: skip

    def pooled(x: Tensor) -> Tensor:
        if packed:
            return kernels.mean_pool(x, cu_seqlens=cu)
        return kernels.mean_pool(x, lengths=lengths)

    mask = real.to(dtype())

    def eager(x: Tensor) -> Tensor:
        return ways.pool_packed_eager(x, real) if packed else ways.pool_eager(x, mask)

    def way(pool: Callable[[Tensor], Tensor]) -> Timed:
        def step(x: Tensor) -> tuple[Tensor, ...]:
            given = x.detach().requires_grad_()
            y = pool(given)
            return y.detach(), *torch.autograd.grad(y, given, weight)

        return Timed(step, sets)

    rivals = {"eager torch": way(eager)}
    if _gpu() and not packed:  # boolean indexing has a size that depends on the data
        rivals["torch.compile"] = way(torch.compile(eager))
    size = torch.finfo(dtype()).bits // 8
    # One read of the real tokens, one write of every place's gradient, zeros of padding included.
    work = size * width * (tokens + shape[0] * (1 if packed else length))
    return _case(
        f"kernels.mean_pool.{width}.{layout}", "GB/s", work / 1e9, way(pooled), rivals,
        limit=("copy", copy_rate() / 1e9), floor="1x eager",
        goal="1.15x the one-read floor on a GPU",
        facts=_facts(n=b, d=width, tokens=tokens, layout=layout),
        derive=_times(work / copy_rate() * 1e3, size * width * (b + sets[0][0].numel() // width),
                      functools.partial(gpu_sample, lambda x: (pooled(x),), sets)),
    )  # fmt: skip


def mean_pool_768_padded(quick: bool) -> Case:
    """Padded states with lengths, H = 768, forward and backward."""
    return _mean_pool(768, "padded", quick)


def mean_pool_1024_padded(quick: bool) -> Case:
    """Padded states with lengths, H = 1024, forward and backward."""
    return _mean_pool(1024, "padded", quick)


def mean_pool_3072_padded(quick: bool) -> Case:
    """Padded states with lengths, H = 3072, forward and backward."""
    return _mean_pool(3072, "padded", quick)


def mean_pool_768_packed(quick: bool) -> Case:
    """Packed states, H = 768, forward and backward."""
    return _mean_pool(768, "packed", quick)


def mean_pool_1024_packed(quick: bool) -> Case:
    """Packed states, H = 1024, forward and backward."""
    return _mean_pool(1024, "packed", quick)


def mean_pool_3072_packed(quick: bool) -> Case:
    """Packed states, H = 3072, forward and backward."""
    return _mean_pool(3072, "packed", quick)


def similarity(quick: bool) -> Case:
    """The best 100 of all passages for each query, at three widths in one pass."""
    if (mrl_similarity := getattr(kernels, "mrl_similarity", None)) is None:
        raise ImportError("embkit.kernels has no mrl_similarity")
    dims, width, k = (256, 512, 768), 768, 100
    b, n = (8192, 65536) if _gpu() else ((64, 2048) if quick else (512, 16384))
    sets = inputs(
        lambda rng: tuple(
            torch.randn(rows, width, device=device(), generator=rng).to(dtype()) for rows in (b, n)
        )
    )  # fmt: skip

    # Scores alone: where two are equal in bf16, eager's order of indexes is its own.
    def ours(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (mrl_similarity(q, p, dims, k=k)[0],)

    def eager(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (ways.similarity_eager(q, p, dims, k)[0],)

    giga, work = 1e12 if _gpu() else 1e9, 2 * b * n * width
    return _case(
        "kernels.similarity", "TFLOP/s" if _gpu() else "GFLOP/s", work / giga,
        Timed(ours, sets), {"eager torch": Timed(eager, sets)},
        limit=("matrix product", gemm_rate() / giga), floor="1x eager",
        facts=_facts(n=b, columns=n, d=width, k=k, widths=len(dims)),
        derive=_times(work / gemm_rate() * 1e3, len(dims) * b * k * 12),
    )  # fmt: skip


def cosent(quick: bool) -> Case:
    """Pairs of text pairs with 26 gold scores, three widths, both gradients."""
    dims, width = (256, 512, 768), 768
    b = 8192 if _gpu() else (512 if quick else 4096)
    rng = torch.Generator().manual_seed(0)
    labels = (torch.randint(0, 26, (b,), generator=rng) / 5).to(device())

    def draw(rng: torch.Generator) -> tuple[Tensor, ...]:
        a, other = (torch.randn(b, width, device=device(), generator=rng) for _ in range(2))
        return a.to(dtype()), (a + other).to(dtype())

    sets = inputs(draw)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return kernels.cosent((x, y), labels, dims)[0]

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return ways.cosent_eager(x, y, labels, dims)

    rivals = {"eager torch": eager}
    if _gpu():
        rivals["torch.compile"] = torch.compile(eager)
    size = torch.finfo(dtype()).bits // 8
    pairs = len(dims) * b * b
    return _case(
        "kernels.cosent", "Gpairs/s", pairs / 1e9, Timed(ways.with_gradients(ours), sets),
        {name: Timed(ways.with_gradients(loss), sets) for name, loss in rivals.items()},
        floor="1x eager", facts=_facts(n=b, d=width, k=len(dims)),
        # The embeddings once in and once out; the B x B comparisons are beside that.
        derive=_times(4 * b * width * size / copy_rate() * 1e3, 2 * b * width * size),
    )  # fmt: skip


CASES = (
    infonce_768,
    infonce_1024,
    infonce_3072,
    infonce_65536,
    mean_pool_768_padded,
    mean_pool_1024_padded,
    mean_pool_3072_padded,
    mean_pool_768_packed,
    mean_pool_1024_packed,
    mean_pool_3072_packed,
    similarity,
    cosent,
)
