"""Runs a small training, killing it on purpose again and again; prints what came of it as JSON.

    python kill_driver.py STORE MODEL OUT KILLS SEED [NEGATIVES]

With NEGATIVES to start from, hard negatives are replaced during training and mined again beside it.

Children are forked from a process that has everything imported. A child counts events (a log line,
a file or directory published) and kills itself with SIGKILL just before or just after one of them,
so the kills land in steps, in checkpoints and in the publishing of the run, and say where.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from embkit import _rust, container
from embkit.data import Store
from embkit.model import Encoder
from embkit.recipe import Dynamic
from embkit.train import Miner, finetune
from embkit.train.log import Log

FAKE = Path(__file__).parents[1] / "fake_miner.py"

SETTINGS: dict[str, Any] = {
    "steps": 24,
    "batch_size": 16,
    "lr": 2e-3,
    "hard_negatives": 2,
    "tasks": {"retrieval": 3.0, "topics": 1.0},
    "checkpoint_every": 3,
    "token_budget": 400,
    "seed": 11,
}
CHANGING: dict[str, Any] = {
    "dynamic": Dynamic(rule="conan-v2", first=0, lag=4, floor=1.01),
    "refresh_every": 8,
    "refresh_lag": 5,
}


def arm(limit: int, after: bool, landing: int) -> None:
    """From now on, die at the ``limit``-th event of this process."""
    seen = 0

    def wrap(phase: Callable[..., str], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == limit and not after:
                die(phase(*args))
            result = real(*args, **kwargs)
            if seen == limit and after:
                die(phase(*args))
            return result

        return call

    def die(phase: str) -> None:
        os.write(landing, f"{phase}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def place(*args: Any) -> str:
        path = str(args[-1] if len(args) == 2 and str(args[1]).startswith("/") else args[0])
        if "checkpoints" in path:
            return "checkpoint"
        if "/refresh/" in path:
            return "refresh"
        return "step" if path.endswith("log.jsonl") else "publish"

    Log.write = wrap(lambda *_: "step", Log.write)  # type: ignore[method-assign]
    container.save = wrap(place, container.save)
    _rust.publish_file = wrap(place, _rust.publish_file)
    _rust.publish_dir = wrap(place, _rust.publish_dir)
    _rust.write_manifest = wrap(place, _rust.write_manifest)


def attempt(out: Path, store: Store, encoder: Encoder, limit: int, after: bool, log: Path) -> int:
    """One child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            if limit:
                arm(limit, after, handle)
            finetune(encoder, store, out=out, **SETTINGS)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def summary(out: Path) -> dict[str, Any]:
    """What must be equal: the log and every file of the model, the checkpoints and the manifest."""
    files = {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != "README.md"  # its title is the directory's name
    }
    files.pop("manifest.json")  # lists README.md
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {
        "files": files,
        "loss_hex": [x["loss_hex"] for x in lines],
        "changes": [[x["step"], x[k]] for x in lines for k in ("negatives", "refresh") if k in x],
    }


def main() -> None:
    store_path, model, out, kills, seed, *given = sys.argv[1:]
    if given:
        words = [sys.executable, str(FAKE), store_path]
        SETTINGS.update(
            CHANGING,
            negatives=given[0],
            refresh=Miner(command=lambda m, o: [*words, str(m), str(o)]),
        )
    torch.set_num_threads(1)
    store, encoder = Store(store_path), Encoder.from_pretrained(model, dropout=0.1)
    folder, random_ = Path(out), random.Random(int(seed))
    # The first AdamW imports a good part of torch: do it once, before the forks.
    finetune(encoder, store, out=folder / "warm", **{**SETTINGS, "steps": 1})
    landing = folder / "landings"
    landing.touch()
    statuses = Counter[str]()
    rounds = []
    while statuses["killed"] < int(kills):
        target = folder / f"round-{len(rounds)}"
        for i in range(200):
            limit = random_.randint(1, 26) if statuses["killed"] < int(kills) else 0
            status = attempt(target, store, encoder, limit, random_.random() < 0.5, landing)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            statuses["killed" if killed else f"exit {os.waitstatus_to_exitcode(status)}"] += 1
            if status == 0 or (not killed and status) or i == 199:
                break
        rounds.append(target)
    attempt(folder / "whole", store, encoder, 0, False, landing)
    print(
        json.dumps(
            {
                "statuses": statuses,
                "landings": Counter(landing.read_text().split()),
                "whole": summary(folder / "whole"),
                "rounds": [summary(r) for r in rounds],
                "left": sorted(p.name for p in folder.iterdir()),
            }
        )
    )


if __name__ == "__main__":
    main()
