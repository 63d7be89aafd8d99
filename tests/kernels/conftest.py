"""Kernel tests run on torch alone: without an installed embkit the source folder is imported.

`from interpreter import against` works in every test here (see interpreter.py for the fixture).
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if importlib.util.find_spec("embkit_kernels") is None:
    sys.path.insert(0, str(HERE.parents[1] / "kernels"))

from interpreter import interpreter  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small problems are faster on one thread, and the machine may be shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: no test touches the global one."""
    return torch.Generator().manual_seed(20)
