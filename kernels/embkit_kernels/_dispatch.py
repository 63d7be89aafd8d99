"""Which implementation of an op runs: `EMBKIT_KERNELS=auto|triton|ref`.

`auto` (the default) takes the Triton kernel where one exists and can run, and the torch reference
otherwise, silently. An explicit `triton` that cannot be honoured raises with the reason, because
whoever asked for it is measuring or debugging and must not time the wrong code.

The choice is made inside each custom op, at run time, so that a compiled graph obeys the variable
as an eager call does. A Triton kernel of op X arrives by adding X to `_TRITON_OPS` and a branch in
X's op; nothing above the op changes.
"""

import importlib.util
import os
from typing import Literal

import torch

Provider = Literal["triton", "ref"]

ENV = "EMBKIT_KERNELS"
CHOICES = ("auto", "triton", "ref")
OPS = ("infonce", "cosent", "mean_pool")

_TRITON_OPS: frozenset[str] = frozenset()
"""Ops that have a Triton kernel. None yet."""


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


def why_not_triton(op: str, device: torch.device) -> str | None:
    """Say why `op` has no Triton implementation for tensors on `device`, None if it has one."""
    if op not in _TRITON_OPS:
        return f"there is no Triton kernel of {op!r} yet"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, Linux only)"
    if device.type != "cuda":
        return f"Triton kernels need CUDA tensors, these are on {device.type!r}"
    return None


def provider(op: str, device: torch.device) -> Provider:
    """Resolve the implementation of `op` for tensors on `device`.

    Args:
        op: one of `OPS`.
        device: where the op's tensors live.

    Raises:
        ValueError: unknown op, or an unknown value of `EMBKIT_KERNELS`.
        KernelUnavailableError: `EMBKIT_KERNELS=triton` and this op cannot run in Triton here.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(OPS)}")
    choice = requested()
    if choice == "ref":
        return "ref"
    reason = why_not_triton(op, device)
    if reason is None:
        return "triton"
    if choice == "triton":
        raise KernelUnavailableError(
            f"{ENV}=triton was asked for, but {reason}; unset {ENV} or set it to 'ref'"
        )
    return "ref"
