"""Gradients of word embeddings, added row by row into one that is there.

Each backward of ``nn.Embedding`` makes a gradient as large as the table, which is zero but for the
rows of the micro-batch's words, and adds it to the sum so far. Here the first micro-batch of a step
does so, and the others add their own rows alone: the same additions in the same order, so the same
bits, without passes over a table that hardly changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_dense = torch.ops.aten.embedding_dense_backward


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: nn.Parameter, ids: torch.Tensor, out: torch.Tensor, padding: int
    ) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (ids,), weight = ctx.saved_tensors, ctx.weight
        gradient = gradient.to(weight.dtype)
        if weight.grad is None:
            weight.grad = _dense(gradient, ids, len(weight), ctx.padding, False)
        else:
            words, place = torch.unique(ids, return_inverse=True)
            own = _dense(gradient, place, len(words), -1, False)
            own.masked_fill_((words == ctx.padding)[:, None], 0)
            weight.grad.index_add_(0, words, own)
        return None, None, None, None


def takes_rows(table: Any) -> bool:
    """Whether a table's gradient can be added to so: on the CPU, whole, trained, and plain."""
    return (
        type(table) is nn.Embedding
        and type(table.weight) is nn.Parameter
        and table.weight.device.type == "cpu"
        and table.weight.requires_grad
        and table.max_norm is None
        and not (table.scale_grad_by_freq or table.sparse)
    )


@contextmanager
def rows_added(table: nn.Embedding) -> Iterator[None]:
    """Forwards inside have backwards that add rows to ``table.weight.grad``.

    What waits for the gradient of the table (``register_post_accumulate_grad_hook``) is not called.
    """

    def hook(module: nn.Module, inputs: tuple[Any, ...], out: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return None
        padding = -1 if table.padding_idx is None else table.padding_idx
        return _AddRows.apply(table.weight, inputs[0], out.detach(), padding)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
