"""`embkit run` under a launcher of several ranks: the scores of one process, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small import TINY

from embkit import recipe

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
pytestmark = [pytest.mark.promise, pytest.mark.timeout(1000 if FULL else 300)]
SHORT = ("runs=[{seed = 0}]", "evaluate.bm25=false")


@pytest.fixture(scope="module")
def recipe_file(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    data = f"data.path={json.dumps(str(small_data))}"
    recipe.save(recipe.load("quickstart", overrides=[data, *TINY, *SHORT]), path)
    return path


@pytest.fixture(scope="module")
def out(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_ranks.py")), str(out), str(recipe_file)],
        capture_output=True, text=True, timeout=900 if FULL else 290, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "plain"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "told.json").write_text(done.stdout.splitlines()[-1])
    return out


def log(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]


def scores(run: Path) -> list[tuple[str, float]]:
    """Every figure of result.json, with where it stands."""

    def leaves(at: Any, where: str) -> list[tuple[str, float]]:
        if isinstance(at, dict):
            return [x for k, v in at.items() for x in leaves(v, f"{where}/{k}")]
        return [(where, at)] if isinstance(at, float) else []

    return leaves(json.loads((run / "result.json").read_text())["scores"], "")


def compare(one: Path, two: Path) -> None:
    """Losses of one process, and its scores in points: a text or two that change places among the
    hundred of a set are rounding too."""
    for name in ("pre", "ft-0"):
        for a, b in zip(log(one, name), log(two, name), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), (name, a["step"])
            assert a["task"] == b["task"]
    want, got = scores(one), scores(two)
    assert len(want) > 100 and [w for w, _ in got] == [w for w, _ in want]
    for (where, a), (_, b) in zip(want, got, strict=True):
        assert b == pytest.approx(a, abs=0.2 if "/mean/" in where else 2.0), where


def test_a_run_on_two_ranks_is_that_of_one(out: Path) -> None:
    """Also killed in its fine-tuning and started again: stages that were done stay as they are."""
    told = json.loads((out / "told.json").read_text())
    assert told["codes"]["killed"] == [1, -9] and told["codes"]["again"] == [0, 0]
    assert told["kept"]
    compare(out / "one", out / "two")
    assert not list((out / "two").glob(".partial-*"))
    first, second = (json.loads((out / f"two-{r}.json").read_text()) for r in range(2))
    assert first["scores"] and not second, "the first rank judges"
    assert (out / "two-1.txt").read_text() == "", "and speaks"


@pytest.mark.skipif(not FULL, reason="full test run")
def test_a_killed_run_of_two_ranks_resumes_bit_for_bit(out: Path) -> None:
    for name in ("pre/log.jsonl", "ft-0/log.jsonl", "ft-0/model/model.safetensors", "result.json"):
        assert (out / "two" / name).read_bytes() == (out / "whole" / name).read_bytes(), name


@pytest.mark.skipif(not FULL, reason="full test run")
@pytest.mark.timeout(1200)
def test_torchrun_of_the_commands(out: Path, recipe_file: Path, tmp_path: Path) -> None:
    """A run whose worker is killed in its fine-tuning, and again; each training stage by itself."""
    words = ["run", str(recipe_file), "--out", str(tmp_path / "run")]
    lost = torchrun(words)
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until and lost.poll() is None:
            if any(p.read_bytes() for p in tmp_path.glob("run/.partial-ft-0-*/log.jsonl")):
                break
            time.sleep(0.02)
        children = Path(f"/proc/{lost.pid}/task/{lost.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        said = lost.communicate(timeout=120)[0]
    finally:
        lost.kill()
    assert lost.returncode == 1, said[-3000:]
    assert (tmp_path / "run/pre/manifest.json").is_file()
    assert not (tmp_path / "run/ft-0").exists()
    finish(words)
    compare(out / "one", tmp_path / "run")

    one, settings = out / "one", ["--recipe", str(recipe_file)]
    finish(["prefinetune", str(one / "store"), "--out", str(tmp_path / "pre"), *settings])
    options = ["--negatives", str(one / "mined"), "--out", str(tmp_path / "ft-0"), *settings]
    finish(["finetune", str(one / "pre"), str(one / "store"), *options])
    for name in ("pre", "ft-0"):
        want, got = log(one, name), log(tmp_path, name)
        assert [x["loss"] for x in got] == pytest.approx([x["loss"] for x in want], rel=1e-4)


def torchrun(words: list[str]) -> subprocess.Popen[str]:
    """`embkit` in two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "embkit", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(words: list[str]) -> None:
    process = torchrun(words)
    try:
        said = process.communicate(timeout=400)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said[-3000:]
    assert said.count("  wrote ") == (words[0] != "run"), "one process speaks"
