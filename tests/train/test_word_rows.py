"""Gradients of word embeddings by rows: the same bits as torch's own, one table a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from embkit.data import Store
from embkit.model import Encoder
from embkit.train import finetune
from embkit.train import step as step_module
from embkit.train.word_rows import rows_added, takes_rows

SETTINGS: dict[str, Any] = {
    "steps": 5, "batch_size": 16, "token_budget": 100, "lr": 1e-2, "hard_negatives": 1,
}  # fmt: skip


@pytest.mark.parametrize("padding", [None, 0, 3])
def test_the_same_bits(padding: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 9, (7, n), generator=g) for n in (5, 11, 2)]
    slopes = [torch.randn(*ids.shape, 4, generator=g) for ids in batches]
    found = []
    for by_rows in (False, True):
        table = nn.Embedding(50, 4, padding_idx=padding)
        for ids, slope in zip(batches, slopes, strict=True):
            if by_rows:
                with rows_added(table):
                    out = table(ids)
            else:
                out = table(ids)
            out.backward(slope)
        assert table.weight.grad is not None and not table._forward_hooks
        found.append(table.weight.grad.view(torch.int32))
    assert torch.equal(*found)


def test_which_tables(make_encoder: Callable[..., Encoder]) -> None:
    assert takes_rows(make_encoder().backbone.get_input_embeddings())
    frozen = nn.Embedding(4, 2).requires_grad_(False)
    scaled = type("Scaled", (nn.Embedding,), {})(4, 2)  # as Gemma's, which multiplies
    for table in (frozen, scaled, nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2, max_norm=1)):
        assert not takes_rows(table)


class Tables(TorchDispatchMode):
    """Counts backwards that make a gradient of the whole table, and of rows alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding_dense_backward.default:
            self.seen["table" if args[2] == self.size else "rows"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("graph_memory", [8.0, 0.0])
def test_a_run_has_the_same_weights(
    graph_memory: float, store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Several micro-batches a step, with dropout, kept and forgotten graphs."""
    options = {**SETTINGS, "graph_memory": graph_memory}
    size = make_encoder().backbone.get_input_embeddings().num_embeddings
    with Tables(size) as ours:
        rows = finetune(make_encoder(dropout=0.1), store, out=tmp_path / "rows", **options)
    monkeypatch.setattr(step_module, "takes_rows", lambda table: False)
    with Tables(size) as theirs:
        plain = finetune(make_encoder(dropout=0.1), store, out=tmp_path / "plain", **options)
    assert rows.digest() == plain.digest()
    logs = [(tmp_path / run / "log.jsonl").read_bytes() for run in ("rows", "plain")]
    assert logs[0] == logs[1]
    assert ours.seen["table"] == SETTINGS["steps"] < theirs.seen["table"]
    assert sum(ours.seen.values()) == sum(theirs.seen.values())
