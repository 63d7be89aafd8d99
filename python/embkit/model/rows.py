"""Rows of texts on their way through an encoder: cut by length, gathered, and weights hashed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from embkit import _rust


def micro_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Cut rows, longest first, into batches of similar length and at most ``budget`` tokens.

    Titles beside descriptions would be mostly padding in one batch, and many small batches cost
    calls: the cuts are where padded tokens plus a fixed price per batch are least in sum.

    Args:
        lengths: tokens of each row, int [n].
        budget: tokens of a batch with padding; one row is taken even when it is longer.

    Yields:
        Positions int64 [b] into ``lengths``; together each exactly once. Ties keep their order.
    """
    order, ends = _rust.micro_batches(np.ascontiguousarray(lengths, np.uint32), budget)
    if len(order):
        yield from np.split(order.astype(np.int64), ends[:-1].astype(np.int64))


def gather(store: Any, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and mask, int64 [b, L], of rows of a token store."""
    width = max(int(np.asarray(store.lengths(rows)).max(initial=0)), 1)
    ids = np.full(len(rows) * width, pad_id, np.int64)
    mask = np.zeros(len(rows) * width, np.int64)
    store.gather_padded(rows, ids, mask, pad_id)
    return ids.reshape(-1, width), mask.reshape(-1, width)


def hash_tensors(total: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Feed names, dtypes, shapes and values to a hash, in the order of the names."""
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)
