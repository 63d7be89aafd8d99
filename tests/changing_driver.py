"""Runs whose hard negatives change, on ranks: `python changing_driver.py STORE MODEL RANKED OUT`.

Ranks are forked from a process that has everything imported. Each run has its own OUT/NAME; what a
rank scored and was told is in OUT/told-WORLD-RANK.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import ranks_driver
import torch

from embkit.data import Store
from embkit.errors import Preempted
from embkit.model import Encoder
from embkit.recipe import Dynamic, Part, Train
from embkit.train import Miner, finetune, loop, refresh

FAKE = Path(__file__).with_name("fake_miner.py")
FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
KILLS = 12
LATE = 7.0  # seconds of a miner, of ranks whose timeout is less
CHANGING: dict[str, Any] = {
    "steps": 12, "batch_size": 14, "token_budget": 400, "temperature": 0.05, "lr": 1e-3,
    "warmup_ratio": 0.0, "hard_negatives": 2, "tasks": {"retrieval": 3.0, "topics": 1.0},
    "schedule": "constant", "checkpoint_every": 5, "refresh_every": 5, "refresh_lag": 4,
    "dynamic": Dynamic(rule="conan-v2", first=0, lag=3, ratio=1.01, ceiling=1.0, floor=0.9),
}  # fmt: skip
PARTS = (
    Part(tasks={"retrieval": 1.0}, batch_size=12, hard_negatives=3, in_batch=False),
    Part(tasks={"sts": 1.0}, batch_size=9, weight=0.8),
)
BALANCED = {"parts": PARTS, "tasks": {}, "hard_negatives": 0}
APART = {**BALANCED, "parts": tuple(dataclasses.replace(part, ranks=1) for part in PARTS)}


class Runs:
    """The runs of one process.

    Args:
        rank: of this process. told: what :meth:`run` returned, by name of the run.
    """

    def __init__(self, rank: int = 0) -> None:
        self.store, self.model = Store(sys.argv[1]), Path(sys.argv[2])
        self.ranked, self.out = Path(sys.argv[3]), Path(sys.argv[4])
        self.rank = rank
        self.told: dict[str, Any] = {}

    def run(
        self,
        name: str,
        *,
        by: str = "step",
        late: float = 0.0,
        stop: int = 0,
        stop_waiting: int = 0,
        dropout: float = 0.0,
        **more: Any,
    ) -> None:
        """A run, or its end.

        Args:
            by, late: of the miner. stop: step during which this process gets SIGTERM. stop_waiting:
                number of the table that it gets SIGTERM before. **more: other settings.
        """
        step, wait = loop.Step.run, refresh.Refresh.wait

        def stopped(self: Any, batch: Any, clock: Any) -> Any:
            if stop and batch.step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, batch, clock)

        def stopped_waiting(self: Any, number: int, idle: Any) -> float:
            if number == stop_waiting:
                os.kill(os.getpid(), signal.SIGTERM)
            return wait(self, number, idle)

        began = time.perf_counter()
        loop.Step.run = stopped  # type: ignore[method-assign]
        refresh.Refresh.wait = stopped_waiting  # type: ignore[method-assign]
        words = [sys.executable, str(FAKE), str(self.store.path)]
        miner = Miner(command=lambda m, o: [*words, str(m), str(o), str(late), by])
        try:
            trained = finetune(
                Encoder.from_pretrained(self.model, dropout=dropout), self.store,
                negatives=self.ranked, refresh=miner, out=self.out / name,
                config=Train(**{**CHANGING, **more}),
            )  # fmt: skip
            self.told[name] = {"digest": trained.digest()}
        except Preempted as error:
            self.told[name] = {"preempted": str(error)}
        finally:
            loop.Step.run, refresh.Refresh.wait = step, wait  # type: ignore[method-assign]
            if self.rank == 0:
                print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)

    def tell(self, world: int) -> None:
        (self.out / f"told-{world}-{self.rank}.json").write_text(json.dumps(self.told))


def two(rank: int) -> None:
    runs = Runs(rank)
    ranks_driver.meet(runs.out, "meet-2", rank, 2)
    runs.run("two")
    runs.run("apart", **APART)
    runs.run("whole", by="weights", dropout=0.1)
    # The second rank is told to stop while the first one's miner is awaited.
    runs.run("again", by="weights", dropout=0.1, late=0.5, stop_waiting=rank)
    runs.told["preempted"] = runs.told["again"]
    runs.run("again", by="weights", dropout=0.1)
    runs.run("elastic", stop=0 if rank else 7)
    if FULL:
        runs.run("shard", sharding="shard")
        runs.run("turns", **BALANCED)
        runs.run("back")
    runs.tell(2)


def four(rank: int) -> None:
    runs = Runs(rank)
    ranks_driver.meet(runs.out, "meet-4", rank, 4)
    runs.run("four")
    runs.tell(4)


def late(rank: int) -> None:
    """The ranks wait for a miner for longer than for each other."""
    runs = Runs(rank)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=os.environ["TEST_PORT"],
    )  # fmt: skip
    runs.run("late", late=LATE, rank_timeout=LATE - 2)
    runs.tell(20)


def killed(runs: Runs) -> None:
    """One run on two ranks, one of which dies at an event again and again, until it is done."""
    sys.path.insert(0, str(Path(__file__).with_name("train")))
    from kill_driver import arm

    random_, landing = random.Random(3), runs.out / "landings"
    landing.touch()
    codes: list[list[int]] = []
    for i in range(4 * KILLS):
        limit, after, victim = random_.randint(2, 20), random_.random() < 0.5, i % 2
        target = f"killed-{codes.count([0, 0])}"

        def work(rank: int) -> None:
            ranks_driver.meet(runs.out, f"meet-{i}", rank, 2)  # noqa: B023
            if rank == victim and len(landing.read_text().split()) < KILLS:  # noqa: B023
                handle = os.open(landing, os.O_WRONLY | os.O_APPEND)
                arm(limit, after, handle, runs.out)  # noqa: B023
            Runs(rank).run(target, by="weights", dropout=0.1, rank_timeout=5.0)  # noqa: B023

        codes.append(ranks_driver.fork(2, work))
        landed = landing.read_text().split()
        if codes[-1] == [0, 0] and len(landed) >= KILLS:
            break
    runs.told["killed"] = {"codes": codes, "landed": landed}


def main() -> None:
    torch.set_num_threads(1)
    runs = Runs()
    runs.run("one")
    runs.run("parts", **BALANCED)
    if FULL:
        runs.run("back", stop=10)
    for world, work in ((2, two), (4, four)):
        codes = ranks_driver.fork(world, work)
        assert codes == [0] * world, (world, codes)
    runs.run("elastic")
    if FULL:
        os.environ["TEST_PORT"] = str(ranks_driver.free_port())
        assert ranks_driver.fork(2, late) == [0, 0]
        killed(runs)
    runs.tell(1)


if __name__ == "__main__":
    main()
