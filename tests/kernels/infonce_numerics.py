"""Errors of infonce against float64, beside plain torch in the same dtype.

    EMBKIT_KERNELS=triton TRITON_INTERPRET=1 python tests/kernels/infonce_numerics.py

prints the table of docs/kernels.md (without the variables: the reference's); test_infonce_triton.py
holds each row to its bounds.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from embkit_kernels import infonce, infonce_naive

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One problem: `easy` adds that much of the positive to its query, on both sides."""

    dtype: str
    dims: tuple[int, ...]
    tau: float
    easy: float = 0.0
    margin: float | None = None


ROWS = [
    Row("fp32", (32, 64, 96), 0.02),
    Row("fp32", (32, 64, 96), 0.01, easy=4.0),
    Row("bf16", (32, 64, 96), 0.02),
    Row("bf16", (32, 64, 96), 0.01, margin=0.1),
    Row("bf16", (64,), 0.05, easy=1.0),
    Row("bf16", (64,), 0.01, easy=4.0),
    Row("bf16", (64,), 0.005),
    Row("fp16", (32, 64), 0.02),
]
BATCH, COLUMNS = 40, 56


def inputs(row: Row) -> tuple[Tensor, Tensor]:
    """q and p in the row's dtype."""
    rng = torch.Generator().manual_seed(20)
    p = torch.randn(COLUMNS, row.dims[-1], generator=rng)
    q = torch.randn(BATCH, row.dims[-1], generator=rng) + row.easy * p[:BATCH]
    return q.to(DTYPES[row.dtype]), p.to(DTYPES[row.dtype])


def eager(q: Tensor, p: Tensor, dims: tuple[int, ...], *, temperature: float, margin: Any) -> Any:
    """The loss as it is usually written: slice, normalise, one product, cross-entropy."""
    total, index = 0.0, torch.arange(q.shape[0])
    for d in dims:
        s = F.normalize(q[:, :d], dim=-1) @ F.normalize(p[:, :d], dim=-1).t()
        if margin is not None:
            drop = s.detach() > s.detach()[index, index, None] + margin
            drop[index, index] = False
            s = s.masked_fill(drop, -torch.inf)
        total = total + F.cross_entropy(s / temperature, index)
    return total, None


def measured(function: Any, q: Tensor, p: Tensor, row: Row) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dq, dp."""
    q, p = q.clone().requires_grad_(), p.clone().requires_grad_()
    loss, _ = function(q, p, row.dims, temperature=row.tau, margin=row.margin)
    return (loss.detach(), *torch.autograd.grad(loss, (q, p)))


def errors(row: Row) -> dict[str, list[float]]:
    """Relative errors of loss, dq, dp of infonce and of eager torch; and the loss itself."""
    q, p = inputs(row)
    want = measured(infonce_naive, q.double(), p.double(), row)

    def against(got: tuple[Tensor, ...]) -> list[float]:
        return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]

    return {
        "loss": [float(want[0])],
        "infonce": against(measured(infonce, q, p, row)),
        "eager": against(measured(eager, q, p, row)),
    }


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| inputs, widths, temperature | loss | infonce: loss / dq / dp | eager |",
        "|---|---|---|---|",
    ]
    for row in ROWS:
        found = errors(row)
        extra = f", margin {row.margin}" if row.margin is not None else ""
        extra += ", easy" if row.easy else ""
        cells = [" / ".join(f"{e:.0e}" for e in found[name]) for name in ("infonce", "eager")]
        name = f"{row.dtype} {'/'.join(map(str, row.dims))}, {row.tau}{extra}"
        lines.append(f"| {name} | {found['loss'][0]:.1e} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import pytest
    from interpreter import exact_bf16

    if torch.cuda.is_available():
        raise SystemExit("a table of the interpreter and of CPUs; on a GPU `make gpu` measures")
    exact_bf16(pytest.MonkeyPatch())
    print(table())
