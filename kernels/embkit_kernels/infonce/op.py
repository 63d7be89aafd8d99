"""InfoNCE as custom ops, opaque to torch.compile.

`infonce_forward` and `infonce_backward` are the pair that any reduction works with.
`infonce_fused` is the CPU's short cut for a scalar loss whose weights are known: it takes the
gradients on the way (three units of work, not four) and its backward scales them.

`torch.library.custom_op` with a fake and a registered backward: full graphs, AOT autograd and
`opcheck` work, and no [rows, columns] tensor is ever saved. `_dispatch.provider` chooses between
the Triton kernels and the chunked reference, which have the same arguments and results.
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
    " Tensor? passage_ids, Tensor? passage_query_ids, Tensor? hard_ids, Tensor? hard_query_ids,"
    " Tensor? passage_mask, Tensor? hard_mask, bool include_positive, bool in_batch,"
    " bool same_tower, bool doc_doc, float hardness_alpha, float? margin,"
    " bool margin_relative, Tensor? guide_query, Tensor? guide_passage, Tensor? guide_hard,"
    " float guide_margin, bool guide_relative"
)
_FIELDS = 22


def _problem(fields: tuple[Any, ...]) -> Problem:
    names = Problem.__dataclass_fields__
    values = dict(zip(names, fields, strict=True))
    return Problem(**{**values, "dims": tuple(values["dims"])})


def _implementation(q: Tensor, p: Tensor, hard: Tensor | None, problem: Problem) -> Any:
    """The module whose `forward` and `backward` run here: `.triton` or `chunked`.

    A relative margin and a guide, which the tiles do not have, are the reference's on every device.

    Raises:
        KernelUnavailableError: one of them where the Triton kernels are asked for by name.
    """
    dtype = torch.promote_types(q.dtype, p.dtype)
    dtype = dtype if hard is None else torch.promote_types(dtype, hard.dtype)
    tiles = _dispatch.provider("infonce", q.device, dtype) == "triton"
    missing = "a relative margin" if problem.margin_relative else ""
    missing = "a guide" if problem.guide_query is not None else missing
    if missing and _dispatch.requested() == "triton":
        raise _dispatch.KernelUnavailableError(f"infonce: no Triton kernel has {missing}")
    if tiles and q.numel() and p.numel() and not missing:
        from . import triton

        return triton
    return chunked


@torch.library.custom_op(
    f"{NAMESPACE}::infonce_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor p, Tensor? hard, Tensor tau, {_PROBLEM_SCHEMA}) -> (Tensor, Tensor)",
)
def infonce_forward(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, *fields: Any
) -> tuple[Tensor, Tensor]:
    """Per-row losses [K, B] and the saved statistic X = nLSE - z_pos [K, B]; see chunked.py."""
    problem = _problem(fields)
    with full_precision(q.device):
        return _implementation(q, p, hard, problem).forward(q, p, hard, tau, problem)


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
    needs, problem = (need_q, need_p, need_hard), _problem(fields)
    run = _implementation(q, p, hard, problem)
    with full_precision(q.device):
        grads = run.backward(grad, x, q, p, hard, tau, problem, needs)
    return _cast(grads, q, p, hard, tau)


def _cast(
    grads: chunked.Gradients, q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dp, dhard, dtau = (
        q.new_empty(0) if g is None or like is None else g.to(like.dtype)
        for g, like in zip(grads, (q, p, hard, tau), strict=True)
    )
    return dq, dp, dhard, dtau


def _fake_gradients(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dp, dhard = (
        like.new_empty(like.shape) if like is not None and need else q.new_empty(0)
        for like, need in zip((q, p, hard), needs, strict=True)
    )
    return dq, dp, dhard, tau.new_empty(tau.shape)


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
    return _fake_gradients(q, p, hard, tau, (need_q, need_p, need_hard))


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


@torch.library.custom_op(
    f"{NAMESPACE}::infonce_fused",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor p, Tensor? hard, Tensor tau, Tensor weights,"
        f" bool need_q, bool need_p, bool need_hard, {_PROBLEM_SCHEMA})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def infonce_fused(
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    weights: Tensor,
    need_q: bool,
    need_p: bool,
    need_hard: bool,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sum(weights * rows), the per-row losses [K, B], and the sum's gradients of q, p, hard, tau.

    Only the first output is differentiable (in weights too); a gradient not needed is empty.
    """
    needs, problem = (need_q, need_p, need_hard), _problem(fields)
    run = _implementation(q, p, hard, problem)
    with full_precision(q.device):
        if run is chunked:
            rows, grads = chunked.fused(weights, q, p, hard, tau, problem, needs)
        else:  # a tile has not all of a row's columns: there is no short cut
            rows, x = run.forward(q, p, hard, tau, problem)
            grads = run.backward(weights, x, q, p, hard, tau, problem, needs)
        return (rows * weights).sum(), rows, *_cast(grads, q, p, hard, tau)


@infonce_fused.register_fake
def _(
    q: Tensor,
    p: Tensor,
    hard: Tensor | None,
    tau: Tensor,
    weights: Tensor,
    need_q: bool,
    need_p: bool,
    need_hard: bool,
    *fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulate_dtype(q, p, hard)
    rows = q.new_empty((len(fields[0]), q.shape[0]), dtype=acc)
    grads = _fake_gradients(q, p, hard, tau, (need_q, need_p, need_hard))
    return q.new_empty((), dtype=acc), rows, *grads


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.count = len(inputs)
    ctx.set_materialize_grads(False)


def _fused_backward(ctx: Any, grad: Tensor | None, *_others: Tensor | None) -> tuple[Any, ...]:
    nothing = [None] * ctx.count
    if grad is None:
        return tuple(nothing)
    rows, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    out = [(g * grad).to(g.dtype) if n else None for g, n in zip(saved, needs[:4], strict=True)]
    return (*out, rows * grad if needs[4] else None, *nothing[5:])


infonce_fused.register_autograd(_fused_backward, setup_context=_fused_setup)


def _fields(problem: Problem) -> list[Any]:
    fields = [getattr(problem, name) for name in Problem.__dataclass_fields__]
    return [list(fields[0]), *fields[1:]]


def infonce_rows(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem
) -> Tensor:
    """Per-row, per-width losses [K, B] (widths ascending), differentiable in q, p, hard, tau."""
    rows: Tensor = infonce_forward(q, p, hard, tau, *_fields(problem))[0]
    return rows


def infonce_sum(
    q: Tensor, p: Tensor, hard: Tensor | None, tau: Tensor, problem: Problem, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """sum(weights * rows), differentiable, and the rows [K, B] themselves, detached."""
    sides = (q, p, hard)
    needs = [x is not None and x.requires_grad for x in sides]
    if q.device.type == "cpu" and torch.is_grad_enabled() and (any(needs) or tau.requires_grad):
        loss, rows, *_ = infonce_fused(q, p, hard, tau, weights, *needs, *_fields(problem))
        return loss, rows.detach()
    rows = infonce_rows(q, p, hard, tau, problem)
    return (rows * weights).sum(), rows.detach()
