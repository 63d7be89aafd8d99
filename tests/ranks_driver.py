"""Trains a few steps on 1, 2 and 4 gloo ranks; writes losses and gradients of each way.

    python ranks_driver.py STORE MODEL OUT

Ranks are forked from a process that has everything imported: one start-up for all of them. What a
rank saw is in OUT/<way>-<world>-<rank>.npz; the ranks that stop or die are in OUT/<way>.json.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from embkit.data import Store
from embkit.errors import EmbkitError
from embkit.model import Encoder
from embkit.recipe import Loss, Part, Train
from embkit.train.batches import Steps
from embkit.train.optim import Optimizer
from embkit.train.parallel import Ranks, open_ranks
from embkit.train.profile import Clock, Profile
from embkit.train.sharding import load_state, spread, whole, whole_state
from embkit.train.step import Step
from embkit.train.teachers import learn

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
TIMEOUT = 4.0
BASE: dict[str, Any] = {
    "steps": 3,
    "batch_size": 14,  # no multiple of 4
    "token_budget": 60,
    "hard_negatives": 2,
    "temperature": 0.05,
    "lr": 1e-3,
    "warmup_ratio": 0.0,
    "log_every": 2,
}
BALANCED = (
    Part(tasks={"retrieval": 1.0}, batch_size=12, hard_negatives=3, in_batch=False),
    Part(tasks={"sts": 1.0}, batch_size=17, weight=0.8),
)


def own_ranks(*counts: int) -> tuple[Part, ...]:
    return tuple(dataclasses.replace(p, ranks=n) for p, n in zip(BALANCED, counts, strict=True))


RETRIEVAL: dict[str, Any] = {"tasks": {"retrieval": 1.0}}
SHARD: dict[str, Any] = {**RETRIEVAL, "sharding": "shard"}
EMA: dict[str, Any] = {"hard_negatives": 0, "ema": 0.5}
LEARNED: dict[str, Any] = {"loss": Loss(form="gecko", learn_temperature=True)}
# By name of the way: settings, the numbers of ranks it is run on, and those of a full test run.
EVERY: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "retrieval": (RETRIEVAL, (1, 2, 4), ()),
    "mixed": (EMA, (1, 2), (4,)),
    "ring": ({**RETRIEVAL, "gather": "ring"}, (2,), (4,)),
    "terms": ({**RETRIEVAL, "loss": Loss(form="qwen3", hard="shared")}, (1, 2), (4,)),
    "gecko": ({**RETRIEVAL, "loss": Loss(form="gecko")}, (1,), ()),
    "gecko-ring": ({**RETRIEVAL, "loss": Loss(form="gecko"), "gather": "ring"}, (2,), (4,)),
    "nothing-kept": ({**RETRIEVAL, "graph_memory": 0.0}, (2,), ()),
    "learned": ({**LEARNED, "parts": BALANCED}, (1,), (2,)),
    "learned-apart": ({**LEARNED, "parts": own_ranks(1, 1)}, (2,), ()),
    "accumulate": ({"accumulate": 2}, (1, 2), ()),
    "accumulate-ring": ({"accumulate": 2, "gather": "ring"}, (), (2, 4)),
    "balanced": ({"parts": BALANCED}, (1, 2), (4,)),
    "balanced-apart-2": ({"parts": own_ranks(1, 1)}, (), (2,)),
    "balanced-apart-4": ({"parts": own_ranks(3, 1)}, (4,), (1,)),
    # Whole runs with shards are in every test run: test_loop_ranks.py.
    "shard": (SHARD, (), (2, 4)),
    "shard-ring": ({**SHARD, "gather": "ring"}, (), (2, 4)),
    "shard-offload": ({"sharding": "shard", "cpu_offload": True, **EMA}, (), (2,)),
    "shard-bf16": ({**SHARD, "precision": "bf16"}, (), (2, 4)),
    "bf16": ({**RETRIEVAL, "precision": "bf16"}, (), (1, 2)),
    "hybrid": ({**SHARD, "sharding": "hybrid", "shard_ranks": 2}, (), (4,)),
}
WAYS = {
    way: (settings, worlds + more if FULL else worlds)
    for way, (settings, worlds, more) in EVERY.items()
}
LOST = ("kill", "stop", "stop-alone")
MOVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "batch_isend_irecv")


def train(store: Store, model: Path, settings: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Losses of all steps, gradients of the first, weights and optimizer state after the last."""
    encoder = Encoder.from_pretrained(model).train()
    config = Train(**{**BASE, **settings})
    learn(encoder, config)
    steps = Steps(store, config, ranks, layout="padded", pad_id=encoder.tokenizer.pad_id)
    weights = spread(encoder, config, ranks)
    optimizer = Optimizer(encoder, config)
    found: dict[str, Any] = {}
    update = optimizer.step

    def watched(rate: float) -> float:
        if "loss" not in found:
            for name, parameter in optimizer.named:
                if parameter.grad is not None:
                    found[f"grad.{name}"] = whole(parameter.grad).clone()
        return update(rate)

    optimizer.step = watched  # type: ignore[method-assign]
    moves = dict.fromkeys(MOVES, 0)
    real = {name: getattr(dist, name) for name in MOVES}
    for name in MOVES:
        setattr(dist, name, counted(moves, name, real[name]))
    step = Step(encoder, config, optimizer, ranks=ranks, weights=weights, parts=steps.count)
    for batch in steps.stream(0, config.steps, threads=1, device=torch.device("cpu")):
        done = step.run(batch, Clock(Profile()))
        found.setdefault("loss", []).append([done.loss, *done.per_dim])
        # Of the first step, which has no statistics: those move passages once more.
        found.setdefault("moves", [moves[name] for name in MOVES])
        if done.statistics is not None:
            found.setdefault("statistics", []).append(done.statistics.numpy())
        found.setdefault("counts", []).append([done.tokens, done.rows])
        found.setdefault("examples", []).append(
            sorted(int(e) for part in (batch, *batch.others) for e in part.filled.examples)
        )
    for name in MOVES:
        setattr(dist, name, real[name])
    state = whole_state(encoder)
    tensors, count = optimizer.tensors()
    # What was saved loads again, here too.
    load_state(encoder, state)
    optimizer.restore(tensors, count)
    again = {**whole_state(encoder), **optimizer.tensors()[0]}
    assert all(torch.equal(again[k], v) for k, v in {**state, **tensors}.items())
    found["examples"] = np.array(
        [row + [-1] * (64 - len(row)) for row in found["examples"]], np.int64
    )
    return {**found, **{f"weight.{k}": v for k, v in state.items()}}


def counted(moves: dict[str, int], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def move(*args: Any, **options: Any) -> Any:
        moves[name] += 1
        return real(*args, **options)

    return move


def fork(worlds: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of ranks that do ``work``; -9 for one that had to be killed."""
    return ended(start(worlds, work))


def start(worlds: int, work: Callable[[int], None]) -> list[int]:
    """Process ids of ranks that do ``work``."""
    children = []
    for rank in range(worlds):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work(rank)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    return children


def ended(children: list[int], *, limit: float = 120.0) -> list[int]:
    """Exit codes, within so many seconds: one that is stopped would never end by itself."""
    until, codes = time.monotonic() + limit, {}
    while len(codes) < len(children):
        for pid in children:
            if pid in codes:
                continue
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                until += 10
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in children]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def meet(out: Path, name: str, rank: int, world: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/{name}", rank=rank, world_size=world,
        timeout=timedelta(seconds=30),
    )  # fmt: skip


def check_alone(ranks: Ranks) -> None:
    """The first rank works while the others wait; its error is theirs."""
    assert ranks.alone(lambda: ranks.rank) == (0 if ranks.first else None)
    try:
        ranks.alone(lambda: 1 // 0)
        raise AssertionError("no error")
    except (ZeroDivisionError, EmbkitError) as error:
        assert ranks.first == isinstance(error, ZeroDivisionError), error
        assert ranks.first or "The first rank stopped: ZeroDivisionError" in str(error)


def all_ways(store: Store, model: Path, out: Path, world: int) -> Callable[[int], None]:
    def work(rank: int) -> None:
        if world > 1:
            meet(out, f"meet-{world}", rank, world)
        with open_ranks(torch.device("cpu"), timeout=30) as ranks:
            assert (ranks.rank, ranks.world) == (rank, world)
            assert ranks.once(lambda: {"by": ranks.rank}) == {"by": 0}
            assert ranks.any(rank == world - 1) and not ranks.any(False)
            check_alone(ranks)
            for name, (settings, worlds) in WAYS.items():
                if world in worlds:
                    began = time.perf_counter()
                    found = train(store, model, settings, ranks)
                    if rank == 0:
                        print(f"{name} {world}: {time.perf_counter() - began:.2f} s", flush=True)
                    np.savez(out / f"{name}-{world}-{rank}.npz", **found)

    return work


def stop(pids: Path, how: signal.Signals = signal.SIGSTOP) -> None:
    """This process, which writes its id first."""
    pids.write_text(str(os.getpid()))
    os.kill(os.getpid(), how)


def lost(store: Store, model: Path, out: Path, how: str) -> list[int]:
    """Two ranks as a launcher starts them; the second is lost at its third forward, or the first
    in work that it does alone, after longer than the timeout ("stop-alone"). Their ids."""
    pids = out / f"{how}-pid"

    def work(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        encoder = Encoder.from_pretrained(model).train()
        config = Train(**{**BASE, "tasks": {"retrieval": 1.0}})
        began = time.perf_counter()
        try:
            with open_ranks(torch.device("cpu"), timeout=TIMEOUT) as ranks:
                steps = Steps(store, config, ranks, layout="padded")
                step = Step(encoder, config, Optimizer(encoder, config), ranks=ranks)
                if how == "stop-alone":
                    ranks.alone(lambda: (time.sleep(TIMEOUT + 0.5), stop(pids)))
                for batch in steps.stream(0, 3, threads=1, device=torch.device("cpu")):
                    began = time.perf_counter()
                    if rank == 1 and batch.step == 2:
                        stop(pids, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                    step.run(batch, Clock(Profile()))
        except EmbkitError as error:
            seconds = time.perf_counter() - began
            told = {"error": str(error), "seconds": seconds}
            (out / f"{how}.json").write_text(json.dumps(told))
            if how.startswith("stop"):
                os.kill(int(pids.read_text()), signal.SIGKILL)
            os._exit(3)

    port = free_port()
    return start(2, work)


def main() -> None:
    store, model, out = Store(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # What imports much of torch goes before the forks.
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for name in ("torch.distributed.fsdp", "torch.distributed.tensor") if FULL else ():
        importlib.import_module(name)
    all_ways(store, model, out, 1)(0)  # here: what it imports, the forks have
    waiting = {how: lost(store, model, out, how) for how in LOST}
    for world in (2, 4):
        codes = fork(world, all_ways(store, model, out, world))
        assert codes == [0] * world, (world, codes)
    for how, children in waiting.items():
        (out / f"{how}-codes.json").write_text(json.dumps(ended(children)))


if __name__ == "__main__":
    main()
