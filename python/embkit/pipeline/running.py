"""`embkit run`: the stages of a recipe in order, each a directory of the run; tables and report.

Nothing here computes: every stage is a public function that anybody can call alone. A finished
stage is skipped by its digest, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import recipe as recipes
from embkit.pipeline.llm import Asking, asking
from embkit.pipeline.options import (
    data_folder,
    dedup_options,
    filter_options,
    kinds_of,
    mined_classes,
    mined_tasks,
    miner,
    read_options,
    relabelled_tasks,
    start_encoder,
    tokenizer_options,
    training_files,
)
from embkit.pipeline.order import EVERY, clear, place, stages_of
from embkit.pipeline.results import finish, read_json
from embkit.recipe import Recipe, Train

if TYPE_CHECKING:
    from embkit.data import Records, Store
    from embkit.data.sources import Source
    from embkit.model import Encoder
    from embkit.train.parallel import Ranks


def run(
    recipe: Recipe | Path | str,
    *,
    out: Path | str,
    from_stage: str | None = None,
    fresh: bool = False,
    on_stage: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run every stage of a recipe.

    Args:
        recipe: a recipe, its file, or the name of a built-in one.
        out: the run directory; everything is inside it.
        from_stage: redo this stage and the ones after it.
        fresh: redo everything.
        on_stage: called with each stage's name as it begins.

    Returns:
        What ``result.json`` holds: scores of every model and width on dev and test, the soup's
        ingredients, the export check. Under torchrun on the first rank; nothing on the others.

    Raises:
        UsageError: a wrong recipe, stage name or data folder. CorruptError: damaged input.
    """
    import torch

    from embkit.train.parallel import open_ranks, training_device

    chosen = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    out = Path(out)
    data = data_folder(chosen)

    def begin() -> None:
        again = EVERY[0] if fresh else from_stage
        first = place(again)
        if ask := asking(chosen):  # before anything goes: it may be paid for
            llm = Asking(chosen, out)
            llm.check(anew=first is not None and first <= EVERY.index(ask[0]))
            llm.spent.forget(() if first is None else EVERY[first:])
        clear(out, again)
        out.mkdir(parents=True, exist_ok=True)
        recipes.save(chosen, out / "recipe.toml")

    if chosen.mix.on:
        from embkit.mix import needs_one_process

        needs_one_process()
    # The ranks meet once for all stages: those that train use them, the others are the first's.
    limit = max(chosen.prefinetune.rank_timeout, chosen.finetune.rank_timeout)
    device = training_device(torch.device("cpu"), chosen.prefinetune.device)
    with open_ranks(device, timeout=limit) as ranks:
        ranks.alone(begin)  # a model that is opened, or a slow server, may take its time
        return Run(chosen, data, out, ranks, on_stage).all()


class Run:
    """One run: keeps what later stages need from earlier ones.

    Args:
        recipe, data, out: what to run, its data folder, the run directory.
        ranks: that train; what does not train is done by the first.
        on_stage: called with each stage's name as it begins.
    """

    records: Records  # of which the store is made
    written: list[Source]  # by a language model, among these

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        out: Path,
        ranks: Ranks,
        on_stage: Callable[[str], None] | None = None,
    ) -> None:
        self.recipe, self.data, self.out, self.ranks = recipe, data, out, ranks
        self.on_stage = on_stage
        self.seconds = read_json(out / "seconds.json")
        self.current: tuple[str, float] | None = None
        self.asking = Asking(recipe, out, ask=ranks.first) if asking(recipe) else None

    def all(self) -> dict[str, Any]:
        out, recipe = self.out, self.recipe
        store = self._by_first(self._prepare)
        wanted = mined_tasks(recipe, store)
        relabelled = relabelled_tasks(recipe, store, wanted)
        wanted = [name for name in wanted if name not in relabelled]

        self.stage("prefinetune", "in-batch negatives")
        from embkit.train import finetune, prefinetune

        start = self._by_first(lambda: self._start(store))
        pre = prefinetune(start, store, out=out / "pre", config=self._watched(recipe.prefinetune))

        self.stage("mine", "hard negatives, with the model of the stage before")
        from embkit.mine import mine

        mined = None
        if wanted:
            mined = self._by_first(
                lambda: mine(
                    pre,
                    store,
                    out=out / "mined",
                    rules=recipe.mine,
                    tasks=wanted,
                    classes=mined_classes(recipe, wanted),
                )
            )
        if self.asking and relabelled:
            self.stage("relabel", "positives and hard negatives, by a language model")
            ask = self.asking
            options = tokenizer_options(recipe, kinds_of(self.records), self.written)
            store, mined = self._by_first(
                lambda: ask.relabel(pre, self.records, store, mined, relabelled, options)
            )

        runs = self._runs(pre, store, mined)
        self.stage("finetune", f"{len(runs)} runs on single-task batches")
        tuned = []
        for i, settings in enumerate(runs):
            config = self._watched(settings)
            finetune(
                pre,
                store,
                negatives=mined,
                refresh=miner(recipe, store.path, given=relabelled),
                out=out / f"ft-{i}",
                config=config,
            )
            tuned.append(out / f"ft-{i}")
        return self.ranks.alone(lambda: finish(self, start, pre, tuned)) or {}

    def _runs(self, pre: Encoder, store: Store, mined: Any) -> list[Train]:
        """Settings of the fine-tuning runs: the recipe's, or one per mixture that was found."""
        recipe, out = self.recipe, self.out
        if not recipe.mix.on:
            return [recipe.run_config(i) for i in range(len(recipe.runs))]
        from embkit.mix import best, search_mixture

        self.stage("mix", f"{recipe.mix.candidates} mixtures by short runs, judged on dev")
        found = search_mixture(
            pre, store, out=out / "mix", on=self.data / "dev", config=recipe.run_config(0),
            mix=recipe.mix, negatives=mined,
        )  # fmt: skip
        config = recipe.run_config(0)
        return [dataclasses.replace(config, tasks=w) for w in best(found, recipe.mix.keep)]

    def _by_first(self, work: Callable[[], Any]) -> Any:
        """What a stage gives: the first rank does it, then it is done for the others."""
        made = self.ranks.alone(work)
        return made if self.ranks.first else work()

    def _watched(self, config: Train) -> Train:
        """Settings of a stage that is evaluated on dev/ while it trains, where nothing is named."""
        from embkit.train.evaluation import with_folder

        return dataclasses.replace(config, watch=with_folder(config.watch, self.data / "dev"))

    def _prepare(self) -> Store:
        from embkit import data

        recipe, out = self.recipe, self.out
        sources: list[Source] = []
        if self.asking and recipe.synth.on:
            self.stage("synth", "queries and labelled texts, by a language model")
            sources = self.asking.write()

        self.stage("read", f"records of {self.data}")
        files = [*training_files(self.data, needed=not sources), *sources]
        records = data.read(files, **read_options(recipe)).save(out / "records")

        self.stage("dedup", "near-duplicates, and rows that leak into dev or test")
        against = [self.data / "dev", self.data / "test"]
        clean = data.dedup(records, out=out / "clean", against=against, **dedup_options(recipe))

        if recipe.filter.enabled:
            self.stage("filter", "texts that break rules, pairs that do not belong together")
            clean = data.filter(clean, out=out / "filtered", **filter_options(recipe))

        if self.asking and recipe.judge.on:
            self.stage("judge", "pairs that do not hold, by a language model")
            clean = self.asking.judge(clean)

        self.stage("tokenize", "texts to token shards")
        self.records, self.written = clean, sources
        options = tokenizer_options(recipe, kinds_of(clean), sources)
        return data.tokenize(clean, out=out / "store", **options)

    def _start(self, store: Store) -> Encoder:
        """The encoder before any training, kept as a model directory of its own."""
        from embkit.model import Encoder
        from embkit.stage import stage

        params = {"model": recipes.to_table(self.recipe)["model"]}
        inputs = [store.path]
        with stage(self.out / "init", name="init", params=params, inputs=inputs) as work:
            if not work.done:
                start_encoder(self.recipe, store).export(work.dir / "model")
                work.publish()
        return Encoder.from_pretrained(self.out / "init" / "model")

    def stage(self, name: str, about: str) -> None:
        if not self.ranks.first:
            return
        self.close_stage()
        if self.on_stage is not None:
            self.on_stage(name)
        self.current = (name, time.monotonic())
        stages = stages_of(self.recipe)
        print(f"[{stages.index(name) + 1}/{len(stages)}] {name}: {about}", flush=True)

    def close_stage(self) -> None:
        if self.current is None:
            return
        name, started = self.current
        taken = time.monotonic() - started
        # A skipped stage takes no time: keep what it took when it ran.
        self.seconds[name] = round(max(taken, float(self.seconds.get(name, 0.0))), 2)
        self.current = None
