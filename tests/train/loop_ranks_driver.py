"""Whole runs on ranks: `python loop_ranks_driver.py STORE MODEL OUT DEV`; prints nothing.

Ranks are forked from a process that has everything imported. Runs, each with its own OUT/NAME:
"one" in one process; "two", "shard" on two ranks; "stopped-2" on two ranks, preempted after step 4
by a SIGTERM to the second rank; "again-2", the same directory on two ranks; and "elastic", stopped
on two ranks and finished by one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ranks_driver
import torch

from embkit.data import Store
from embkit.errors import Preempted
from embkit.model import Encoder
from embkit.recipe import Train, Watch
from embkit.train import Callback, loop

SETTINGS: dict[str, Any] = {
    "steps": 10, "batch_size": 14, "token_budget": 60, "temperature": 0.05, "lr": 1e-3,
    "warmup_ratio": 0.0, "checkpoint_every": 3, "tasks": {"retrieval": 3.0, "sts": 1.0},
}  # fmt: skip


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
        trained, profile = loop.train(
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

    codes = fork(2, on_two)
    assert codes == [0, 0], codes
    told["elastic"] = run(store, model, out / "elastic")
    (out / "told.json").write_text(json.dumps(told))


def fork(world: int, work: Callable[[int], None]) -> list[int]:
    return ranks_driver.fork(world, work)


if __name__ == "__main__":
    main()
