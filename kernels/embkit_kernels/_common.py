"""What every op shares: accumulation type, width prefixes, deterministic row scatter.

Shape legend: B rows, N columns, D width, K matryoshka widths (`dims`).
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

NAMESPACE = (__package__ or "embkit_kernels").replace(".", "__")
"""Namespace of the custom ops. It follows the package name, because the same folder is importable
as `embkit_kernels` and as `embkit.kernels`, and one process may do both."""

MIN_NORM = 1e-12
"""A prefix whose norm is not above this counts as the zero vector: cosine 0 and zero gradient.
(Dividing by a clamped norm instead, as `F.normalize` does, hands such rows a gradient of 1e12.)"""


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is float64 (tests), float32 otherwise."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def resolve_dims(dims: Sequence[int] | None, width: int) -> tuple[tuple[int, ...], list[int]]:
    """Sort the widths, and say where each of the caller's widths went.

    Args:
        dims: prefix widths in any order; None means the full width alone.
        width: columns of the embeddings.

    Returns:
        The widths in ascending order, and for each width as given its place in that order.

    Raises:
        ValueError: no width, a repeated one, or one outside 1..width.
    """
    given = [width] if dims is None else [int(d) for d in dims]
    if not given:
        raise ValueError("dims is empty; pass None for the full width alone")
    if len(set(given)) != len(given):
        raise ValueError(f"dims {tuple(given)} repeats a width")
    for d in given:
        if not 1 <= d <= width:
            raise ValueError(f"dims has {d}, outside 1..{width} (the width of the embeddings)")
    ascending = sorted(given)
    return tuple(ascending), [ascending.index(d) for d in given]


def segments(dims: Sequence[int]) -> list[tuple[int, int]]:
    """Cut [0, dims[-1]) at each width of ascending `dims`: prefix k is segments 0..k."""
    return list(zip([0, *dims[:-1]], dims, strict=True))


def prefix_dots(a: Tensor, b: Tensor, dims: Sequence[int]) -> Tensor:
    """Dot products of matching rows over each prefix: [..., D] x2 -> [K, ...]."""
    total: list[Tensor] = []
    for lo, hi in segments(dims):
        part = (a[..., lo:hi] * b[..., lo:hi]).sum(-1)
        total.append(total[-1] + part if total else part)
    return torch.stack(total)


def prefix_inverse_norms(x: Tensor, dims: Sequence[int]) -> Tensor:
    """1 / norm of each prefix of each row, 0 for a zero prefix: [..., D] -> [K, ...]."""
    square = prefix_dots(x, x, dims)
    real = square > MIN_NORM**2
    # The inner where keeps rsqrt away from 0, whose infinite slope autograd would multiply by 0.
    return torch.where(real, torch.where(real, square, 1).rsqrt(), 0)


def suffix_sum_(x_k: Tensor) -> Tensor:
    """In place x[t] = sum of x[t:] along the first axis. No cumsum: not deterministic on CUDA."""
    for t in range(x_k.shape[0] - 2, -1, -1):
        x_k[t] += x_k[t + 1]
    return x_k


def add_rows_(target: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """target[index[i]] += rows[i] along dim 0, index may repeat, in an order that never changes.

    `index_add_` is sequential on CPU but atomic on CUDA; accumulating `index_put_` sorts on CUDA
    but is atomic on CPU.
    """
    if target.device.type == "cpu":
        return target.index_add_(0, index, rows)
    return target.index_put_((index,), rows, accumulate=True)


def take_rows(source: Tensor, index: Tensor) -> Tensor:
    """source[index] with a deterministic autograd backward on either device (see `add_rows_`)."""
    return source.index_select(0, index) if source.device.type == "cpu" else source[index]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch autocast and reduced-precision fp32 GEMMs off inside an op.

    A cosine rounded to bf16 or TF32 is an error of 0.05 to 0.2 in the logit at temperature 0.02.
    """
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def weigh_dims(
    per_dim: Tensor, order: Sequence[int], dim_weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Put per-width losses [K, ...] into the caller's order and add them up with weights.

    Args:
        per_dim: losses in ascending width order.
        order: second result of `resolve_dims`.
        dim_weights: [K] in the caller's order; None means 1 each (equal, simply added).

    Returns:
        The weighted sum over widths, and the unweighted losses in the caller's order.

    Raises:
        ValueError: dim_weights is not one number a width.
    """
    if list(order) != list(range(len(order))):
        per_dim = torch.stack([per_dim[i] for i in order])
    if dim_weights is None:
        return per_dim.sum(0), per_dim
    weights = torch.as_tensor(dim_weights, dtype=per_dim.dtype, device=per_dim.device)
    if weights.shape != (len(order),):
        raise ValueError(f"dim_weights has shape {tuple(weights.shape)}, dims has {len(order)}")
    weighted = per_dim * weights.reshape(-1, *[1] * (per_dim.dim() - 1))
    return weighted.sum(0), per_dim
