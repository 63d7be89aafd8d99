"""Several ranks: the losses and gradients of one process, and an error when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_driver as driver
import torch

from embkit.data import Store
from embkit.errors import UsageError
from embkit.model import Encoder
from embkit.recipe import Part, Train
from embkit.train.batches import Steps
from embkit.train.parallel import Ranks, training_device
from embkit.train.sharding import spread

Found = dict[str, Any]


@pytest.fixture(scope="module")
def out(skewed: Store, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ways")
    done = subprocess.run(
        [sys.executable, driver.__file__, str(skewed.path), str(tiny_model), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "off"},
        capture_output=True, text=True, timeout=900 if driver.FULL else 290, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def of(out: Path, way: str, world: int, rank: int = 0) -> Found:
    return dict(np.load(out / f"{way}-{world}-{rank}.npz"))


def compare(got: Found, want: Found, *, loss: float = 1e-6, gradient: float = 1e-5) -> None:
    """The same losses, and gradients by relative L2."""
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=loss)
    np.testing.assert_allclose(got["statistics"], want["statistics"], rtol=1e-4, atol=1e-4)
    names = [n for n in want if n.startswith("grad.")]
    assert len(names) > 30 and names == [n for n in got if n.startswith("grad.")]
    top = max(float(np.linalg.norm(want[n])) for n in names)
    for name in names:
        size = float(np.linalg.norm(want[name])) + 1e-3 * top
        assert float(np.linalg.norm(got[name] - want[name])) <= gradient * size, name


# What one process must have given, by way.
BASE = {
    "accumulate-ring": "accumulate",
    "learned-apart": "learned",
    "balanced-apart-2": "balanced",
    "balanced-apart-4": "balanced",
    "ring": "retrieval",
    "gecko-ring": "gecko",
    "nothing-kept": "retrieval",
    "shard": "retrieval",
    "shard-ring": "retrieval",
    "shard-offload": "mixed",
    "hybrid": "retrieval",
}
SAME = [
    (way, world, BASE.get(way, way))
    for way, (_, worlds) in driver.WAYS.items()
    for world in worlds
    if "bf16" not in way and (world > 1 or way in BASE)
]


@pytest.mark.parametrize(("way", "world", "base"), SAME)
def test_ranks_have_the_loss_and_gradients_of_one(
    out: Path, way: str, world: int, base: str
) -> None:
    """The same global batches, dropout off; every rank ends with the same weights."""
    want, ranks = of(out, base, 1), [of(out, way, world, r) for r in range(world)]
    for found in ranks:
        compare(found, want)
        np.testing.assert_array_equal(found["counts"][:, 0] > 0, True)
        for name, value in ranks[0].items():
            if not name.startswith(("examples", "grad", "moves")):
                np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_is_sent_in_a_step(out: Path) -> None:
    """One gather and one scatter; around the ring W - 1 blocks, W - 2 back and W - 1 gradients."""
    for world in driver.WAYS["ring"][1]:
        assert of(out, "retrieval", world)["moves"].tolist() == [1, 1, 0]
        assert of(out, "ring", world)["moves"].tolist() == [0, 0, 3 * world - 4]


def test_each_example_is_on_one_rank(out: Path) -> None:
    for way in ("retrieval", "mixed"):
        want = of(out, way, 1)["examples"]
        for world in driver.WAYS[way][1][1:]:
            parts = np.concatenate([of(out, way, world, r)["examples"] for r in range(world)], 1)
            assert [sorted(x[x >= 0]) for x in parts] == [sorted(x[x >= 0]) for x in want]


@pytest.mark.skipif(not driver.FULL, reason="full test run")
@pytest.mark.parametrize(("way", "world"), [("bf16", 2), ("shard-bf16", 2), ("shard-bf16", 4)])
def test_half_precision_on_ranks_is_near(out: Path, way: str, world: int) -> None:
    """Near that of one process in the same precision, which is away from float32."""
    got, want, exact = of(out, way, world), of(out, "bf16", 1), of(out, "retrieval", 1)
    np.testing.assert_allclose(got["loss"][:, 0], want["loss"][:, 0], rtol=0.05)
    assert not np.array_equal(want["loss"], exact["loss"])


@pytest.mark.parametrize("how", driver.LOST)
def test_a_lost_rank_is_an_error_in_time(out: Path, how: str) -> None:
    """P9: SIGKILL and SIGSTOP between two steps, or while the others wait for the first rank's
    work; the other rank says so within timeout + 10 s."""
    lost = 0 if how == "stop-alone" else 1
    told = json.loads((out / f"{how}.json").read_text())
    print(how, told)
    assert (
        "Another rank did not answer" in told["error"] and f"rank {1 - lost} of 2" in told["error"]
    )
    worked = driver.TIMEOUT + 0.5 if how == "stop-alone" else 0.0  # which is no reason to stop
    assert worked <= told["seconds"] < worked + driver.TIMEOUT + 10
    codes = json.loads((out / f"{how}-codes.json").read_text())
    assert codes == ([-9, 3] if lost == 0 else [3, -9])


def test_the_balanced_step_is_the_papers_formula(
    out: Path, skewed: Store, tiny_model: Path
) -> None:
    """Own hard negatives only, and 0.8 of CoSENT; at every width, in plain torch."""
    config = Train(**{**driver.BASE, "parts": driver.BALANCED})
    steps = Steps(skewed, config, Ranks(), layout="padded")
    (batch,) = steps.stream(0, 1, threads=1, device=torch.device("cpu"))
    encoder = Encoder.from_pretrained(tiny_model).eval()
    total = 0.0
    for part in (batch, *batch.others):
        e = torch.cat([m.embed(encoder) for m in part.micro]).detach().double()
        for dim in encoder.dims:
            x = torch.nn.functional.normalize(e[:, :dim], dim=1)
            pair = (x[part.query] * x[part.positive]).sum(1)
            if part.filled.kind == "sts":
                gold = part.sides.score.double()
                terms = [
                    torch.exp(20 * (pair[j] - pair[i]))
                    for i in range(17) for j in range(17) if gold[i] > gold[j]
                ]  # fmt: skip
                total += 0.8 * float(torch.log1p(torch.stack(terms).sum()))
                continue
            assert part.hard.shape == (12, 3)
            keep = part.sides.hard_mask
            keep = keep & (part.sides.hard_key != part.sides.positive_key[:, None])
            own = (x[part.query][:, None] * x[part.hard]).sum(2)
            bottom = torch.exp(pair / 0.05) + (torch.exp(own / 0.05) * keep).sum(1)
            total += float((bottom.log() - pair / 0.05).mean())
    assert of(out, "balanced", 1)["loss"][0][0] == pytest.approx(total, rel=1e-5)


def test_where_a_model_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU where there is one, on that of its rank under a launcher, or as the recipe says."""
    cpu, second = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device(cpu) == cpu
    with pytest.raises(UsageError, match="finds no GPU"):
        training_device(cpu, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_device(cpu) == training_device(cpu, "cuda") == torch.device("cuda", 0)
    assert training_device(second) == second and training_device(second, "cpu") == cpu
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training_device(cpu) == second and training_device(cpu, "cpu") == cpu


def test_refused_before_the_first_step(skewed: Store) -> None:
    for settings, match in (
        ({"accumulate": 2, "parts": driver.BALANCED}, "parts and accumulate"),
        ({"parts": (Part(ranks=1), Part())}, "some take turns"),
        ({"parts": driver.own_ranks(1, 1), "sharding": "shard"}, "whole weights"),
        ({"sharding": "shards"}, "did you mean 'shard'"),
        ({"precision": "fp8"}, "precision"),
        ({"gather": "rign"}, "did you mean 'ring'"),
        ({"device": "gpu"}, "device"),
        ({"accumulate": 0}, "not positive"),
        ({"ema": 1.0}, "never moves"),
    ):
        with pytest.raises(UsageError, match=match):
            Train(**settings)
    with pytest.raises(UsageError, match="hard_negatives is 0"):
        Part(in_batch=False)
    ranks = Ranks()
    ranks.world = 20
    with pytest.raises(UsageError, match="fewer than 20 ranks"):
        Steps(skewed, Train(**driver.BASE), ranks)
    with pytest.raises(UsageError, match="cuts the weights among ranks"):
        spread(torch.nn.Linear(1, 1), Train(sharding="shard"), Ranks())  # type: ignore[arg-type]
