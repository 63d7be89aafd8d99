"""Whole runs on two gloo ranks: the run of one process, stopped and resumed, on other numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks_driver
import torch

from embkit.data import Store
from embkit.errors import UsageError
from embkit.recipe import Part, Train
from embkit.train.checkpoint import load
from embkit.train.checks import ranks_fit
from embkit.train.parallel import Ranks

DRIVER = Path(__file__).with_name("loop_ranks_driver.py")


@pytest.fixture(scope="module")
def out(
    store: Store,
    tiny_model: Path,
    dev: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(store.path), str(tiny_model), str(out), str(dev)],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "off",
            "PYTHONPATH": os.pathsep.join([str(DRIVER.parents[1]), *sys.path]),
        },
        capture_output=True, text=True, timeout=900 if ranks_driver.FULL else 290, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def log(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["two", "shard", "elastic"])
def test_the_losses_of_one_process(out: Path, way: str) -> None:
    one, two = log(out, "one"), log(out, way)
    assert [x["task"] for x in one] == [x["task"] for x in two]
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert [b[k] for k in ("tokens", "rows")] == [a[k] for k in ("tokens", "rows")]
        if "scores" in b:
            assert b["scores"]["mean"]["32"] == pytest.approx(a["scores"]["mean"]["32"], abs=1e-6)


def test_ranks_agree_and_only_the_first_is_watched(out: Path) -> None:
    first, second = (json.loads((out / f"told-{r}.json").read_text()) for r in range(2))
    for name in ("two", "shard", "again", "whole"):
        assert first[name]["digest"] == second[name]["digest"]
        assert first[name]["steps"] and not second[name]["steps"]
    assert "after step 4 of 10" in second["stopped"]["preempted"], "the second rank got SIGTERM"
    assert first["stopped"]["preempted"] == second["stopped"]["preempted"]


def test_a_stopped_run_of_two_ranks_resumes_bit_for_bit(out: Path) -> None:
    assert (out / "again/log.jsonl").read_bytes() == (out / "whole/log.jsonl").read_bytes()
    one, two = (load(out / n / "checkpoints/step-000010") for n in ("again", "whole"))
    assert one.state["world"] == 2 and len(one.state["sha256"]) == 4
    for name in two.model:
        assert torch.equal(one.model[name], two.model[name])
    for name in two.optimizer:
        assert torch.equal(one.optimizer[name], two.optimizer[name]), name
    assert not list(out.glob(".partial-*"))


@pytest.mark.parametrize("way", ["cut", "cut-silently"])
def test_ranks_that_are_parted_say_so_and_resume_bit_for_bit(out: Path, way: str) -> None:
    """P9: their cable is pulled (or loses every packet) in step 5 of 10."""
    told = json.loads((out / "told.json").read_text())["cut"]
    if told["missing"]:
        pytest.skip(told["missing"])
    if way not in told:
        pytest.skip("full test run")
    assert told[way] == [3, 3]
    for rank in range(2):
        said = json.loads((out / f"{way}-{rank}.json").read_text())
        print(way, rank, said)
        assert "Another rank did not answer" in said["error"]
        assert f"rank {rank} of 2" in said["error"]
        assert said["seconds"] < ranks_driver.TIMEOUT + 10
    assert (out / way / "log.jsonl").read_bytes() == (out / "whole/log.jsonl").read_bytes()
    one, two = (load(out / n / "checkpoints/step-000010") for n in (way, "whole"))
    assert one.state["sha256"] == two.state["sha256"]


def test_checkpoints_of_two_ranks_are_read_by_one(out: Path) -> None:
    """Reached through "elastic": stopped after step 6 on two ranks, finished by one."""
    told = json.loads((out / "told.json").read_text())
    assert told["elastic"]["steps"] == [7, 8, 9, 10]
    assert load(out / "elastic/checkpoints/step-000010").state["world"] == 1


def test_a_run_that_does_not_fit_its_ranks() -> None:
    """Fewer ranks than the recipe needs, before the first step."""
    two, one = Ranks(), Ranks()
    two.world = 2
    parts = tuple(Part(tasks={n: 1.0}, ranks=r) for n, r in (("a", 3), ("b", 1)))
    ranks_fit(Train(parts=parts), one)  # parts take turns
    with pytest.raises(UsageError, match="need 4 ranks, this run has 2"):
        ranks_fit(Train(parts=parts), two)
    with pytest.raises(UsageError, match="Sets of 4 ranks do not divide 2"):
        ranks_fit(Train(sharding="hybrid", shard_ranks=4), two)
