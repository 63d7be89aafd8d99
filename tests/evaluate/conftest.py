"""A small real evaluation split and an encoder with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def split(small_data: Path) -> Path:
    return small_data / "dev"


@pytest.fixture(scope="session")
def encoder() -> Any:
    """Random weights: any ranking will do, as long as it is not a constant one."""
    from embkit.data.vocabulary import train_wordpiece
    from embkit.model import Encoder
    from embkit.recipe import Model

    texts = [f"{a} {b} library for programs {i}" for i, (a, b) in enumerate(
        (a, b) for a in ("small", "fast", "old") for b in ("text", "image", "sound")
    )]  # fmt: skip
    model = Model(hidden=24, layers=1, heads=2, intermediate=32, dims=(20, 12, 5))
    vocabulary = Tokenizer.from_str(train_wordpiece(texts, vocab_size=150))
    return Encoder.from_config(model, vocabulary, max_length={"query": 16, "passage": 24})
