"""A tiny source, its tokenizer, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import build, make_source, make_tokenizer


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("tiny") / "source")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tiny") / "tokenizer")


@pytest.fixture(scope="session")
def built(source: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records, clean and store, the store in tens of shards. Read only."""
    out = tmp_path_factory.mktemp("built")
    build(source, tokenizer, out)
    return out
