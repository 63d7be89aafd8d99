"""Rows about the plan of a run: resumed, without duplicates, and for stores that grow."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, Reported, Sample
from embkit.bench.rivals import Job
from embkit.bench.store_data import made_store, passages
from embkit.bench.store_files import drop
from embkit.data import Batches


def resume_plan(quick: bool) -> Case:
    """The examples of a step in the middle of a task of 10^9."""
    steps = np.random.default_rng(0).integers(0, 10**9 // 1024, 1000).tolist()

    def ours() -> None:
        """Each from nothing, as after a restart."""
        for step in steps:
            _rust.Plan(1, [("a", 10**9, 1.0)], 1024).examples(step)

    return Case(
        name="store.resume.plan",
        unit="ms",
        work=float(len(steps)),
        measure="wall",
        ours=ours,
        goal="100 ms",
        facts={"n": 10**9, "batch": 1024},
    )


def resume(quick: bool) -> Case:
    """Open a large store in a run that was stopped, and take the batch of a step in its middle."""
    stack = ExitStack()
    rows = 90_000 if quick else 8_000_000  # what is warm must stay so: below half of the memory
    home = stack.enter_context(made_store(rows, length=256, examples=True, negatives=1))
    size = 256
    last = Batches(home, batch_size=size, hard_negatives=1).plan.batches_per_epoch(0)
    steps = iter(np.random.default_rng(0).integers(0, 3 * last, 10_000).tolist())

    def once() -> Sample:
        cpu, started = time.process_time(), time.perf_counter()
        Batches(home, batch_size=size, hard_negatives=1).batch(next(steps))
        return Sample(time.process_time() - cpu, time.perf_counter() - started, 0)

    def ours() -> Reported:
        """With the files in memory: some systems drop what was not read for a while."""
        for path in home.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(4 << 20):
                    pass
        return Reported(None, once())

    drop(home)
    cold = 1e3 * once().wall
    n = 4_000 if quick else 60_000
    made = passages(quick, n)
    job = Job({"flat": made.flat, "offsets": made.offsets}, {"batch": 32})
    peers = {"MDS": "mds", "litdata": "litdata", "HF datasets": "datasets"}
    running, skipped = job.start(peers)
    said: dict[str, Any] = {}

    def theirs(name: str) -> Reported:
        found = running[name].ask("resume")
        said[name] = {"lost": found["lost"], "repeated": found["repeated"]}
        seconds = found["seconds"]
        return Reported(None, Sample(seconds, seconds, found["peak"]))

    def close() -> None:
        job.close()
        stack.close()

    return Case(
        name="store.resume",
        unit="ms",
        work=1.0,
        measure="wall",
        ours=ours,
        rivals={name: partial(theirs, name) for name in running},
        skipped=skipped,
        goal="100 ms",
        facts={
            "n": rows,
            "batch": size,
            "peer_n": n,
            "from_disk_ms": cold,
        },
        derive=lambda _: {"rows_of_peers": json.loads(json.dumps(said))},
        rounds=3,
        close=close,
    )


def no_duplicates(quick: bool) -> Case:
    """Steps whose examples share no near-duplicate cluster, over a superblock of 64 batches."""
    stack = ExitStack()
    size, blocks = 1024, 1 if quick else 4
    rows = 2 * 64 * size * blocks
    # Three rows to a cluster, so that most examples have something to be kept from.
    home = stack.enter_context(made_store(rows, length=20, examples=True, clusters=rows // 3))
    epoch = iter(range(1 << 30))

    def steps(alone: bool) -> None:
        made = Batches(home, batch_size=size, no_duplicates=alone, seed=next(epoch))
        for step in range(64 * blocks):
            made.loader.batch(step)

    def derive(found: Any) -> dict[str, float]:
        extra = found["embkit"].cpu - found["no_duplicates=False"].cpu
        return {"extra_ns_per_row": 1e9 * extra / rows}

    return Case(
        name="store.no_duplicates",
        unit="ns/row",
        work=float(rows),
        measure="cpu",
        ours=partial(steps, True),
        rivals={"no_duplicates=False": partial(steps, False)},
        goal="100 ns a row more",
        facts={"n": rows, "batch": size, "clusters": rows // 3},
        derive=derive,
        close=stack.close,
    )


def growth(quick: bool) -> Case:
    """The same number of random batches from stores of 10^5, 10^6 and 10^7 rows."""
    stack = ExitStack()
    sizes = [10**4, 10**5] if quick else [10**5, 10**6, 10**7]
    stores = {n: stack.enter_context(made_store(n, length=100)) for n in sizes}
    opened = {n: _rust.Store(str(path)) for n, path in stores.items()}
    batch, count = 32, 300 if quick else 3_000

    def read(n: int) -> None:
        ids, mask = (np.empty(batch * 160, np.int64) for _ in range(2))
        order = _rust.permute(n, 1, 0, batch * count)
        for start in range(0, len(order), batch):
            opened[n].gather_padded(order[start : start + batch], ids, mask, 0)

    batch_rows = {n: _rust.permute(n, 1, 0, batch * count) for n in sizes}
    tokens = float(np.mean([int(opened[n].lengths(rows).sum()) for n, rows in batch_rows.items()]))
    *smaller, largest = sizes
    return Case(
        name="store.growth",
        unit="ns/token",
        work=tokens,
        measure="cpu",
        ours=partial(read, largest),
        rivals={f"{n} rows": partial(read, n) for n in smaller},
        goal="flat",
        facts={"n": largest, "batch": batch},
        close=stack.close,
    )
