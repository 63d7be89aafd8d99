"""`embkit run` on two ranks beside one process: `python run_ranks.py OUT RECIPE`.

OUT/one by one process; OUT/two by two ranks, of which the second is killed in step 5 of the first
fine-tuning run, and then by two more; with EMBKIT_TEST_FULL=1 OUT/whole by two that nobody kills.
Ranks are forked from the process that has done the first run: they import nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import ranks_driver


def main(out: Path, recipe: str) -> None:
    import torch

    torch.set_num_threads(1)
    from embkit import pipeline

    def on_two(name: str, *, kill: bool = False) -> list[int]:
        port = ranks_driver.free_port()

        def work(rank: int) -> None:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )  # fmt: skip
            if kill and rank == 1:
                die_at(5)
            with (out / f"{name}-{rank}.txt").open("a") as screen, redirect_stdout(screen):
                found = pipeline.run(recipe, out=out / name)
            (out / f"{name}-{rank}.json").write_text(json.dumps(found))

        return ranks_driver.fork(2, work)

    with (out / "one.txt").open("w") as screen, redirect_stdout(screen):
        pipeline.run(recipe, out=out / "one")
    codes = {"killed": on_two("two", kill=True)}
    there = {p.name: p.stat().st_mtime_ns for p in (out / "two").glob("*/manifest.json")}
    codes["again"] = on_two("two")
    after = {p.name: p.stat().st_mtime_ns for p in (out / "two").glob("*/manifest.json")}
    kept = all(after[name] == at for name, at in there.items())
    if ranks_driver.FULL:
        codes["whole"] = on_two("whole")
    print(json.dumps({"codes": codes, "kept": kept}))


def die_at(step: int) -> None:
    """This process ends in that step of the stage that has hard negatives."""
    from embkit.train import loop

    real = loop.Step.run

    def dying(self: Any, batch: Any, clock: Any) -> Any:
        if self.config.hard_negatives and batch.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch, clock)

    loop.Step.run = dying  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
