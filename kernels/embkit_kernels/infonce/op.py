"""InfoNCE as two custom ops, forward and backward, opaque to torch.compile.

`torch.library.custom_op` with a fake and a registered backward: full graphs, AOT autograd and
`opcheck` work, and no [rows, columns] tensor is ever saved. A Triton kernel takes the branch that
`_dispatch.provider` opens here; the CPU keeps the reference.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from .._common import NAMESPACE, accumulate_dtype, full_precision
from . import chunked
from .problem import Problem

_PROBLEM_SCHEMA = (
    "int[] dims, Tensor positive_index, Tensor? positive_offsets, Tensor? query_ids,"
    " Tensor? passage_ids, Tensor? passage_query_ids, Tensor? hard_ids, Tensor? passage_mask,"
    " Tensor? hard_mask, bool include_positive, bool in_batch, bool same_tower, bool doc_doc,"
    " float hardness_alpha, float? margin"
)
_FIELDS = 15


def _problem(fields: tuple[Any, ...]) -> Problem:
    names = Problem.__dataclass_fields__
    values = dict(zip(names, fields, strict=True))
    return Problem(**{**values, "dims": tuple(values["dims"])})


@torch.library.custom_op(
    f"{NAMESPACE}::infonce_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor p, Tensor? hard, Tensor tau, {_PROBLEM_SCHEMA}) -> (Tensor, Tensor)",
)
def infonce_forward(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, *fields: Any
) -> tuple[Tensor, Tensor]:
    """Per-row losses [K, B] and the saved statistic X = nLSE - z_pos [K, B]; see chunked.py."""
    _dispatch.provider("infonce", q.device)
    with full_precision(q.device):
        return chunked.forward(q, p, hard, tau, _problem(fields))


@infonce_forward.register_fake
def _(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, *fields: Any
) -> tuple[Tensor, Tensor]:
    shape = (len(fields[0]), q.shape[0])
    acc = accumulate_dtype(q, p, hard)
    return q.new_empty(shape, dtype=acc), q.new_empty(shape, dtype=acc)


@torch.library.custom_op(
    f"{NAMESPACE}::infonce_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor q, Tensor p, Tensor? hard, Tensor tau,"
        f" bool need_q, bool need_p, bool need_hard, {_PROBLEM_SCHEMA})"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def infonce_backward(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    need_q: bool,
    need_p: bool,
    need_hard: bool,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, p, hard, tau; an empty tensor stands for one that is not needed."""
    _dispatch.provider("infonce", q.device)
    needs = (need_q, need_p, need_hard)
    with full_precision(q.device):
        *grads, dtau = chunked.backward(grad, x, q, p, hard, tau, _problem(fields), needs)
    dq, dp, dhard = (q.new_empty(0) if g is None else g for g in grads)
    return dq, dp, dhard, dtau


@infonce_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    need_q: bool,
    need_p: bool,
    need_hard: bool,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = q.new_empty(0)
    dhard = q.new_empty(0) if hard is None or not need_hard else hard.new_empty(hard.shape)
    return (
        q.new_empty(q.shape) if need_q else none,
        p.new_empty(p.shape) if need_p else q.new_empty(0),
        dhard,
        tau.new_empty(tau.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.plain = [v if not isinstance(v, Tensor) else None for v in inputs]
    ctx.places = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
    ctx.save_for_backward(output[1], *[inputs[i] for i in ctx.places])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _grad_x: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * (4 + _FIELDS)
    if grad is None:
        return tuple(nothing)
    x, *tensors = ctx.saved_tensors
    values = list(ctx.plain)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        values[place] = tensor
    q, p, hard, tau, *fields = values
    needs = list(ctx.needs_input_grad[:4])
    dq, dp, dhard, dtau = infonce_backward(grad, x, q, p, hard, tau, *needs[:3], *fields)
    grads = (dq, dp, dhard, dtau)
    return (*[g if need else None for g, need in zip(grads, needs, strict=True)], *nothing[4:])


infonce_forward.register_autograd(_backward, setup_context=_setup)


def infonce_rows(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem
) -> Tensor:
    """Per-row, per-width losses [K, B] (widths ascending), differentiable in q, p, hard, tau."""
    fields = [getattr(problem, name) for name in Problem.__dataclass_fields__]
    rows, _ = infonce_forward(q, p, hard, tau, list(fields[0]), *fields[1:])
    return rows
