"""Which implementation of an op runs: `EMBKIT_KERNELS=auto|triton|ref`.

`auto` (the default) takes the Triton kernel where one exists and can run, and the torch reference
otherwise, silently. An explicit `triton` that cannot be honoured raises with the reason, because
whoever asked for it is measuring or debugging and must not time the wrong code.

The choice is made inside each custom op, at run time, so that a compiled graph obeys the variable
as an eager call does. A Triton kernel of op X arrives by adding X to `_TRITON_OPS` and a branch in
X's op; nothing above the op changes.

On CPU tensors Triton means its interpreter, which checks numbers and is a thousand times too slow
for anything else: it runs only where TRITON_INTERPRET=1 and EMBKIT_KERNELS=triton both ask for it.
"""

import functools
import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch

Provider = Literal["triton", "ref"]

ENV = "EMBKIT_KERNELS"
CHOICES = ("auto", "triton", "ref")
OPS = ("infonce", "cosent", "mean_pool", "similarity")

_TRITON_OPS: frozenset[str] = frozenset({"infonce", "cosent", "mean_pool", "similarity"})
"""Ops that have a Triton kernel."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CAPABILITY = (8, 0)
"""Oldest NVIDIA generation with bf16 tensor cores and asynchronous copies."""


class KernelUnavailableError(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


def requested() -> str:
    """Return the value of `EMBKIT_KERNELS`, `auto` when unset.

    Raises:
        ValueError: the value is none of auto, triton, ref.
    """
    choice = os.environ.get(ENV, "auto")
    if choice not in CHOICES:
        raise ValueError(f"{ENV}={choice!r} is unknown; use one of {', '.join(CHOICES)}")
    return choice


def why_not_triton(op: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Say why `op` has no Triton implementation for such tensors on `device`, None if it has one.

    Args:
        op: one of `OPS`.
        device: where the op's tensors live.
        dtype: of the op's floating-point tensors; None leaves it out of the question.
    """
    if op not in _TRITON_OPS:
        return f"there is no Triton kernel of {op!r} yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, Linux only)"
    if dtype is not None and dtype not in _DTYPES:
        return f"Triton kernels take bfloat16, float16 and float32, not {dtype}"
    if interpreted():
        if requested() != "triton":
            return f"TRITON_INTERPRET is set, and the interpreter runs only with {ENV}=triton"
        return _why_not_interpreter()
    if device.type == "cpu":
        return (
            "Triton kernels need CUDA tensors, these are on 'cpu' (TRITON_INTERPRET=1, set before "
            "triton is imported, runs them in the interpreter)"
        )
    if device.type != "cuda":
        return f"Triton kernels need CUDA tensors, these are on {device.type!r}"
    if torch.version.hip is None and _capability(device.index) < _CAPABILITY:
        have = ".".join(map(str, _capability(device.index)))
        return f"Triton kernels need compute capability 8.0 or newer, this GPU has {have}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _why_not_interpreter() -> str | None:
    try:
        numpy, triton = (_release(version(name)) for name in ("numpy", "triton"))
    except PackageNotFoundError as missing:
        return f"Triton's interpreter needs {missing.name}, which is not installed"
    if numpy >= (2, 4) and triton < (3, 7):
        return "the interpreter of triton < 3.7 needs numpy < 2.4 (pip install 'numpy<2.4')"
    return None


def _release(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def provider(op: str, device: torch.device, dtype: torch.dtype | None = None) -> Provider:
    """Resolve the implementation of `op` for tensors on `device`.

    Args:
        op: one of `OPS`.
        device: where the op's tensors live.
        dtype: of the op's floating-point tensors: float64 is the reference's alone. None leaves it
            out of the question.

    Raises:
        ValueError: unknown op, or an unknown value of `EMBKIT_KERNELS`.
        KernelUnavailableError: `EMBKIT_KERNELS=triton` and this op cannot run in Triton here.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    choice = requested()
    if choice == "ref":
        return "ref"
    reason = why_not_triton(op, device, dtype)
    if reason is None:
        return "triton"
    if choice == "triton":
        raise KernelUnavailableError(
            f"{ENV}=triton was asked for, but {reason}; unset {ENV} or set it to 'ref'"
        )
    return "ref"
