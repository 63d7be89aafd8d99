"""Pre-finetuning and fine-tuning: a resumable run of the loop, published as one directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit.progress import bar
from embkit.recipe import Train
from embkit.train import budget, checks
from embkit.train.callbacks import Callback, Callbacks
from embkit.train.loop import REFRESH, Run
from embkit.train.parallel import open_ranks, training_device
from embkit.train.profile import Profile
from embkit.train.refresh import Miner
from embkit.train.reporters import reporters
from embkit.train.settings import decisive, judges, with_overrides
from embkit.train.state import stage_of
from embkit.train.tensorboard import TensorBoard

if TYPE_CHECKING:
    from embkit.model import Encoder


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
    chosen = with_overrides(config, overrides)
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
    chosen = with_overrides(config, overrides)
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
    params = {**decisive(config), "init": encoder.digest()}
    if miner is not None:
        params["miner"] = dict(miner.params)
    options: dict[str, Any] = {
        "name": name, "params": params, "kind": "embkit.run", "fresh": fresh,
        "inputs": [
            store.path, *([mined] if mined else []), *judges(config),
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
        run = Run(
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
