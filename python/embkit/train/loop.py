"""The training loop that every recipe shares.

One global batch a step, of one task: forward in length-sorted micro-batches with the graph kept,
one loss over all of them, one backward, one AdamW step. Everything that decides a step is a pure
function of (configuration, step) or is in the checkpoint, so a run that is killed anywhere and
started again writes the same log and the same model, bit for bit, on the same machine.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit.errors import EmbkitError, Preempted, UsageError
from embkit.losses import losses_fit
from embkit.progress import Bar
from embkit.recipe import Train
from embkit.stage import Stage
from embkit.train import budget, checks, statistics
from embkit.train.batches import Batch, Steps, allocator, layout_of
from embkit.train.callbacks import About, Callback
from embkit.train.checkpoint import sha256_tensors
from embkit.train.evaluation import Evaluation
from embkit.train.log import Log, save_failed_batch
from embkit.train.negatives import Negatives
from embkit.train.optim import Optimizer
from embkit.train.parallel import Ranks
from embkit.train.profile import Clock, Profile, Speed
from embkit.train.refresh import Miner
from embkit.train.settings import decisive
from embkit.train.sharding import spread, whole_state
from embkit.train.signals import StopFlag
from embkit.train.spike import Spikes
from embkit.train.state import State
from embkit.train.step import Done, Step
from embkit.train.teachers import Teachers, forget, learn

if TYPE_CHECKING:
    from embkit.model import Encoder

REFRESH = "refresh"  # folder of a run that is gone when it is published


class Run:
    """One run in its partial directory."""

    def __init__(
        self,
        start: Encoder,
        device: torch.device,
        store: Any,
        negatives: Path | None,
        miner: Miner | None,
        config: Train,
        work: Stage,
        callbacks: Callback,
        ranks: Ranks,
    ) -> None:
        self.encoder = encoder = copy.deepcopy(start).to(device)
        self.start, self.config, self.work, self.ranks = start, config, work, ranks
        self.store, self.folder, self.callbacks = store, work.dir, callbacks
        self.about = checks.identity(work.digest, decisive(config), encoder, store)
        if not config.token_budget:
            longest = max(store.max_length.values())
            tokens = budget.settled(config, encoder, longest, folder=work.dir, ranks=ranks)
            self.config = config = dataclasses.replace(config, token_budget=tokens)
            self.about["token_budget"] = tokens
        self.steps = Steps(
            store, config, ranks, negatives=negatives, layout=layout_of(encoder, config),
            pad_id=encoder.tokenizer.pad_id, allocate=allocator(encoder.device),
        )  # fmt: skip
        end = self.steps.steps
        if end is not None and config.steps > end:
            raise UsageError(
                f"The mixture ends after {end} steps, {config.steps} are asked for.",
                where="steps",
                fix=f'set steps = {end}, more epochs, or exhausted = "repeat"',
            )
        tasks = [b.names for b in self.steps.distinct]
        teachers = Teachers(config, store, tasks, mined=negatives, refreshed=miner is not None)
        losses_fit(
            config, encoder.dims, store, tasks, teacher_width=teachers.width,
            scored=teachers.scored, refreshed=miner is not None, ranks=ranks.world,
        )  # fmt: skip
        self.adopt_sides()
        init_sha256 = sha256_tensors(encoder.state_dict())
        checks.same_start(ranks, init_sha256)
        learn(encoder, config, teachers.width)
        weights = spread(encoder, config, ranks)
        self.optimizer = Optimizer(encoder, config)
        self.step = Step(
            encoder, config, self.optimizer, ranks=ranks, weights=weights, parts=self.steps.count,
            scored=self.steps.sizes if config.dynamic.on else (), teachers=teachers,
        )  # fmt: skip
        self.sharded = weights.sharded
        self.profile = Profile()
        self.evaluation = Evaluation(config.watch)
        self.log = Log(self.folder / "log.jsonl", writes=ranks.first)
        self.state = State(
            self.folder, self.about, encoder=encoder, optimizer=self.optimizer,
            batches=self.steps, config=config, evaluation=self.evaluation, log=self.log,
            profile=self.profile, init_sha256=init_sha256, rank=ranks.rank, world=ranks.world,
        )  # fmt: skip
        self.given, self.miner = negatives, miner
        self.done = 0

    def adopt_sides(self) -> None:
        """The encoder serves with the prompts and lengths that the store was made with."""
        self.encoder.adopt_prompts(self.store.prompts, self.store.task_prompts)
        self.encoder.max_length = {**self.encoder.max_length, **self.store.max_length}

    def result(self) -> Encoder:
        """What was trained, in one piece on every rank."""
        if self.config.watch.best == "export":
            self.state.load_best()
        else:
            self.optimizer.adopt_average()
        if self.sharded:
            self.encoder = self._in_one_piece(whole_state(self.encoder))
        forget(self.encoder)
        self.encoder.finish()
        return self.encoder

    def _for_refresh(self) -> Encoder | None:
        """The encoder as it is, on the first rank; every rank must ask."""
        if not self.sharded:
            return self.encoder
        weights = whole_state(self.encoder)
        return self._in_one_piece(weights) if self.ranks.first else None

    def _in_one_piece(self, weights: Mapping[str, torch.Tensor]) -> Encoder:
        """The encoder, of which this process has a shard, with all weights."""
        found = copy.deepcopy(self.start)
        found.load_state_dict(weights)
        found.soft_mask_step = self.encoder.soft_mask_step
        found.prompts, found.max_length = self.encoder.prompts, self.encoder.max_length
        return found

    def all(self, name: str, progress: Bar) -> None:
        """Every step that is still to do."""
        self.encoder.train()
        with torch.random.fork_rng(devices=[]), StopFlag() as stop, _threads(self.state.threads):
            torch.manual_seed(self.config.seed)
            start = self._resume()
            progress.start(start)
            steps, negatives = self.config.steps, self.negatives
            negatives.idle = lambda: self._preempt() if self.ranks.any(stop.requested) else None
            self.speed = Speed(self.profile, self.encoder, world=self.ranks.world)
            self.callbacks.on_start(
                About(
                    name=name,
                    out=self.work.out,
                    digest=self.work.digest,
                    settings=self.about["config"],
                    start=start,
                    steps=steps,
                )  # fmt: skip
            )
            ahead = self.steps.stream(
                start, steps, device=self.encoder.device,
                threads=negatives.threads(self.config.data_threads),
                before=negatives.before if negatives.on else None,
            )  # fmt: skip
            mark = time.perf_counter()
            try:
                for batch in ahead:
                    began = time.perf_counter()
                    self.profile.wait += began - mark
                    shown = self._step(batch)
                    done = self.done = batch.step + 1
                    negatives.updated(done, self._for_refresh)
                    if self.ranks.any(stop.requested) and done < steps:
                        self._preempt()
                    best = self.evaluation.best_at(done)
                    if done % self.config.checkpoint_every == 0 or done == steps or best:
                        self._save(done)
                    if done % self.config.log_every == 0 or done == steps:
                        progress.update(done, loss=shown, **self._shown())
                    mark = time.perf_counter()
                self.state.saver.wait()
                self.ranks.wait()  # rank 0 publishes a checkpoint when it has all ranks' files
            finally:
                ahead.close()  # type: ignore[attr-defined]
                negatives.close()
                self.log.close()
                self.state.saver.close()
                self.callbacks.on_end(self.done == steps)

    def _shown(self) -> dict[str, str]:
        """What the progress bar says of the whole run so far."""
        speed = self.speed.whole()
        peak = self.speed.peak
        return {
            "tok/s": f"{speed['tokens_per_s']:.0f}",
            "MFU": f"{speed['mfu']:.0%} of {peak.flops / 1e12:.3g} TFLOP/s ({peak.origin})",
            "data": f"{speed['wait']:.1%}",
        }

    def _preempt(self) -> None:
        """Stop between two steps; the same call goes on from here."""
        self._save(self.done, preempted=True)
        self.state.saver.wait()
        raise Preempted(
            f"SIGTERM: stopped after step {self.done} of {self.config.steps} with a checkpoint.",
            where=self.folder,
            fix="run the same command again to go on",
        )

    def _step(self, batch: Batch) -> float:
        """One step, its evaluation and its log line; returns the loss."""
        clock = Clock(self.profile)
        step = batch.step + 1
        done = self.step.run(batch, clock)
        self._check(batch, done)
        more = dict(self.negatives.after(batch.step, done.scores))
        clock.lap("negatives")
        self.speed.count(batch)
        clock.lap("other")
        speed, scores = self.speed.now(), None
        if self.evaluation.due(step, self.config.steps):
            scores = self._evaluate(step)
            more["scores"] = {"mean": scores["mean"], "types": scores["types"]}
            clock.lap("evaluation")
        line = self._line(batch, done, more)
        self.log.write(line)
        self.spikes.add(line)
        self.callbacks.on_step(step, line, speed)
        if scores is not None:
            self.callbacks.on_evaluate(step, scores)
        clock.lap("other")
        return done.loss

    def _evaluate(self, step: int) -> dict[str, Any]:
        """Scores of the weights that would become the model; shards need every rank for them."""
        with self.optimizer.averaged():
            if self.sharded:
                found = self.evaluation.score(self.encoder)
                scores = self.ranks.once(lambda: found)
            else:
                scores = self.ranks.once(lambda: self.evaluation.score(self.encoder))
        self.evaluation.note(scores, step)
        return dict(scores)

    def _check(self, batch: Batch, done: Done) -> None:
        """A loss or gradient that is no number, or a loss that has jumped, ends the run."""
        step = batch.step + 1
        if not math.isfinite(done.loss):
            self._fail(batch, f"The loss of step {step} is {done.loss}.")
        if not math.isfinite(done.norm) and not done.skipped:
            self._fail(batch, f"The gradient norm of step {step} is {done.norm}.")
        limit = self.spikes.limit(batch.task)
        if limit is not None and done.loss > limit:
            self._fail(
                batch,
                f"The loss of step {step} has jumped to {done.loss:.4g}; by the last losses of "
                f"this task up to {limit:.4g} was to be expected.",
                more=' when it may jump, set watch.spike = "off" and go on from the checkpoint',
            )

    def _line(self, batch: Batch, done: Done, more: Mapping[str, Any]) -> dict[str, Any]:
        """One line a step, without times: the log of two equal runs is equal byte for byte."""
        filled = batch.filled
        return {
            "step": batch.step + 1,
            "task": batch.task,
            "epoch": filled.epoch,
            "loss": done.loss,
            "loss_hex": done.loss.hex(),
            "loss_per_dim": dict(zip(map(str, self.encoder.dims), done.per_dim, strict=True)),
            "lr": done.rate,
            "grad_norm": None if done.skipped else done.norm,
            "tokens": done.tokens,
            "padded": done.padded,
            "rows": done.rows,
            **done.more,
            **self._statistics(batch, done),
            **more,
        }

    def _statistics(self, batch: Batch, done: Done) -> dict[str, Any]:
        if done.statistics is None:
            return {}
        tasks = self.steps.tasks(batch.step)
        found = statistics.report(
            done.statistics, tasks, self.encoder.dims, self.config,
            learned=done.more.get("temperature"),
        )  # fmt: skip
        return {"statistics": found}

    def _save(self, done: int, *, preempted: bool = False) -> None:
        path = self.state.save(done, self.negatives, preempted=preempted)
        self.callbacks.on_checkpoint(done, path)

    def _resume(self) -> int:
        """Steps done: the state of the newest checkpoint is loaded, the log cut to it."""
        found = self.state.load()
        self._open_negatives()
        if found is not None:
            self.done = int(found.state["step"])
            self.encoder.begin_step(self.done - 1)
            self.negatives.restore(found.optimizer, found.state, self.done)
        lines = self.log.start(self.done, int(found.state["log_bytes"]) if found else 0)
        self.spikes = Spikes(self.config.watch.spike, lines)
        return self.done

    def _open_negatives(self) -> None:
        self.negatives = Negatives(
            self.config, self.steps.distinct, ranks=self.ranks, given=self.given, miner=self.miner,
            folder=self.folder / REFRESH, threads=self.state.threads, profile=self.profile,
        )  # fmt: skip

    def _fail(self, batch: Batch, what: str, more: str = "") -> None:
        paths = save_failed_batch(self.folder, batch, rank=self.ranks.rank)
        raise EmbkitError(
            what,
            where=f"task {batch.task}; its batch is in {' and '.join(map(str, paths))}",
            fix="look at that batch; a lower lr, a longer warm-up or a higher temperature helps "
            f"when the data is sound{';' + more if more else ''}",
        )


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
