"""GradCache without its model: what loss and bookkeeping of a cached batch cost.

Both sides embed by looking a row up in a table and scaling its numbers by weights, whose gradient
they must agree on: what is left is the chunks, their random numbers, the loss of all rows at every
width, and the backward of each chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from embkit.bench import Case, isa
from embkit.losses import Sides, value_and_grad
from embkit.recipe import Train
from embkit.train.batches import MicroBatch
from embkit.train.gradcache import Chunks

_CHUNK, _TEMPERATURE = 32, 0.05


def bookkeeping(quick: bool) -> Case:
    """2048 pairs in chunks of 32, MRL of three widths, the model a table and D weights."""
    from sentence_transformers import SentenceTransformer, losses

    rows, dims = (256, (64, 32, 16)) if quick else (2048, (384, 256, 128))
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2 * rows, dims[0], generator=generator)
    start[rows:] += start[:rows]  # a positive is near its query
    sides = [torch.arange(rows), torch.arange(rows, 2 * rows)]

    ours = _Table(start)
    micro = [_micro(places) for places in torch.arange(2 * rows).split(_CHUNK)]
    keys = torch.arange(rows, dtype=torch.int32)
    none = torch.zeros(rows, 0, dtype=torch.int32)
    about = Sides(
        kind="retrieval", query_key=keys, positive_key=keys, hard_key=none, hard_mask=none.bool(),
        score=torch.zeros(rows), weight=torch.ones(rows),
    )  # fmt: skip
    config = Train(batch_size=rows, temperature=_TEMPERATURE)

    def embkit() -> np.ndarray:
        ours.zero_grad()
        chunks = Chunks(lambda m: m.embed(ours), micro, seed=0, keep=0)
        e_RD = chunks.forward()
        places = (*sides, none.long())
        gradient = value_and_grad(e_RD, *places, about, dims=dims, config=config)[1]
        chunks.backward(gradient)
        return ours.gradient()

    theirs = _Features(start)
    model = SentenceTransformer(modules=[theirs], device="cpu")
    inner = losses.CachedMultipleNegativesRankingLoss(
        model, scale=1 / _TEMPERATURE, mini_batch_size=_CHUNK
    )
    cached = losses.MatryoshkaLoss(model, inner, list(dims))

    def peer() -> np.ndarray:
        theirs.zero_grad()
        columns = [{"input_ids": s[:, None], "attention_mask": s[:, None] * 0 + 1} for s in sides]
        cached(columns, None).backward()
        return theirs.gradient()

    def check(a: np.ndarray, b: np.ndarray) -> None:
        far = float(np.linalg.norm(a - b) / np.linalg.norm(a))
        assert far <= 1e-4, f"gradients differ by {far:.1e}"

    return Case(
        name="train.bookkeeping", unit="ms", measure="cpu", work=1.0, ours=embkit,
        rivals={"sentence-transformers, cached": peer}, check=check, goal=">= 5x",
        facts={"n": rows, "chunk": _CHUNK, "dims": dims, "isa": isa()}, two_threads=False,
    )  # fmt: skip


class _Table(nn.Module):
    """An encoder that looks a row up by its only token, and scales it."""

    def __init__(self, rows_RD: torch.Tensor) -> None:
        super().__init__()
        self.rows_RD = rows_RD
        self.scale_D = nn.Parameter(torch.ones(rows_RD.shape[1]))

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None, prompt_len: torch.Tensor | None
    ) -> torch.Tensor:
        return self.rows_RD.index_select(0, ids[:, 0]) * self.scale_D

    def gradient(self) -> np.ndarray:
        assert self.scale_D.grad is not None
        return self.scale_D.grad.numpy().copy()


class _Features(_Table):
    """The same as a module of sentence-transformers."""

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:  # type: ignore[override]
        return {
            **features,
            "sentence_embedding": super().forward(features["input_ids"], None, None),
        }


def _micro(places: torch.Tensor) -> MicroBatch:
    ids = places[:, None]
    zeros = torch.zeros_like(places)
    return MicroBatch(ids=ids, mask=torch.ones_like(ids), prompt_len=zeros, longest=1)
