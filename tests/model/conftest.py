"""A tiny encoder over a vocabulary of 60 words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import word_tokenizer
from tokenizers import Tokenizer

from embkit.model import Encoder
from embkit.recipe import Model


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small tensors: more threads only cost time."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture
def tokenizer() -> Tokenizer:
    """Whole words w0 to w59, lower-cased, [CLS] and [SEP] around them."""
    return word_tokenizer()


@pytest.fixture
def make_encoder(tokenizer: Tokenizer) -> Callable[..., Encoder]:
    """Makes an encoder; settings of recipe.Model by name, `prompts` besides."""

    def make(*, prompts: dict[str, str] | None = None, **settings: Any) -> Encoder:
        sizes: dict[str, Any] = {
            "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "dims": (48, 16, 8),
        }  # fmt: skip
        encoder = Encoder.from_config(
            Model(**{**sizes, **settings}),
            tokenizer,
            max_length={"query": 8, "passage": 20},
            prompts=prompts,
        )
        with torch.no_grad():  # weights of 0.02 make every embedding the same: spread them
            for parameter in encoder.backbone.parameters():
                parameter.mul_(5 if parameter.ndim > 1 else 1)
        return encoder.eval()

    return make


@pytest.fixture
def texts() -> list[str]:
    """Lengths from nothing to beyond the limit, unknown words, another case, spaces, a copy."""
    return [
        "w1 w2 w3",
        "",
        "w4",
        " ".join(f"w{i % 60}" for i in range(70)),
        "  W1 w2   W3 ",
        "nothing known here",
        "w9 w8 w7 w6 w5 w4 w3 w2 w1",
        "w1 w2 w3",
    ]
