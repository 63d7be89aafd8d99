"""Kernels for the tests of the ahead-of-time check: one that is good, and one for each fault."""

import dataclasses
import os
from collections.abc import Iterator

import triton
import triton.language as tl

from embkit_kernels._triton import Spec


@triton.jit
def product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):  # noqa: N803
    """out[M, N] = a[M, K] b[N, K] transposed, K a multiple of BK."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    total = tl.zeros((M, N), tl.float32)
    for c in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (c + k))
        y = tl.load(b + n[:, None] * K + (c + k))
        total = tl.dot(x, y.T, total, input_precision="ieee")
    tl.store(out + m[:, None] * N + n, total)


@triton.jit
def late_product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):  # noqa: N803
    """The same with a barrier in the loop, which silently ends the pipelining."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    total = tl.zeros((M, N), tl.float32)
    for c in range(0, K, BK):
        x = tl.load(a + m[:, None] * K + (c + k))
        y = tl.load(b + n[:, None] * K + (c + k))
        total = tl.dot(x, y.T, total, input_precision="ieee")
        tl.debug_barrier()
    tl.store(out + m[:, None] * N + n, total)


@triton.jit
def broken(a, N: tl.constexpr):  # noqa: N803
    """A type error: what the interpreter would let pass."""
    lo: tl.constexpr = 0
    lo: tl.constexpr = 1
    tl.store(a + tl.arange(0, N), lo)


def good() -> Spec:
    return Spec(
        name="good",
        kernel=product,
        signature={"a": "*bf16", "b": "*bf16", "out": "*fp32", "K": "i32"},
        constexprs={"M": 128, "N": 128, "BK": 64},
        aligned=("a", "b", "out", "K"),
        num_warps=8,
        num_stages=3,
        tensor_cores=True,
        pipelined=True,
    )


def specs() -> Iterator[Spec]:
    spec = good()
    if "EMBKIT_TEST_FAULTS" not in os.environ:
        yield spec
        yield dataclasses.replace(spec, name="capped", maxnreg=96)
        return
    change = dataclasses.replace
    # One warp for a 128 x 128 result: 512 registers a thread.
    yield change(spec, name="spills", num_warps=1)
    yield change(spec, name="too large", num_stages=8)
    yield change(spec, name="no tensor cores", pipelined=False,
                 signature={**spec.signature, "a": "*fp32", "b": "*fp32"},
                 constexprs={"M": 32, "N": 32, "BK": 32})  # fmt: skip
    yield change(spec, name="not pipelined", kernel=late_product)
    yield Spec(name="broken", kernel=broken, signature={"a": "*i32"}, constexprs={"N": 16})
    yield Spec(name="argument left out", kernel=broken, signature={}, constexprs={"N": 16})
    yield Spec(name="aborts", kernel=Aborts(), signature={"a": "*i32"}, constexprs={"N": 16})


class Aborts:
    """Stands for a kernel at which the compiler ends its own process."""

    @property
    def arg_names(self) -> list[str]:
        os.abort()
