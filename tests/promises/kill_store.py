"""Kill the making of a store again and again at aimed moments; print where the kills fell.

    python kill_store.py SOURCE TOKENIZER OUT KILLS SEED

OUT/want is made undisturbed. Then OUT/0, OUT/1 ...: records, deduplication and tokens in tens of
shards, each run killed up to KILLS_PER_RUN times and left to finish. After each kill everything
that has its final name is compared with OUT/want, and everything with a checksum is verified; at
the end the directories are equal, byte for byte. An event is a call into the Rust half (half of the
kills), or one more file in the directory of the work.
"""

from __future__ import annotations

import glob
import json
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from killing import Counter, attempt

KILLS_PER_RUN = 8
STAGES = ("records", "clean", "store")
WATCHED = ("near_duplicates", "publish_dir", "publish_file", "tokenize", "write_manifest",
           "write_tensors")  # fmt: skip


def main(source: Path, tokenizer: Path, out: Path, kills: int, seed: int) -> None:
    from embkit import _rust, data  # noqa: F401

    work = partial(tiny.build, source, tokenizer)
    work(out / "want")
    want = tiny.tree(out / "want")
    counter = Counter()
    for name in WATCHED:
        setattr(_rust, name, counted(getattr(_rust, name), name, counter))
    rng = random.Random(seed)
    landed: list[str] = []
    seen = {"temporary": 0, "verified": 0}
    runs, events = 0, {"call": 30, "file": 60}
    while len(landed) < kills:
        target = out / str(runs)
        runs += 1
        assert runs <= kills, "kills do not land"
        for _ in range(min(KILLS_PER_RUN, kills - len(landed))):
            counter.set(0, "start")
            kind = rng.choice(list(events))
            due = partial(reached, counter, target, kind, rng.randrange(events[kind]))
            if not attempt(partial(work, target), due, rng, jitter=0.003):
                # Later than the last event: aim earlier from now on.
                events[kind] = max(12, events[kind] * 3 // 4)
                break
            landed.append(counter.label)
            for key, n in inspect(target, want).items():
                seen[key] += n
        assert not attempt(partial(work, target), lambda: False, rng, jitter=0)
        assert tiny.tree(target) == want, f"run {runs - 1} differs"
        assert not tiny.strays(target), tiny.strays(target)
    print(json.dumps({"runs": runs, "landed": landed, **seen}))


def counted(call: Any, name: str, counter: Counter) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        counter.add(name)
        result = call(*args, **kwargs)
        counter.add(f"after {name}")
        return result

    return run


def reached(counter: Counter, target: Path, kind: str, aim: int) -> bool:
    """Whether so many calls were made, or so many files lie where work is going on."""
    if kind == "call":
        return counter.count > aim
    # The directories come and go meanwhile, which glob does not mind and Path.glob does.
    return len(glob.glob(f"{target}/.partial-*/*")) > aim  # noqa: PTH207


def inspect(target: Path, want: dict[str, bytes]) -> dict[str, int]:
    """Check what a kill has left behind; count what was looked at."""
    from embkit import _rust

    seen = {"temporary": 0, "verified": 0}
    if not target.exists():
        return seen
    for stage in STAGES:
        if (target / stage).exists():
            found = {f"{stage}/{name}": b for name, b in tiny.tree(target / stage).items()}
            whole = {name: b for name, b in want.items() if name.startswith(f"{stage}/")}
            assert found == whole, f"{stage} was published torn"
            seen["verified"] += len(found)
    for path in target.rglob("*"):
        if path.name.endswith(".tmp"):
            seen["temporary"] += 1
        elif path.suffix == ".safetensors":
            _rust.open_tensors(path, "open")
            seen["verified"] += 1
        elif path.name == "manifest.json":
            _rust.read_manifest(path)
            seen["verified"] += 1
    return seen


if __name__ == "__main__":
    os.environ["EMBKIT_PROGRESS"] = "off"
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]),
         int(sys.argv[5]))  # fmt: skip
