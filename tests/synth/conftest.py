"""A small language model for the whole session, and one thread for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from lm import make_lm


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small tensors: more threads only cost time."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture(scope="session")
def lm() -> tuple[Any, Any]:
    """Model and tokenizer."""
    return make_lm()
