"""What a run needs to go on where it stopped: gathered into checkpoints, and put back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit import _rust
from embkit.stage import Stage, partial_dir, stage
from embkit.train import checkpoint, checks
from embkit.train.checkpoint import Checkpoint, Saver
from embkit.train.sharding import load_state, whole_state

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.batches import Steps
    from embkit.train.evaluation import Evaluation
    from embkit.train.log import Log
    from embkit.train.negatives import Negatives
    from embkit.train.optim import Optimizer
    from embkit.train.parallel import Ranks
    from embkit.train.profile import Profile


class State:
    """The checkpoints of a run.

    Args:
        folder: the run's partial directory. about: what a checkpoint must agree with to be this
            run's: ``stage_digest``, ``data_digest``, ``config``, ``dims``, ``tokenizer``.
        init_sha256: of the weights before the first step.
        rank, world: this process among those that share the run.

    Attributes:
        threads: torch's, fixed for the whole run because they decide the order of sums.
    """

    def __init__(
        self,
        folder: Path,
        about: Mapping[str, Any],
        *,
        encoder: Encoder,
        optimizer: Optimizer,
        batches: Steps,
        config: Train,
        evaluation: Evaluation,
        log: Log,
        profile: Profile,
        init_sha256: str,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder, self.about, self.config = folder, about, config
        self.encoder, self.optimizer, self.batches = encoder, optimizer, batches
        self.evaluation, self.log, self.profile = evaluation, log, profile
        self.rank, self.world = rank, world
        self.threads = torch.get_num_threads()
        self.init_sha256 = init_sha256
        self.saver = Saver(
            folder / "checkpoints", keep=config.keep_checkpoints, rank=rank, world=world,
            background=config.watch.background, patience=config.rank_timeout,
        )  # fmt: skip

    def save(self, done: int, negatives: Negatives, *, preempted: bool = False) -> Path:
        """Checkpoint the run after ``done`` steps; returns where it lies, or will lie."""
        began = time.perf_counter()
        log_bytes = self.log.sync()
        optimizer, count = self.optimizer.tensors()
        optimizer.update(negatives.tensors(done))
        path = self.saver.save(
            step=done,
            model=whole_state(self.encoder),
            optimizer=optimizer,
            own=self._generators(),
            state={
                **self.about,
                "init_sha256": self.init_sha256,
                "seed": self.config.seed,
                "cursor": self.batches.cursor(done),
                "epoch": self.batches.epochs(done),
                "optimizer_steps": count,
                **self._groups(),
                "torch_threads": self.threads,
                "torch": torch.__version__.partition("+")[0],
                "world": self.world,
                "log_bytes": log_bytes,
                **self.evaluation.state(),
                **negatives.state(done),
                **({"preempted": True} if preempted else {}),
            },
        )
        if self.rank == 0:
            negatives.prune(checkpoint.oldest(self.saver.folder))
        self.profile.checkpoint += time.perf_counter() - began
        return path

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, its model, optimizer, generators and threads put back.

        Raises:
            UsageError: it is of another run. CorruptError: none verifies.
        """
        if self.rank == 0:
            _rust.sweep_tmp(str(self.folder))  # what a killed process was writing
        found = checkpoint.load_latest(self.saver.folder, rank=self.rank)
        if found is None:
            return None
        if self.rank == 0:
            checkpoint.prune(
                self.saver.folder, found.path, self.config.keep_checkpoints,
                best=checkpoint.best_of(found.state),
            )  # fmt: skip
        state = found.state
        checks.checkpoint_fits(
            found,
            {**self.about, "cursor": self.batches.cursor(int(state["step"])), **self._groups()},
        )
        load_state(self.encoder, found.model)
        self._restore_generators(found)
        moments = {
            name: found.optimizer[name]
            for name in found.optimizer
            if not name.startswith(("rng.", "dynamic."))
        }
        self.optimizer.restore(moments, int(state["optimizer_steps"]))
        self.evaluation.restore(state)
        self.threads = int(state["torch_threads"])
        torch.set_num_threads(self.threads)
        return found

    def load_best(self) -> None:
        """Give the encoder the weights of the best checkpoint: their average where there is one."""
        best = self.evaluation.best
        if best is not None:
            found = checkpoint.load(self.saver.folder / checkpoint.name_of(best["step"]))
            average = {n[4:]: found.optimizer[n] for n in found.optimizer if n.startswith("ema.")}
            load_state(self.encoder, {**found.model, **average})
            self.encoder.begin_step(best["step"] - 1)

    def _groups(self) -> dict[str, Any]:
        groups = self.optimizer.groups()
        return {"parameter_groups": groups} if groups else {}

    def _generators(self) -> dict[str, torch.Tensor]:
        """States of the random generators of this rank, which dropout draws from."""
        end = f".{self.rank}" if self.world > 1 else ""
        found = {f"rng.torch{end}": torch.get_rng_state()}
        if self.encoder.device.type == "cuda":
            found[f"rng.cuda{end}"] = torch.cuda.get_rng_state(self.encoder.device)
        return found

    def _restore_generators(self, found: Checkpoint) -> None:
        """Of the same rank; a run with another number of ranks draws other dropout anyway."""
        if int(found.state["world"]) != self.world:
            torch.manual_seed(self.config.seed + int(found.state["step"]) * self.world + self.rank)
            return
        end = f".{self.rank}" if self.world > 1 else ""
        torch.set_rng_state(found.optimizer[f"rng.torch{end}"])
        if f"rng.cuda{end}" in found.optimizer and self.encoder.device.type == "cuda":
            torch.cuda.set_rng_state(found.optimizer[f"rng.cuda{end}"], self.encoder.device)


@contextmanager
def stage_of(ranks: Ranks, out: Path | str, **options: Any) -> Iterator[Stage]:
    """As :func:`embkit.stage.stage`; the first rank holds it, the others work in its directory."""
    with ExitStack() as stack:
        held: list[Stage] = []

        def enter() -> dict[str, Any]:
            held.append(stack.enter_context(stage(out, **options)))
            return {"done": held[0].done, "digest": held[0].digest, "record": held[0].record}

        told = ranks.once(enter)
        if held:
            work = held[0]
        else:
            work = Stage(Path(out), told["record"]["format"], told["digest"], told["record"])
            work.done = told["done"]
            work.dir = work.out if work.done else partial_dir(work.out, work.digest)
        yield work
