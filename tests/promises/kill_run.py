"""Kill whole runs again and again at aimed moments; print where the kills fell.

    python kill_run.py OUT RECIPE KILLS SEED

Runs go to OUT/0, OUT/1 ...: each is killed at up to KILLS_PER_RUN events in the order they come,
and then left to finish. A program of its own: it imports everything once, steps an optimizer once
(the first AdamW imports much more) and forks a child per attempt, so that a kill costs no start-up.
A kill is aimed at an event, a stage header or a line of a training log, plus up to 0.1 s.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

KILLS_PER_RUN = 8


def main(out: Path, recipe: str, kills: int, seed: int) -> None:
    import torch

    torch.set_num_threads(1)
    weight = torch.zeros(2, requires_grad=True)
    weight.sum().backward()
    torch.optim.AdamW([weight]).step()
    import embkit.data
    import embkit.evaluate
    import embkit.mine
    import embkit.report
    import embkit.soup
    import embkit.train  # noqa: F401
    from embkit.pipeline import STAGES, run

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


def attempt(
    work: Callable[[], object], out: Path, aim: tuple[str, str, int] | None, rng: random.Random
) -> str:
    """Fork a child that works; return the stage it was killed in, or "done"."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.dup2(write, 1)
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001
            print(f"child: {error!r}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(write)
    where = watch(child, read, out, aim, rng)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "an attempt failed"
        return "done"
    return where


def watch(
    child: int, pipe: int, out: Path, aim: tuple[str, str, int] | None, rng: random.Random
) -> str:
    """Follow the child; at the aimed event wait a little and kill it. Return where it was."""
    os.set_blocking(pipe, False)
    stage, text = "start", ""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            chunk = os.read(pipe, 65536)
            if not chunk:
                return "done"
            text += chunk.decode()
        except BlockingIOError:
            pass
        headers = [line for line in text.splitlines() if line.startswith("[")]
        if headers:
            stage = headers[-1].split("] ")[1].split(":")[0]
        if aim is not None and (
            aim[:2] == ("stage", stage)
            or (aim[0] == "step" and max(log_lines(out, aim[1]), default=0) >= aim[2])
        ):
            time.sleep(rng.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            return stage
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child hangs")


def log_lines(out: Path, folder: str) -> list[int]:
    """Lines of the training logs that are being written for a stage."""
    return [path.read_bytes().count(b"\n") for path in out.glob(f".partial-{folder}-*/log.jsonl")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
