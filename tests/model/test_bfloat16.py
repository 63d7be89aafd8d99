"""Encoders in bfloat16: vectors near those in float32, and a digest of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embkit.evaluate.words import _encoder
from embkit.model import Encoder

TEXTS = [" ".join(f"w{(i * j) % 60}" for j in range(1, 2 + i % 9)) for i in range(40)]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_vectors_are_near_and_float32(make_encoder: Callable[..., Encoder], pooling: str) -> None:
    encoder = make_encoder(pooling=pooling)
    want, digest = encoder.encode(TEXTS), encoder.digest()
    half = encoder.bfloat16()
    got = half.encode(TEXTS)
    assert got.dtype == np.float32 and got.shape == want.shape
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    cosine = np.einsum("nd,nd->n", got, want)
    assert 0.999 < cosine.min() < 1 - 1e-7, "in another precision, and no worse than that"
    # Caches and results of evaluations know models by their digest: these are two models.
    assert half.digest() != digest
    narrow = half.encode(TEXTS, dim=8)
    np.testing.assert_allclose(
        narrow, got[:, :8] / np.linalg.norm(got[:, :8], axis=1, keepdims=True), atol=1e-6
    )


def test_the_command_line_asks_for_it(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    model = make_encoder().export(tmp_path / "model")
    kinds = [{p.dtype for p in _encoder(model, bf16).parameters()} for bf16 in (False, True)]
    assert kinds == [{torch.float32}, {torch.bfloat16}]
