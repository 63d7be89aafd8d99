"""Losses over ranks: every form gives the value and the gradients of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loss_ranks_driver as driver
import numpy as np
import pytest

WORLDS = (2, 3) if os.environ.get("EMBKIT_TEST_FULL") == "1" else (2,)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("losses")
    done = subprocess.run(
        [sys.executable, driver.__file__, str(out), ",".join(map(str, WORLDS))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", driver.SETTINGS)
def test_ranks_add_up_to_one_process(out: Path, case: str, world: int) -> None:
    """Seven rows on two ranks: four and three. Repeated texts, absent negatives, own weights."""
    want = driver.found(case, driver.batch_of(case).args, None)
    ranks = [dict(np.load(out / f"{case}-{world}-{r}.npz")) for r in range(world)]
    for name, value in want.items():
        got = sum(rank[name] for rank in ranks)
        np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-12, err_msg=name)
