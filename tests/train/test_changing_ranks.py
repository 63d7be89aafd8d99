"""Hard negatives that change, on several ranks: the replacements and tables of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import changing_driver as driver
import numpy as np
import pytest
import torch

from embkit.data import Store
from embkit.train.checkpoint import load

pytestmark = pytest.mark.timeout(1000)
FULL = pytest.mark.skipif(not driver.FULL, reason="full test run")


@pytest.fixture(scope="module")
def out(
    store: Store, tiny_model: Path, ranked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("changing")
    done = subprocess.run(
        [sys.executable, driver.__file__, *map(str, (store.path, tiny_model, ranked, out))],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "off",
            
        },
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def log(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]


def told(out: Path, world: int, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((out / f"told-{world}-{rank}.json").read_text()))


def counts(line: dict[str, Any]) -> dict[str, Any]:
    """What a check counted, without the means."""
    found = line.get("negatives", {})
    return {
        task: {k: v for k, v in one.items() if isinstance(v, int)} for task, one in found.items()
    }


@pytest.mark.parametrize(
    ("way", "base"),
    [
        ("two", "one"),
        ("four", "one"),
        ("apart", "parts"),
        ("elastic", "one"),  # stopped on two ranks after step 7, finished by one
        pytest.param("shard", "one", marks=FULL),
        pytest.param("turns", "parts", marks=FULL),
        pytest.param("back", "one", marks=FULL),  # stopped by one after step 10, finished by two
    ],
)
def test_the_replacements_of_one_process(out: Path, way: str, base: str) -> None:
    """The same global batches, dropout off: the same checks, the same tables, the same losses."""
    want, got = log(out, base), log(out, way)
    replaced = checked = 0
    for a, b in zip(want, got, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert counts(b) == counts(a), a["step"]
        assert b.get("refresh") == a.get("refresh")
        for task, found in a.get("negatives", {}).items():
            for key in ("now", "first"):
                assert b["negatives"][task][key] == pytest.approx(found[key], abs=1e-6)
            replaced += found["replaced"]
            checked += found["checked"]
    assert [x["step"] for x in got if "refresh" in x] == [10]
    assert 10 < replaced < 0.8 * checked, "the rule must have chosen"


@pytest.mark.parametrize("way", ["two", "four", "elastic", pytest.param("back", marks=FULL)])
def test_the_state_is_that_of_one_process(out: Path, way: str) -> None:
    one, other = (load(out / name / "checkpoints/step-000012") for name in ("one", way))
    names = sorted(name for name in one.optimizer if name.startswith("dynamic."))
    assert names == sorted(name for name in other.optimizer if name.startswith("dynamic."))
    assert names == [f"dynamic.retrieval.{k}" for k in ("first", "now", "since", "slice", "visits")]
    for name in names:
        if one.optimizer[name].dtype == torch.int32:
            assert torch.equal(one.optimizer[name], other.optimizer[name]), name
        else:
            np.testing.assert_allclose(other.optimizer[name], one.optimizer[name], atol=1e-6)
    assert other.state["world"] == {"two": 2, "four": 4, "elastic": 1, "back": 2}[way]


def test_parts_have_slices_of_their_own(out: Path) -> None:
    """The state has the place of the part; the part without hard negatives has none."""
    for name in ("parts", "apart"):
        found = load(out / name / "checkpoints/step-000012").optimizer
        tasks = {n.rpartition(".")[0] for n in found if n.startswith("dynamic.")}
        assert tasks == {"dynamic.0/retrieval"}
        assert {t for x in log(out, name) for t in x.get("negatives", {})} == {"0/retrieval"}


def test_ranks_agree(out: Path) -> None:
    for world in (2, 4):
        ranks = [told(out, world, rank) for rank in range(world)]
        assert all(found == ranks[0] for found in ranks)


def test_stopped_while_a_table_is_awaited(out: Path) -> None:
    """SIGTERM to the second rank, whose miner the first one has: both stop, and go on as if not."""
    assert "stopped after step 7 of 12" in told(out, 2, 1)["preempted"]["preempted"]
    assert (out / "again/log.jsonl").read_bytes() == (out / "whole/log.jsonl").read_bytes()
    one, two = (load(out / name / "checkpoints/step-000012") for name in ("again", "whole"))
    for have, want in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert sorted(have) == sorted(want)
        assert all(torch.equal(have[name], want[name]) for name in want)
    assert not list(out.glob(".partial-*")) and not (out / "again/refresh").exists()


@FULL
def test_a_late_miner_is_no_lost_rank(out: Path) -> None:
    """Ranks that wait for longer than their timeout: for a miner, not for each other."""
    assert "digest" in told(out, 20, 0)["late"]
    late, in_time = ([x["loss_hex"] for x in log(out, name)] for name in ("late", "two"))
    assert late == in_time


@FULL
def test_killed_ranks_resume_bit_for_bit(out: Path) -> None:
    """P4, P9: SIGKILL of one of two ranks; the other says so, and both go on to the same bits."""
    found = told(out, 1)["killed"]
    print(Counter(found["landed"]), found["codes"])
    assert len(found["landed"]) == driver.KILLS
    assert {"step", "checkpoint"} <= set(found["landed"])
    done = found["codes"].count([0, 0])
    assert done >= 1 and found["codes"][-1] == [0, 0]
    # Without a kill an attempt may end too: gloo's ranks do not always meet on a busy machine.
    assert all(pair == [0, 0] or 0 not in pair for pair in found["codes"])
    for i in range(done):
        for file in ("log.jsonl", "model/model.safetensors"):
            assert (out / f"killed-{i}" / file).read_bytes() == (out / "whole" / file).read_bytes()
