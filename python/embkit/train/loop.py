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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit.errors import EmbkitError, Preempted, UsageError, nearest
from embkit.losses import losses_fit
from embkit.progress import Bar, bar
from embkit.recipe import Train
from embkit.recipe.schema import changed
from embkit.stage import Stage
from embkit.train import budget, checks, statistics
from embkit.train.batches import Batch, Steps, allocator, layout_of
from embkit.train.callbacks import About, Callback, Callbacks
from embkit.train.checkpoint import sha256_tensors
from embkit.train.evaluation import Evaluation
from embkit.train.log import Log, save_failed_batch
from embkit.train.negatives import Negatives
from embkit.train.optim import Optimizer
from embkit.train.parallel import Ranks, open_ranks, training_device
from embkit.train.profile import Clock, Profile, Speed
from embkit.train.refresh import Miner
from embkit.train.reporters import reporters
from embkit.train.sharding import spread, whole_state
from embkit.train.signals import StopFlag
from embkit.train.spike import Spikes
from embkit.train.state import State, stage_of
from embkit.train.step import Done, Step
from embkit.train.teachers import Teachers, forget, learn
from embkit.train.tensorboard import TensorBoard

if TYPE_CHECKING:
    from embkit.model import Encoder

# Settings that are newer than the others: not among a run's as long as they change nothing, so that
# runs begun before go on.
_LATER = ("prompt_dropout", "projection_lr_scale", "layer_lr_decay", "batch_sizes")
_DEFAULTS = Train()
# Settings that change what is seen or how fast, not one bit of the model.
REFRESH = "refresh"  # folder of a run that is gone when it is published
_FREE = (
    "data_threads", "log_every", "checkpoint_every", "keep_checkpoints", "watch", "graph_memory",
    "sharding", "shard_ranks", "cpu_offload", "gather", "rank_timeout", "teacher", "device",
)  # fmt: skip


def prefinetune(
    encoder: Encoder,
    store: Any,
    *,
    out: Path | str,
    config: Train | None = None,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    **overrides: Any,
) -> Encoder:
    """First stage: from pre-trained (or random) weights to an encoder, on in-batch negatives.

    Args:
        encoder: where to start; a copy is trained, the argument is left alone.
        store: an ``embkit.data.Store`` or its directory.
        out: the run directory: model/, checkpoints/, log.jsonl, manifest.json.
        config: settings; defaults when None.
        callbacks: look on (:class:`embkit.train.Callback`).
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
    return train(
        encoder, store, name="prefinetune", out=out, config=chosen, callbacks=callbacks, fresh=fresh
    )[0]


def finetune(
    encoder: Encoder,
    store: Any,
    *,
    negatives: Any = None,
    refresh: Miner | None = None,
    out: Path | str,
    config: Train | None = None,
    callbacks: Sequence[Callback] = (),
    fresh: bool = False,
    **overrides: Any,
) -> Encoder:
    """Second stage: single-task batches, with mined hard negatives.

    Args:
        negatives: what :func:`embkit.mine.mine` returned, or its directory; None uses the
            negatives in the examples, if any.
        refresh: how negatives are mined again every ``refresh_every`` steps.
        encoder, store, out, config, callbacks, fresh, **overrides: as for :func:`prefinetune`;
            give each run of a soup its own ``out`` and ``seed``.

    Returns:
        The trained encoder, in evaluation mode.

    Raises:
        EmbkitError: as :func:`prefinetune`.
        CorruptError: negatives of another store.
    """
    chosen = _config(config, overrides)
    return train(
        encoder, store, name="finetune", out=out, config=chosen, negatives=negatives,
        refresh=refresh, callbacks=callbacks, fresh=fresh,
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
    callbacks: Sequence[Callback] = (),
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
    options: dict[str, Any] = {
        "name": name, "params": params, "kind": "embkit.run", "fresh": fresh,
        "inputs": [
            store.path, *([mined] if mined else []), *_judges(config),
            *([config.teacher] if config.teacher else []),
        ],
    }  # fmt: skip
    device = training_device(encoder.device, config.device)
    checks.gpu_is_there(device)
    with (
        open_ranks(device, timeout=config.rank_timeout) as ranks,
        stage_of(ranks, out, **options) as work,
    ):
        if work.done:
            return Encoder.from_pretrained(work.out / "model").to(device), Profile()
        checks.before_training(encoder, store)
        checks.ranks_fit(config, ranks)
        encoder.check_steps(config.steps)
        watching = [TensorBoard(), *reporters(config.watch.report_to), *callbacks]
        run = _Run(
            encoder, device, store, mined, miner, config, work,
            Callbacks(watching if ranks.first else ()), ranks,
        )  # fmt: skip
        if not fresh:
            ranks.once(lambda: checks.no_other_run(work.out, work.digest, run.about))
        label = name.capitalize() if ranks.first else None
        with deterministic(), bar(label, total=config.steps, unit="steps") as progress:
            run.all(name, progress)
        trained = run.result()

        def publish() -> None:
            shutil.rmtree(work.dir / REFRESH, ignore_errors=True)
            (work.dir / budget.FILE).unlink(missing_ok=True)
            export(trained, work.dir / "model", name=Path(out).name)
            work.publish(
                {
                    "steps": config.steps,
                    "tasks": [
                        {"name": name, "kind": store.task(name)["kind"], "examples": count}
                        for name, count in run.steps.examples.items()
                    ],
                    "skipped": run.steps.skipped,
                    "init_sha256": run.state.init_sha256,
                    "model_digest": trained.digest(),
                    **({} if config.token_budget else {"token_budget": run.config.token_budget}),
                }
            )

        ranks.once(publish)
    return trained.eval(), run.profile


class _Run:
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
        self.about = checks.identity(work.digest, _decisive(config), encoder, store)
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
    if config.watch.best == "export":
        plain["best"] = config.watch.evaluate_every
    off = (*off, *(name for name in _LATER if plain[name] == getattr(_DEFAULTS, name)))
    plain["loss"] = changed(config.loss)
    off = (*off, *(name for name in ("loss", "losses") if not plain[name]))
    for part in plain["parts"]:
        if not part["loss"]:
            del part["loss"]
    return {key: value for key, value in plain.items() if key not in (*_FREE, *off)}


def _judges(config: Train) -> list[str]:
    """The evaluation sets of a run whose output they decide."""
    on = config.watch.evaluate_on
    return [on] if config.watch.best == "export" and on is not None else []
