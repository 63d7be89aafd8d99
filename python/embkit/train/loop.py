"""The training loop that every recipe shares, and the two stages that are made of it.

One global batch a step, of one task: forward in length-sorted micro-batches with the graph kept,
one loss over all of them, one backward, one AdamW step. Everything that decides a step is a pure
function of (configuration, step) or is in the checkpoint, so a run that is killed anywhere and
started again writes the same log and the same model, bit for bit, on the same machine.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit import _rust
from embkit.data.batches import Batches
from embkit.errors import EmbkitError, Preempted, UsageError, nearest
from embkit.progress import bar
from embkit.recipe import Train
from embkit.stage import digest_of, stage
from embkit.train import checkpoint, checks
from embkit.train.batches import Batch, allocator, stream
from embkit.train.dynamic import split
from embkit.train.log import Log, save_failed_batch
from embkit.train.negatives import Negatives
from embkit.train.optim import Optimizer
from embkit.train.profile import Clock, Profile
from embkit.train.refresh import Miner
from embkit.train.signals import StopFlag
from embkit.train.step import Done, Step

if TYPE_CHECKING:
    from embkit.model import Encoder

# Settings that change what is seen or how fast, not one bit of the model.
REFRESH = "refresh"  # folder of a run that is gone when it is published
_FREE = ("data_threads", "log_every", "checkpoint_every", "keep_checkpoints")


def prefinetune(
    encoder: Encoder,
    store: Any,
    *,
    out: Path | str,
    config: Train | None = None,
    fresh: bool = False,
    **overrides: Any,
) -> Encoder:
    """First stage: from pre-trained (or random) weights to an encoder, on in-batch negatives.

    Args:
        encoder: where to start; a copy is trained, the argument is left alone.
        store: an ``embkit.data.Store`` or its directory.
        out: the run directory: model/, checkpoints/, log.jsonl, manifest.json.
        config: settings; defaults when None.
        fresh: forget a finished or partial run in ``out``.
        **overrides: single settings by name, e.g. ``steps=500``.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        UsageError: a wrong setting, a store of another tokenizer, a task smaller than a batch.
        Preempted: SIGTERM came; a checkpoint is written and the same call resumes.
        EmbkitError: the loss is no finite number; the batch is saved.
    """
    chosen = _config(config, overrides)
    return train(encoder, store, name="prefinetune", out=out, config=chosen, fresh=fresh)[0]


def finetune(
    encoder: Encoder,
    store: Any,
    *,
    negatives: Any = None,
    refresh: Miner | None = None,
    out: Path | str,
    config: Train | None = None,
    fresh: bool = False,
    **overrides: Any,
) -> Encoder:
    """Second stage: single-task batches, with mined hard negatives.

    Args:
        negatives: what :func:`embkit.mine.mine` returned, or its directory; None uses the
            negatives in the examples, if any.
        refresh: how negatives are mined again every ``refresh_every`` steps.
        encoder, store, out, config, fresh, **overrides: as for :func:`prefinetune`; give each run
            of a soup its own ``out`` and ``seed``.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        As :func:`prefinetune`; CorruptError for negatives of another store.
    """
    chosen = _config(config, overrides)
    return train(
        encoder, store, name="finetune", out=out, config=chosen, negatives=negatives,
        refresh=refresh, fresh=fresh,
    )[0]  # fmt: skip


def train(
    encoder: Encoder,
    store: Any,
    *,
    name: str,
    out: Path | str,
    config: Train,
    negatives: Any = None,
    refresh: Miner | None = None,
    fresh: bool = False,
) -> tuple[Encoder, Profile]:
    """What both stages are: a resumable run published as one directory.

    Args:
        name: of the stage. The others: see :func:`prefinetune`.

    Returns:
        The trained encoder and where the time went (all zero when the run was there already).
    """
    from embkit.data.loader import as_store
    from embkit.model import Encoder
    from embkit.model.export import export

    store = as_store(store)
    mined = checks.negatives_dir(negatives)
    miner = checks.miner_for(config, refresh)
    params = {**_decisive(config), "init": encoder.digest()}
    if miner is not None:
        params["miner"] = dict(miner.params)
    inputs = [store.path, *([mined] if mined else [])]
    with stage(
        out, name=name, params=params, inputs=inputs, kind="embkit.run", fresh=fresh
    ) as work:
        if work.done:
            return Encoder.from_pretrained(work.out / "model"), Profile()
        checks.before_training(encoder, store)
        encoder.check_steps(config.steps)
        run = _Run(copy.deepcopy(encoder), store, mined, miner, config, work.dir, work.digest)
        run.adopt_sides()
        with deterministic(), bar(name.capitalize(), total=config.steps, unit="steps") as progress:
            run.all(progress)
        shutil.rmtree(work.dir / REFRESH, ignore_errors=True)
        run.encoder.finish()
        export(run.encoder, work.dir / "model", name=Path(out).name)
        work.publish(
            {
                "steps": config.steps,
                "tasks": [
                    {"name": name, "kind": store.task(name)["kind"], "examples": count}
                    for name, count in run.batches.examples.items()
                ],
                "skipped": run.batches.skipped,
                "init_sha256": run.init_sha256,
                "model_digest": run.encoder.digest(),
            }
        )
    return run.encoder.eval(), run.profile


class _Run:
    """One run in its partial directory."""

    def __init__(
        self,
        encoder: Encoder,
        store: Any,
        negatives: Path | None,
        miner: Miner | None,
        config: Train,
        folder: Path,
        digest: str,
    ) -> None:
        self.encoder, self.config, self.folder, self.digest = encoder, config, folder, digest
        self.store = store
        self.data_digest = digest_of(store.path)
        self.batches = Batches(
            store,
            batch_size=config.batch_size,
            seed=config.seed,
            weights=config.tasks,
            temperature=config.mixture_temperature,
            cap=config.mixture_cap,
            hard_negatives=config.hard_negatives,
            hard_rule=config.hard_rule,
            negatives=negatives,
            token_budget=config.token_budget,
            layout="padded",
            pad_id=encoder.tokenizer.pad_id,
            no_duplicates=config.no_duplicates,
            exhausted=config.exhausted,
            epochs=config.epochs,
            allocate=allocator(encoder.device),
        )
        self.plan = self.batches.plan
        if self.plan.steps is not None and config.steps > self.plan.steps:
            raise UsageError(
                f"The mixture ends after {self.plan.steps} steps, {config.steps} are asked for.",
                where="steps",
                fix=f'set steps = {self.plan.steps}, more epochs, or exhausted = "repeat"',
            )
        self.init_sha256 = checkpoint.sha256_tensors(encoder.state_dict())
        self.optimizer = Optimizer(encoder, config)
        self.step = Step(encoder, config, self.optimizer)
        self.profile = Profile()
        self.log = Log(folder / "log.jsonl")
        self.threads = torch.get_num_threads()
        self.given, self.miner = negatives, miner
        self.done = 0

    def adopt_sides(self) -> None:
        """The encoder serves with the prompts and lengths that the store was made with."""
        self.encoder.prompts = {**self.encoder.prompts, **self.store.prompts}
        self.encoder.max_length = {**self.encoder.max_length, **self.store.max_length}

    def all(self, progress: Any) -> None:
        """Every step that is still to do."""
        self.encoder.train()
        with torch.random.fork_rng(devices=[]), StopFlag() as stop, _threads(self.threads):
            torch.manual_seed(self.config.seed)
            start = self._resume()
            progress.update(start)
            steps, negatives = self.config.steps, self.negatives
            negatives.idle = lambda: self._preempt() if stop.requested else None
            ahead = stream(
                self.batches, start, steps, device=self.encoder.device,
                threads=negatives.threads(self.config.data_threads),
                before=negatives.before if negatives.on else None,
            )  # fmt: skip
            mark = time.perf_counter()
            try:
                for batch in ahead:
                    began = time.perf_counter()
                    self.profile.wait += began - mark
                    shown = self._step(batch)
                    done = self.done = batch.filled.step + 1
                    negatives.updated(done, self.encoder)
                    if stop.requested and done < steps:
                        self._preempt()
                    if done % self.config.checkpoint_every == 0 or done == steps:
                        self._save(done)
                    if done % self.config.log_every == 0 or done == steps:
                        progress.update(done, loss=shown, task=batch.filled.task)
                    mark = time.perf_counter()
            finally:
                ahead.close()  # type: ignore[attr-defined]
                negatives.close()
                self.log.close()

    def _preempt(self) -> None:
        """Stop between two steps; the same call goes on from here."""
        self._save(self.done)
        raise Preempted(
            f"SIGTERM: stopped after step {self.done} of {self.config.steps} with a checkpoint.",
            where=self.folder,
            fix="run the same command again to go on",
        )

    def _step(self, batch: Batch) -> float:
        """One step and its log line; returns the loss."""
        clock = Clock(self.profile)
        step = batch.filled.step + 1
        done = self.step.run(batch, clock)
        if not math.isfinite(done.loss):
            self._fail(batch, f"The loss of step {step} is {done.loss}.")
        if not math.isfinite(done.norm):
            self._fail(batch, f"The gradient norm of step {step} is {done.norm}.")
        more = self.negatives.after(batch, done.embeddings)
        clock.lap("negatives")
        self._write(batch, done, more)
        self.profile.steps += 1
        self.profile.tokens += batch.filled.tokens
        self.profile.padded += batch.filled.padded
        clock.lap("other")
        return done.loss

    def _write(self, batch: Batch, done: Done, more: Mapping[str, Any]) -> None:
        """One line a step, without times: the log of two equal runs is equal byte for byte."""
        filled = batch.filled
        self.log.write(
            {
                "step": filled.step + 1,
                "task": filled.task,
                "epoch": filled.epoch,
                "loss": done.loss,
                "loss_hex": done.loss.hex(),
                "loss_per_dim": dict(zip(map(str, self.encoder.dims), done.per_dim, strict=True)),
                "lr": done.rate,
                "grad_norm": done.norm,
                "tokens": filled.tokens,
                "padded": filled.padded,
                "rows": len(filled.rows),
                **more,
            }
        )

    def _save(self, done: int) -> None:
        began = time.perf_counter()
        cursor = self.plan.count_before(done)
        names = self.batches.names
        epochs = [c // max(self.plan.batches_per_epoch(i), 1) for i, c in enumerate(cursor)]
        self.log.sync()
        optimizer, count = self.optimizer.tensors()
        optimizer["rng.torch"] = torch.get_rng_state()
        optimizer.update(self.negatives.tensors(done))
        checkpoint.save(
            self.folder / "checkpoints",
            step=done,
            model=self.encoder.state_dict(),
            optimizer=optimizer,
            state={
                "stage_digest": self.digest,
                "data_digest": self.data_digest,
                "init_sha256": self.init_sha256,
                "seed": self.config.seed,
                "config": _decisive(self.config),
                "cursor": dict(zip(names, cursor, strict=True)),
                "epoch": dict(zip(names, epochs, strict=True)),
                "optimizer_steps": count,
                "torch_threads": self.threads,
                "torch": torch.__version__.partition("+")[0],
                "world": 1,
                **self.negatives.state(done),
            },
            keep=self.config.keep_checkpoints,
        )
        self.negatives.prune(checkpoint.oldest(self.folder / "checkpoints"))
        self.profile.checkpoint += time.perf_counter() - began

    def _resume(self) -> int:
        """Steps done: the state of the newest checkpoint is loaded, the log cut to it."""
        _rust.sweep_tmp(str(self.folder))  # what a killed process was writing
        found = checkpoint.load_latest(self.folder / "checkpoints")
        if found is None:
            self._open_negatives()
            self.log.start(0)
            return 0
        checkpoint.prune(found.path.parent, found.path, self.config.keep_checkpoints)
        state = found.state
        cursor = dict(
            zip(self.batches.names, self.plan.count_before(int(state["step"])), strict=True)
        )
        checks.checkpoint_fits(
            found, stage_digest=self.digest, data_digest=self.data_digest, cursor=cursor
        )
        self.encoder.load_state_dict(found.model)
        torch.set_rng_state(found.optimizer.pop("rng.torch"))
        slices = split(found.optimizer)
        self.optimizer.restore(found.optimizer, int(state["optimizer_steps"]))
        self.threads = int(state["torch_threads"])
        torch.set_num_threads(self.threads)
        self.done = int(state["step"])
        self.encoder.begin_step(self.done - 1)
        self._open_negatives().restore(slices, state, self.done)
        self.log.start(self.done)
        return self.done

    def _open_negatives(self) -> Negatives:
        self.negatives = Negatives(
            self.config, self.batches, given=self.given, miner=self.miner,
            folder=self.folder / REFRESH, threads=self.threads, profile=self.profile,
        )  # fmt: skip
        return self.negatives

    def _fail(self, batch: Batch, what: str) -> None:
        path = save_failed_batch(self.folder, batch)
        raise EmbkitError(
            what,
            where=f"task {batch.filled.task}; its batch is in {path}",
            fix="look at that batch; a lower lr, a longer warm-up or a higher temperature helps "
            "when the data is sound",
        )


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms inside; torch's other settings as they were."""
    was = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # a module property that type checkers do not see
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling every new buffer with NaN finds reads of uninitialised memory; it costs a tenth of
    # the step, and the tests of the kernels do it.
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        memory.fill_uninitialized_memory = fill


@contextmanager
def _threads(count: int) -> Iterator[None]:
    was = torch.get_num_threads()
    if was != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != was:
            torch.set_num_threads(was)


def _config(config: Train | None, overrides: Mapping[str, Any]) -> Train:
    """Settings with single ones replaced; raises UsageError with the nearest name."""
    known = {f.name for f in dataclasses.fields(Train)}
    for key in overrides:
        if key not in known:
            raise UsageError(f"Unknown setting {key!r}.", fix=nearest(key, known))
    return dataclasses.replace(config or Train(), **overrides)


def _decisive(config: Train) -> dict[str, Any]:
    """The settings that decide the model, as JSON types."""
    plain = dataclasses.asdict(dataclasses.replace(config, tasks=dict(config.tasks)))
    plain["betas"] = list(config.betas)
    off = () if config.refresh_every else ("refresh_every", "refresh_lag")
    if config.dynamic.on:
        plain["dynamic"] = dataclasses.asdict(config.dynamic.resolved())
    else:
        off = (*off, "dynamic")
    return {key: value for key, value in plain.items() if key not in (*_FREE, *off)}
