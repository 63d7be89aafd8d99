"""Whole runs on ranks: `python loop_ranks_driver.py STORE MODEL OUT DEV`; prints nothing.

Ranks are forked from a process that has everything imported. Runs, each with its own OUT/NAME:
"one" in one process; "two", "shard" on two ranks; "stopped-2" on two ranks, preempted after step 4
by a SIGTERM to the second rank; "again-2", the same directory on two ranks; "elastic", stopped
on two ranks and finished by one; and "cut", whose ranks are parted in step 5 and start again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import own_network
import ranks_driver
import torch

from embkit.data import Store
from embkit.errors import EmbkitError, Preempted
from embkit.model import Encoder
from embkit.recipe import Train, Watch
from embkit.train import Callback, loop, stages

SETTINGS: dict[str, Any] = {
    "steps": 10, "batch_size": 14, "token_budget": 60, "temperature": 0.05, "lr": 1e-3,
    "warmup_ratio": 0.0, "checkpoint_every": 3, "tasks": {"retrieval": 3.0, "sts": 1.0},
    "batch_sizes": {"sts": 9},
}  # fmt: skip


CUTS = ("cut", "cut-silently") if ranks_driver.FULL else ("cut",)


class Calls(Callback):
    """What the callbacks of a rank were told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step(self, step: int, line: Any, speed: Any) -> None:
        self.steps.append(step)


def run(
    store: Store, model: Path, out: Path, *, stop: int = 0, rank: int = 0, **more: Any
) -> dict[str, Any]:
    """One rank's part of a run; with ``stop`` this rank gets SIGTERM during that step."""
    real, calls = loop.Step.run, Calls()

    def stopped(self: Any, batch: Any, clock: Any) -> Any:
        if stop and batch.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, clock)

    loop.Step.run = stopped  # type: ignore[method-assign]
    config = Train(**{**SETTINGS, **more})
    try:
        trained, profile = stages.train(
            Encoder.from_pretrained(model), store, name="prefinetune", out=out, config=config,
            callbacks=[calls],
        )  # fmt: skip
        return {"digest": trained.digest(), "steps": calls.steps, "profiled": profile.steps}
    except Preempted as error:
        return {"preempted": str(error), "steps": calls.steps}
    finally:
        loop.Step.run = real  # type: ignore[method-assign]


def main() -> None:
    store, model, out = Store(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    dev = sys.argv[4]
    torch.set_num_threads(1)
    watch = Watch(evaluate_every=5, evaluate_on=dev, best="keep", background=True)
    told = {"one": run(store, model, out / "one", watch=watch)}

    def on_two(rank: int) -> None:
        ranks_driver.meet(out, "meet", rank, 2)
        found = {
            "two": run(store, model, out / "two", watch=watch),
            "shard": run(store, model, out / "shard", sharding="shard", watch=watch),
            "stopped": run(store, model, out / "again", stop=4 if rank else 0),
            "again": run(store, model, out / "again"),
            "whole": run(store, model, out / "whole"),
            "elastic": run(store, model, out / "elastic", stop=0 if rank else 6),
        }
        (out / f"told-{rank}.json").write_text(json.dumps(found))

    reason = own_network.missing()
    waiting = {} if reason else {way: parted(store, model, out, way) for way in CUTS}
    codes = fork(2, on_two)
    assert codes == [0, 0], codes
    told["cut"] = {"missing": reason}
    for way, children in waiting.items():
        told["cut"][way] = ranks_driver.ended(children)

    def again_on_two(rank: int) -> None:
        ranks_driver.meet(out, "meet-again", rank, 2)
        for way in waiting:
            run(store, model, out / way)

    assert not waiting or fork(2, again_on_two) == [0, 0]
    told["elastic"] = run(store, model, out / "elastic")
    (out / "told.json").write_text(json.dumps(told))


def parted(store: Store, model: Path, out: Path, way: str) -> list[int]:
    """Two ranks in networks of their own, whose cable the second cuts in step 5; their ids."""

    def work(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_PORT="29400",
            MASTER_ADDR=own_network.address(0),
        )  # fmt: skip
        real, at = loop.Step.run, out / f"{way}-at"

        def cut(self: Any, batch: Any, clock: Any) -> Any:
            if rank == 1 and batch.step + 1 == 5:
                at.write_text(str(time.monotonic()))
                own_network.cut(silently=way == "cut-silently")
            return real(self, batch, clock)

        loop.Step.run = cut  # type: ignore[method-assign]
        try:
            run(store, model, out / way, rank_timeout=ranks_driver.TIMEOUT)
        except EmbkitError as error:
            seconds = time.monotonic() - float(at.read_text())
            told = {"error": str(error), "seconds": seconds}
            (out / f"{way}-{rank}.json").write_text(json.dumps(told))
            os._exit(3)

    return own_network.start(work, partial(ranks_driver.start, 2))


def fork(world: int, work: Callable[[int], None]) -> list[int]:
    return ranks_driver.fork(world, work)


if __name__ == "__main__":
    main()
