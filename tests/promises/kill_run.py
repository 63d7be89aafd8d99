"""Kill whole runs again and again at aimed moments; print where the kills fell.

    python kill_run.py OUT RECIPE KILLS SEED

Runs go to OUT/0, OUT/1 ...: each is killed at up to KILLS_PER_RUN events in the order they come,
and then left to finish. A program of its own: it does one run itself, in OUT/warm, and forks a
child per attempt, so that a kill costs no start-up, which takes several times as long as a run.
A kill is aimed at an event, a stage header or a line of a training log, plus up to 0.1 s.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import killing

KILLS_PER_RUN = 8


def main(out: Path, recipe: str, kills: int, seed: int) -> None:
    out.mkdir(parents=True)
    import torch

    torch.set_num_threads(1)
    from embkit.pipeline import STAGES, run

    with (out / "screen.txt").open("w") as screen, redirect_stdout(screen):
        run(recipe, out=out / "warm")
    rng = random.Random(seed)
    events = [("stage", name, 0) for name in STAGES]
    for stage, folder in (("prefinetune", "pre"), ("finetune", "ft-0"), ("finetune", "ft-2")):
        at = events.index(("stage", stage, 0)) + 1
        events[at:at] = [("step", folder, step) for step in (2, 5, 8)]
    landed: list[str] = []
    runs = 0
    while len(landed) < kills:
        target = out / str(runs)
        runs += 1
        assert runs <= kills, "kills do not land"
        work = partial(run, recipe, out=target)
        wanted = min(KILLS_PER_RUN, kills - len(landed), len(events))
        for i in sorted(rng.sample(range(len(events)), wanted)):
            where = attempt(work, target, events[i], rng)
            if where == "done":
                break
            landed.append(where)
        assert attempt(work, target, None, rng) == "done"
    print(json.dumps({"runs": runs, "landed": landed}))


class Aim:
    """Follows a run by what it prints and logs, and says when its event has come."""

    def __init__(self, out: Path, event: tuple[str, str, int] | None) -> None:
        self.out, self.event = out, event
        self.stage, self.text = "start", ""
        self.pipe, self.write = os.pipe()
        os.set_blocking(self.pipe, False)

    def due(self) -> bool:
        with suppress(BlockingIOError):
            self.text += os.read(self.pipe, 65536).decode()
        headers = [line for line in self.text.splitlines() if line.startswith("[")]
        if headers:
            self.stage = headers[-1].split("] ")[1].split(":")[0]
        return self.event is not None and (
            self.event[:2] == ("stage", self.stage)
            or (
                self.event[0] == "step"
                and max(log_lines(self.out, self.event[1]), default=0) >= self.event[2]
            )
        )

    def close(self) -> None:
        os.close(self.pipe)
        os.close(self.write)


def attempt(
    work: Callable[[], object], out: Path, event: tuple[str, str, int] | None, rng: random.Random
) -> str:
    """Run in a child, killed at the event; return the stage it was killed in, or "done"."""
    aim = Aim(out, event)
    killed = killing.attempt(work, aim.due, rng, jitter=0.1, output=aim.write)
    aim.close()
    return aim.stage if killed else "done"


def log_lines(out: Path, folder: str) -> list[int]:
    """Lines of the training logs that are being written for a stage."""
    return [path.read_bytes().count(b"\n") for path in out.glob(f".partial-{folder}-*/log.jsonl")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
