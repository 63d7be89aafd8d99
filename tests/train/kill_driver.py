"""Runs a small training, killing it on purpose again and again; prints what came of it as JSON.

    python kill_driver.py STORE MODEL OUT KILLS SEED [changing NEGATIVES | shards SOURCE]

With ``changing``, hard negatives are replaced during training and mined again beside it, from
NEGATIVES on. With ``shards``, a run begins with records: it reads those of SOURCE, removes copies
and makes its own store, of tens of shards.

Children are forked from a process that has everything imported. A child counts events (a log line,
a file or directory published) and kills itself with SIGKILL just before or just after one of them,
or while shards are written, so the kills land in shards, in steps, in checkpoints and in the
publishing of the run, and say where.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch

from embkit import _rust, container
from embkit.data import Store
from embkit.model import Encoder
from embkit.recipe import Dynamic, Model
from embkit.train import Miner, finetune
from embkit.train.log import Log

FAKE = Path(__file__).parents[1] / "fake_miner.py"
SHARDS = ("records", "clean", "store")  # what a run of ``shards`` makes before it trains

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


def arm(limit: int, after: bool, landing: int, target: Path) -> None:
    """From now on, die at the ``limit``-th event of this process."""
    seen = 0
    dying = threading.Lock()

    def shards(real: Callable[..., Any]) -> Callable[..., Any]:
        """One call writes many files: each is an event."""

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            ended = threading.Event()
            before = len(written())
            watcher = threading.Thread(target=watch, args=(before + limit - seen, ended))
            watcher.start()
            result = real(*args, **kwargs)
            ended.set()
            watcher.join()
            seen += len(written()) - before
            if seen >= limit:  # the last files came at once
                die("shard")
            return result

        def written() -> list[str]:
            return glob.glob(f"{target}/.partial-store-*/*")  # noqa: PTH207

        def watch(many: int, ended: threading.Event) -> None:
            while not ended.is_set():
                if len(written()) >= many:
                    die("shard")
                time.sleep(0.0001)

        return call

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
        dying.acquire()  # once
        os.write(landing, f"{phase}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def place(*args: Any) -> str:
        path = str(args[-1] if len(args) == 2 and str(args[1]).startswith("/") else args[0])
        if "checkpoints" in path:
            return "checkpoint"
        if "/refresh/" in path:
            return "refresh"
        if any(f"/{name}" in path or f".partial-{name}-" in path for name in SHARDS):
            return "shard"
        return "step" if path.endswith("log.jsonl") else "publish"

    Log.write = wrap(lambda *_: "step", Log.write)  # type: ignore[method-assign]
    container.save = wrap(place, container.save)
    _rust.publish_file = wrap(place, _rust.publish_file)
    _rust.publish_dir = wrap(place, _rust.publish_dir)
    _rust.write_manifest = wrap(place, _rust.write_manifest)
    _rust.tokenize = shards(_rust.tokenize)


def attempt(
    work: Callable[[Path], object], target: Path, limit: int, after: bool, log: Path
) -> int:
    """One child; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            if limit:
                arm(limit, after, handle, target)
            work(target)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def summary(out: Path) -> dict[str, Any]:
    """What must be equal: the log, every file of the model, the checkpoints and the shards."""
    files = {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.rglob("*"))
        if p.is_file() and "tensorboard" not in p.parts  # times
    }
    lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
    return {
        "files": files,
        "loss_hex": [x["loss_hex"] for x in lines],
        "changes": [[x["step"], x[k]] for x in lines for k in ("negatives", "refresh") if k in x],
    }


def main() -> None:
    store_path, model, out, kills, seed, *more = sys.argv[1:]
    torch.set_num_threads(1)
    if more and more[0] == "changing":
        words = [sys.executable, str(FAKE), store_path]
        SETTINGS.update(
            CHANGING,
            negatives=more[1],
            refresh=Miner(command=lambda m, o: [*words, str(m), str(o)]),
        )
    store, encoder = Store(store_path), Encoder.from_pretrained(model, dropout=0.1)
    if more and more[0] == "shards":
        SETTINGS["tasks"] = {"pairs": 3.0, "classes": 1.0}
        tokenizer = tiny.make_tokenizer(Path(out) / "tokenizer")
        store = Store(tiny.build(Path(more[1]), tokenizer, Path(out) / "first"))
        sizes = Model(hidden=32, layers=2, heads=2, intermediate=64, dims=(32, 16, 8), dropout=0.1)
        encoder = Encoder.from_config(sizes, store.path / "tokenizer")

    def work(target: Path) -> None:
        data = store
        if more and more[0] == "shards":
            data = Store(tiny.build(Path(more[1]), tokenizer, target))
        finetune(encoder, data, out=target / "run", **SETTINGS)

    folder, random_ = Path(out), random.Random(int(seed))
    # The first AdamW imports a good part of torch: do it once, before the forks.
    finetune(encoder, store, out=folder / "warm/run", **{**SETTINGS, "steps": 1})
    landing = folder / "landings"
    landing.touch()
    statuses = Counter[str]()
    rounds = []
    while statuses["killed"] < int(kills):
        target = folder / f"round-{len(rounds)}"
        for i in range(200):
            limit = random_.randint(1, 26) if statuses["killed"] < int(kills) else 0
            status = attempt(work, target, limit, random_.random() < 0.5, landing)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            statuses["killed" if killed else f"exit {os.waitstatus_to_exitcode(status)}"] += 1
            if status == 0 or (not killed and status) or i == 199:
                break
        rounds.append(target)
    attempt(work, folder / "whole", 0, False, landing)
    print(
        json.dumps(
            {
                "statuses": statuses,
                "landings": Counter(landing.read_text().split()),
                "whole": summary(folder / "whole"),
                "rounds": [summary(r) for r in rounds],
                "left": [p.name for p in folder.rglob(".*")],
            }
        )
    )


if __name__ == "__main__":
    main()
