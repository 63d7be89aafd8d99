"""Fixtures that more than one room uses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import TINY, make_small_data

# One compute thread: small shapes run faster, and results do not depend on the machine's load.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton kernels run in Triton's interpreter where there is no GPU; tests/kernels/interpreter.py
# says why this must be set so early.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only small data folder, shared by a session."""
    return make_small_data(tmp_path_factory.mktemp("small-data"))


@pytest.fixture
def tiny_recipe(small_data: Path) -> Callable[..., Any]:
    """Make a quickstart recipe that runs in seconds: ``tiny_recipe("finetune.lr=0.1", ...)``."""
    from embkit import recipe

    def make(*overrides: str) -> Any:
        data = f"data.path={json.dumps(str(small_data))}"
        return recipe.load("quickstart", overrides=[data, *TINY, *overrides])

    return make
