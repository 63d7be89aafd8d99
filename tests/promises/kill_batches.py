"""Kill a reader of batches again and again; print where the kills fell and what the ledger says.

    python kill_batches.py STORE OUT KILLS SEED

The reader streams two epochs of packed batches with hard negatives and writes one ledger line a
step: the step, the examples, and a checksum of every array. Each attempt cuts a torn last line off
and goes on at the step after the last whole one, with one data thread or two. At the end the ledger
is that of a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from killing import Counter, attempt

KILLS_PER_RUN = 10
SETTINGS = {"batch_size": 6, "hard_negatives": 1, "token_budget": 80, "layout": "packed"}


def main(folder: Path, out: Path, kills: int, seed: int) -> None:
    from embkit.data import Batches

    batches = Batches(folder, seed=7, exhausted="drop", epochs=2, no_duplicates=True, **SETTINGS)
    steps = batches.plan.steps
    assert steps is not None
    counter = Counter()
    read(folder, out / "want", 1, counter)
    want = (out / "want").read_bytes()
    rng = random.Random(seed)
    landed: list[int] = []
    runs = torn = 0
    while len(landed) < kills:
        ledger = out / str(runs)
        runs += 1
        for _ in range(min(KILLS_PER_RUN, kills - len(landed))):
            done = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
            counter.set(done, "start")
            aim = done + rng.randrange(1, max(2, steps // KILLS_PER_RUN * 2))
            work = partial(read, folder, ledger, rng.choice((1, 2)), counter)
            if not attempt(work, lambda aim=aim: counter.count >= aim, rng, jitter=0.003):
                break
            landed.append(ledger.read_bytes().count(b"\n") if ledger.exists() else 0)
            torn += ledger.exists() and not ledger.read_bytes().endswith(b"\n")
        assert not attempt(partial(read, folder, ledger, 2, counter), lambda: False, rng, jitter=0)
        assert ledger.read_bytes() == want, f"run {runs - 1} read something else"
    entries = [json.loads(line) for line in want.decode().splitlines()]
    print(json.dumps({"landed": landed, "torn": torn, "steps": steps, "entries": entries,
                      "examples": batches.examples}))  # fmt: skip


def read(folder: Path, ledger: Path, threads: int, counter: Counter) -> None:
    """Go on with a ledger to its end."""
    from embkit import _rust
    from embkit.data import Batches

    batches = Batches(folder, seed=7, exhausted="drop", epochs=2, no_duplicates=True, **SETTINGS)
    whole = ledger.read_bytes() if ledger.exists() else b""
    whole = whole[: whole.rfind(b"\n") + 1]
    with ledger.open("wb") as file:
        file.write(whole)
        file.flush()
        start, stop = whole.count(b"\n"), batches.plan.steps
        for batch in batches.stream(start, stop, threads=threads):
            arrays = b"".join(batch[name].tobytes() for name in sorted(batch.fields))
            entry = {
                "step": batch.step,
                "task": batch.task,
                "epoch": batch.epoch,
                "examples": batch.examples.tolist(),
                "digest": _rust.blake3(arrays),
            }
            line = json.dumps(entry).encode() + b"\n"
            half = len(line) // 2
            os.write(file.fileno(), line[:half])  # so that kills can tear a line
            counter.add("line")
            os.write(file.fileno(), line[half:])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
