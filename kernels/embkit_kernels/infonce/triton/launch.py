"""Grids and arguments of the kernels, and their configurations for the ahead-of-time check."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _triton
from ..._common import MIN_NORM, segments
from .coefficients import coefficient_kernel
from .finish import finish_kernel
from .forward import combine_kernel, forward_kernel
from .keys import BankKeys
from .prep import prefix_kernel

OP = "infonce"

ALIGN = 16
"""Strides are multiples of this many elements, so that loads and stores are 16 bytes wide."""


@functools.lru_cache(maxsize=64)
def boundaries(dims: tuple[int, ...], device: torch.device) -> Tensor:
    """Widths on the device, [K + 1] int32: the kernels look one past the last. Copied once."""
    with torch.inference_mode(False):
        return torch.tensor([*dims, dims[-1]], dtype=torch.int32, device=device)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class Tiling:
    """Block sizes for a dtype on a device, and how embeddings must lie for the tile kernels."""

    def __init__(self, dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        key = "tile_fp32" if dtype == torch.float32 else "tile"
        self.config = _triton.config(OP, key, device)
        self.block_m, self.block_n = self.config["BLOCK_M"], self.config["BLOCK_N"]
        block_k = self.config["BLOCK_K"]
        self.dims = dims
        self.padded: list[int] = []
        for lo, hi in segments(dims):
            before = self.padded[-1] if self.padded else 0
            self.padded.append(before + cdiv(hi - lo, block_k) * block_k)
        self.width = self.padded[-1]
        self.boundaries = boundaries(tuple(self.padded), device)
        own = {k: v for k, v in self.config.items() if k != "forward_maxnreg"}
        # "tf32" says nothing where the factors have 16 bits.
        self.options = {**own, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}

    def tiles(self, x: Tensor) -> Tensor:
        """x [R, D] as the tiles load it: segments that are multiples of BLOCK_K, rows aligned.

        x itself in the usual case, else a copy in which each segment is padded with zeros.
        """
        stride = x.stride(0)
        aligned = stride % ALIGN == 0 and stride >= x.shape[1] and x.data_ptr() % 16 == 0
        if aligned and tuple(self.padded) == self.dims:
            return x
        out = torch.zeros(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        ends = segments(self.padded)
        for (lo, hi), (to, _) in zip(segments(self.dims), ends, strict=True):
            out[:, to : to + hi - lo] = x[:, lo:hi]
        return out

    def pad(self, x: Tensor, value: float) -> Tensor:
        """x [..., N] with its last axis padded to whole tiles of columns."""
        rest = -x.shape[-1] % self.block_n
        return torch.nn.functional.pad(x, (0, rest), value=value) if rest else x

    def operand(self, x: Tensor, block: int) -> Any:
        """A pointer, or a tensor descriptor where the configuration says TMA."""
        if not self.config["TMA"]:
            return x
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(x, [block, self.config["BLOCK_K"]])


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What both tile kernels take of one bank: u [B, width] against v [N, width].

    inverse_v [K, N'] and keys of columns [N'] are padded to N' = whole tiles, see `Tiling.pad`.
    """

    tiling: Tiling
    u: Tensor
    v: Tensor
    inverse_u: Tensor
    inverse_v: Tensor
    reference: Tensor
    tau: Tensor
    keys: BankKeys
    margin: float | None
    alpha: float | None

    def pointers(self) -> tuple[Any, ...]:
        """U ... WIDTHS of either kernel."""
        keys, tiling = self.keys, self.tiling
        return (
            tiling.operand(self.u, tiling.block_m),
            tiling.operand(self.v, tiling.block_n),
            self.inverse_u, self.inverse_v, self.reference, self.tau,
            keys.row, keys.column, keys.row_start, keys.column_start,
            keys.row_query, keys.column_query, tiling.boundaries,
        )  # fmt: skip

    def sizes(self) -> tuple[int, ...]:
        """B ... stride_v of either kernel."""
        u, v = self.u, self.v
        padded = self.inverse_v.shape[1]
        return u.shape[0], v.shape[0], padded, self.tiling.width, u.stride(0), v.stride(0)

    def forward(self, maxima: Tensor, sums: Tensor, first: int) -> None:
        """Partials [K, tiles, rows] of this bank from tile `first` on."""
        tiling = self.tiling
        tiles_m, tiles_n = maxima.shape[2] // tiling.block_m, self.tiles_n(self.v.shape[0])
        options, registers = dict(tiling.options), tiling.config.get("forward_maxnreg")
        if registers and self.keys.row_start is None:
            # Two blocks on a multiprocessor: exponentials of one under the products of the other.
            options["maxnreg"] = registers
        with on(self.u.device):
            forward_kernel[(tiles_m * tiles_n,)](
                *self.pointers(), maxima[:, first:], sums[:, first:], *self.sizes(),
                maxima.stride(1), maxima.stride(0), tiles_m, tiles_n, self.margin, self.alpha,
                **options,
            )  # fmt: skip

    def tiles_n(self, columns: int) -> int:
        """Tiles across so many columns."""
        return cdiv(columns, self.tiling.block_n)

    def coefficients(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        workspace: Tensor | None,
        columns: slice,
        pull_columns: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """C [K, B, columns] in the workspace, rho [K, B], kappa [K, columns] of a chunk.

        Args:
            x: [K, B] in units of log 2.
            weight: [K, B].
            scale: what C is multiplied by, or None.
            workspace: flat, of C's dtype; None where no one wants C.
            columns: from a multiple of BLOCK_N.
            pull_columns: whether kappa is wanted.
        """
        tiling, widths, count = self.tiling, x.shape[0], columns.stop - columns.start
        batch = self.u.shape[0]
        tiles_m, tiles_n = cdiv(batch, tiling.block_m), self.tiles_n(count)
        rows, width = tiles_m * tiling.block_m, tiles_n * tiling.block_n
        c, kappa = None, None
        if workspace is not None:
            c = workspace[: widths * rows * width].view(widths, rows, width)
        if pull_columns:
            kappa = x.new_empty(widths, tiles_m, width)
        rho = x.new_empty(widths, tiles_n, rows)
        with on(x.device):
            coefficient_kernel[(tiles_m * tiles_n,)](
                *self.pointers(), x, weight, scale, c, rho, kappa, *self.sizes(), rows, width,
                columns.start, widths, tiles_m, tiles_n, self.margin, self.alpha,
                **tiling.options,
            )  # fmt: skip
        return (
            None if c is None else c[:, :batch, :count],
            rho.sum(1)[:, :batch],
            None if kappa is None else kappa.sum(1)[:, :count],
        )


def combine(maxima: Tensor, sums: Tensor, batch: int) -> Tensor:
    """X [K, batch] from partials [K, tiles, rows]."""
    widths, tiles, rows = maxima.shape
    x = maxima.new_empty(widths, batch)
    options = _triton.config(OP, "combine", x.device)
    with on(x.device):
        grid = (cdiv(batch, options["BLOCK"]), widths)
        combine_kernel[grid](maxima, sums, x, batch, rows, tiles, **options)
    return x


def prefix(
    v: Tensor,
    dims: tuple[int, ...],
    u: Tensor | None = None,
    *,
    v_row: Tensor | None = None,
    u_row: Tensor | None = None,
    each: int = 1,
) -> Tensor:
    """Inverse prefix norms [K, R] of v's rows; with u, dot products of v's rows with u's instead.

    Row r of the result is v[v_row[r]] (None: r) with u[u_row[r]] (None: r // each).
    """
    count = v.shape[0] if v_row is None else v_row.shape[0]
    out = torch.empty(len(dims), count, dtype=torch.float32, device=v.device)
    inverse, dots = (out, None) if u is None else (None, out)
    options = _triton.config(OP, "prefix", v.device)
    even = all(d % ALIGN == 0 for d in dims)
    if count:
        with on(v.device):
            prefix_kernel[(cdiv(count, options["ROWS"]),)](
                v, u, v_row, u_row, boundaries(dims, v.device), inverse, dots, count, len(dims),
                v.stride(0), 0 if u is None else u.stride(0), each, MIN_NORM**2,
                EVEN=even, **options,
            )  # fmt: skip
    return out


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs that rows take part in: coefficients and pulls [K, E], rows of y, lists of entries."""

    y: Tensor
    c: Tensor
    pull: Tensor | None = None
    start: Tensor | None = None
    entry: Tensor | None = None
    source: Tensor | None = None
    each: int = 1


def finish(
    x: Tensor,
    dims: tuple[int, ...],
    inverse: Tensor,
    pull: Tensor,
    *,
    acc: Tensor | None = None,
    unscale: Tensor | None = None,
    pairs: Pairs | None = None,
    hard: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of x [R, D]; see finish.py.

    Args:
        x, inverse, pull: rows, their inverse prefix norms and pulls [K, R].
        dims: widths.
        acc: what the GEMMs gave [R, dims[-1]], times `unscale`.
        pairs: contributions pair by pair.
        hard: own hard negatives [R * each, D] and their coefficients [K, R * each].
        out: where to write; None allocates.
    """
    rows, width = x.shape
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = pairs.y if pairs else None
    negatives, hard_c = hard or (None, None)
    each = 1 if pairs is None else pairs.each
    if negatives is not None:
        each = negatives.shape[0] // rows
    options = _triton.config(OP, "finish", x.device)
    if rows:
        # With one width there is no stride between widths, whatever torch calls it.
        assert len(dims) == 1 or inverse.stride(0) == pull.stride(0)
        with on(x.device):
            finish_kernel[(rows, cdiv(width, options["BLOCK"]))](
                out, x, acc, unscale, boundaries(dims, x.device), inverse, pull,
                pairs.start if pairs else None, pairs.entry if pairs else None,
                pairs.source if pairs else None, y, pairs.c if pairs else None,
                pairs.pull if pairs else None, negatives, hard_c,
                len(dims), width, x.stride(0), inverse.stride(0),
                0 if y is None else y.stride(0), pairs.c.shape[1] if pairs else 0,
                0 if negatives is None else negatives.stride(0),
                0 if hard_c is None else hard_c.shape[1], each, **options,
            )  # fmt: skip
    return out
