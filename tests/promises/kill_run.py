"""Kill a whole run again and again at aimed moments until it finishes; print where the kills fell.

    python kill_run.py OUT RECIPE KILLS SEED

Run as a program of its own: it imports everything once, steps an optimizer once (the first AdamW
imports much more) and forks a child per attempt, so that a kill costs no start-up. A kill is aimed
at an event, a stage header or a line of a training log, plus up to 0.1 s.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


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
    aims = [("stage", name) for name in STAGES]
    aims += [("step", folder) for folder in ("pre", "ft-0") for _ in range(3)]
    landed: list[str] = []
    attempts = 0
    while True:
        attempts += 1
        assert attempts < 3 * kills + 20, "the run does not get on"
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.dup2(write, 1)
            code = 1
            try:
                run(recipe, out=out)
                code = 0
            except BaseException as error:  # noqa: BLE001
                print(f"child: {error!r}", file=sys.stderr, flush=True)
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(write)
        aim = rng.choice(aims) if len(landed) < kills else None
        where = watch(child, read, out, aim, rng)
        _, status = os.waitpid(child, 0)
        os.close(read)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"attempt {attempts} failed"
            if len(landed) >= kills or where == "done":
                break
        else:
            landed.append(where)
    print(json.dumps({"attempts": attempts, "landed": landed}))


def watch(child: int, pipe: int, out: Path, aim: tuple[str, str] | None, rng: random.Random) -> str:
    """Follow the child; at the aimed event wait a little and kill it. Return where it was."""
    os.set_blocking(pipe, False)
    stage, text = "start", ""
    step = rng.randint(1, 12)
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
            aim == ("stage", stage)
            or (aim[0] == "step" and max(log_lines(out, aim[1]), default=0) >= step)
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
