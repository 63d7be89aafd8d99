"""`embkit run`: the stages of a recipe in order, each a directory of the run; tables and report.

Nothing here computes: every stage is a public function that anybody can call alone. A finished
stage is skipped by its digest, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import recipe as recipes
from embkit.errors import CorruptError, UsageError, nearest
from embkit.pipeline_llm import STAGES as LLM_STAGES
from embkit.pipeline_llm import Asking, asking, costs, written_tasks
from embkit.recipe import Recipe, Task, Train

if TYPE_CHECKING:
    import torch

    from embkit.data import Records, Store
    from embkit.losses import Known
    from embkit.model import Encoder
    from embkit.train import Miner
    from embkit.train.parallel import Ranks

STAGES = (
    "read",
    "dedup",
    "tokenize",
    "prefinetune",
    "mine",
    "finetune",
    "soup",
    "evaluate",
    "export",
)
# With what a recipe may switch on.
_EVERY = (
    *("synth", "read", "dedup", "filter", "judge", "tokenize", "prefinetune", "mine", "relabel"),
    *("mix", "finetune", "soup", "evaluate", "export"),
)
# What each stage publishes in the run directory; scores/ also serves the soup's choice on dev.
_OUTPUTS = {
    "synth": ("synth-*",),
    "read": ("records",),
    "dedup": ("clean",),
    "filter": ("filtered",),
    "judge": ("judged",),
    "tokenize": ("store",),
    "prefinetune": ("init", "pre"),
    "mine": ("mined",),
    "relabel": ("relabelled", "store-relabelled", "mined-relabelled"),
    "mix": ("mix",),
    "finetune": ("ft-*",),
    "soup": ("soup", "uniform", "slerp", "search", "mixed"),
    "evaluate": ("scores",),
    "export": ("model",),
}
_MAIN = {"retrieval": "ndcg@10", "sts": "spearman", "classification": "accuracy"}


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
        again = _EVERY[0] if fresh else from_stage
        first = _place(again)
        if ask := asking(chosen):  # before anything goes: it may be paid for
            Asking(chosen, out).check(anew=first is not None and first <= _EVERY.index(ask[0]))
        _clear(out, again)
        out.mkdir(parents=True, exist_ok=True)
        recipes.save(chosen, out / "recipe.toml")

    if chosen.mix.on:
        from embkit.mix import needs_one_process

        needs_one_process()
    # The ranks meet once for all stages: those that train use them, the others are the first's.
    limit = max(chosen.prefinetune.rank_timeout, chosen.finetune.rank_timeout)
    device = training_device(torch.device("cpu"), chosen.prefinetune.device)
    with open_ranks(device, timeout=limit) as ranks:
        ranks.once(begin)
        return _Run(chosen, data, out, ranks, on_stage).all()


class _Run:
    """One run: keeps what later stages need from earlier ones."""

    records: Records  # of which the store is made

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
        self.seconds = _read_json(out / "seconds.json")
        self.current: tuple[str, float] | None = None
        self.asking = Asking(recipe, out) if asking(recipe) else None

    def all(self) -> dict[str, Any]:
        out, recipe = self.out, self.recipe
        store = self._by_first(self._prepare)
        wanted = mined_tasks(recipe, store)
        relabelled = relabelled_tasks(recipe, store, wanted)
        wanted = [name for name in wanted if name not in relabelled]

        self._stage("prefinetune", "in-batch negatives")
        from embkit.train import finetune, prefinetune

        start = self._by_first(lambda: self._start(store))
        pre = prefinetune(start, store, out=out / "pre", config=self._watched(recipe.prefinetune))

        self._stage("mine", "hard negatives, with the model of the stage before")
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
            self._stage("relabel", "positives and hard negatives, by a language model")
            ask, options = self.asking, tokenizer_options(recipe, kinds_of(self.records))
            store, mined = self._by_first(
                lambda: ask.relabel(pre, self.records, store, mined, relabelled, options)
            )

        runs = self._runs(pre, store, mined)
        self._stage("finetune", f"{len(runs)} runs on single-task batches")
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
        return self.ranks.alone(lambda: self._judge(start, pre, tuned)) or {}

    def _judge(self, start: Encoder, pre: Encoder, tuned: list[Path]) -> dict[str, Any]:
        """From the trained models to the exported one."""
        from embkit.model import Card, Encoder

        out, recipe = self.out, self.recipe
        self._stage("soup", "uniform and greedy, judged on dev")
        from embkit.soup import soup

        chosen = recipe.soup
        dev = self.data / "dev"
        soups = {
            "uniform": soup(tuned, out=out / "uniform", select="uniform"),
            "greedy": soup(tuned, out=out / "soup", select="greedy", on=dev),
        }
        if chosen.select not in soups:
            soups[chosen.select] = soup(
                tuned, out=out / chosen.select, select=chosen.select, search=chosen,
                on=dev if chosen.select == "search" else None,
            )  # fmt: skip
        kept = chosen.select
        if chosen.alpha != (1.0,):
            kept = "mixed with the start"
            soups[kept] = soup(
                tuned, out=out / "mixed", select=chosen.select, search=chosen, on=dev,
                base=out / "pre", alpha=chosen.alpha,
            )  # fmt: skip

        self._stage("evaluate", "every width from one encode")
        models = {"start" if recipe.model.path else "untrained": start, "pre-finetuned": pre}
        models |= {f"fine-tuned {i}": Encoder.from_pretrained(p) for i, p in enumerate(tuned)}
        models |= {f"soup, {name}": encoder for name, encoder in soups.items()}
        result = self._scores(models, pre.device)

        self._stage("export", "sentence-transformers layout")
        final = soups[kept].cpu()  # its check compares with the CPU
        final.export(out / "model", card=Card.of_run(out, result=result, soup=kept))
        result["export"] = _checked(final, out / "model", _sample_texts(self.data))
        self._finish(result)
        return result

    def _runs(self, pre: Encoder, store: Store, mined: Any) -> list[Train]:
        """Settings of the fine-tuning runs: the recipe's, or one per mixture that was found."""
        recipe, out = self.recipe, self.out
        if not recipe.mix.on:
            return [recipe.run_config(i) for i in range(len(recipe.runs))]
        from embkit.mix import best, search_mixture

        self._stage("mix", f"{recipe.mix.candidates} mixtures by short runs, judged on dev")
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
        sources: list[Any] = []
        if self.asking and recipe.synth.on:
            self._stage("synth", "queries and labelled texts, by a language model")
            sources = self.asking.write()

        self._stage("read", f"records of {self.data}")
        files = [*training_files(self.data, needed=not sources), *sources]
        records = data.read(files, **read_options(recipe)).save(out / "records")

        self._stage("dedup", "near-duplicates, and rows that leak into dev or test")
        against = [self.data / "dev", self.data / "test"]
        clean = data.dedup(records, out=out / "clean", against=against, **dedup_options(recipe))

        if recipe.filter.enabled:
            self._stage("filter", "texts that break rules, pairs that do not belong together")
            clean = data.filter(clean, out=out / "filtered", **filter_options(recipe))

        if self.asking and recipe.judge.on:
            self._stage("judge", "pairs that do not hold, by a language model")
            clean = self.asking.judge(clean)

        self._stage("tokenize", "texts to token shards")
        self.records = clean
        options = tokenizer_options(recipe, kinds_of(clean))
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

    def _scores(self, models: Mapping[str, Encoder], device: torch.device) -> dict[str, Any]:
        from embkit.evaluate import evaluate

        scores: dict[str, Any] = {}
        for split in ("dev", "test"):
            scores[split] = {}
            for i, (name, encoder) in enumerate(models.items()):
                target = (
                    self.out / "scores" / f"{split}-{name.replace(', ', '-').replace(' ', '-')}"
                )
                bm25 = self.recipe.evaluate.bm25 and i == 0
                found = evaluate(encoder.to(device), self.data / split, out=target, bm25=bm25)
                scores[split][name] = found
        return {
            "recipe": self.recipe.name,
            "dims": list(models["pre-finetuned"].dims),
            "scores": scores,
            "soup": {
                name: _read_json(self.out / folder / "report.json")
                for name, folder in self._soups().items()
            },
            "dedup": _read_json(self.out / "clean" / "report.json"),
            "mine": _read_json(self.out / "mined" / "report.json"),
            **(
                {"filter": _read_json(self.out / "filtered" / "report.json")}
                if self.recipe.filter.enabled
                else {}
            ),
            **(self.asking.reports() if self.asking else {}),
        }

    def _soups(self) -> dict[str, str]:
        """Folders of the soups by what they are."""
        found = {"uniform": "uniform", "greedy": "soup"}
        chosen = self.recipe.soup
        found.setdefault(chosen.select, chosen.select)
        return found | ({"mixed": "mixed"} if chosen.alpha != (1.0,) else {})

    def _stage(self, name: str, about: str) -> None:
        if not self.ranks.first:
            return
        self._close_stage()
        if self.on_stage is not None:
            self.on_stage(name)
        self.current = (name, time.monotonic())
        stages = stages_of(self.recipe)
        print(f"[{stages.index(name) + 1}/{len(stages)}] {name}: {about}", flush=True)

    def _close_stage(self) -> None:
        if self.current is None:
            return
        name, started = self.current
        taken = time.monotonic() - started
        # A skipped stage takes no time: keep what it took when it ran.
        self.seconds[name] = round(max(taken, float(self.seconds.get(name, 0.0))), 2)
        self.current = None

    def _finish(self, result: dict[str, Any]) -> None:
        from embkit import _rust
        from embkit.report import table, write_report

        self._close_stage()
        _publish_json(self.out / "result.json", result)
        _publish_json(self.out / "seconds.json", self.seconds)
        logs = {p.parent.name: p for p in sorted(self.out.glob("*/log.jsonl"))}
        settings = (self.out / "recipe.toml").read_text()
        page = write_report(result, logs=logs, settings=settings, seconds=self.seconds)
        _rust.publish_file(str(self.out / "report.html"), page.encode())
        print()
        print(table(result))
        difference = result["export"]["max_abs_difference"]
        print()
        if difference is None:
            print("export: not reloaded (pip install 'embkit[st]' to check it)")
        else:
            print(
                f"export: sentence-transformers gives the same, max |difference| {difference:.1e}"
            )
            if difference > result["export"]["limit"]:
                raise CorruptError(
                    "The exported model differs from the encoder.",
                    where=self.out / "model",
                    fix="please report it with result.json",
                )
        kept = result["soup"]["greedy"]["kept"]
        runs = len(result["soup"]["greedy"]["candidates"])
        print(f"greedy soup: kept {len(kept)} of {runs} runs")
        print(f"report: {self.out / 'report.html'}")
        print("\nUse the model:\n")
        print("  from sentence_transformers import SentenceTransformer")
        print(f"  model = SentenceTransformer({str(self.out / 'model')!r})")
        print('  model.similarity(model.encode(["text editor"]), model.encode(["edits files"]))')


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a recipe runs, in order."""
    off = {"filter": not recipe.filter.enabled, "mix": not recipe.mix.on}
    off |= {name: not getattr(recipe, name).on for name in LLM_STAGES}
    return tuple(name for name in _EVERY if not off.get(name, False))


def data_folder(recipe: Recipe) -> Path:
    """The data folder of a recipe: its own, or the bundled demo data.

    Raises:
        UsageError: a folder without train, dev or test.
    """
    bundled = Path(__file__).parent / "demo" / "data"
    folder = Path(recipe.data.path) if recipe.data.path else bundled
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such data folder", str(folder))
    for part in ("train", "dev", "test"):
        if not (folder / part).is_dir():
            raise UsageError(
                f"The data folder has no {part}/.",
                where=folder,
                fix="lay it out as docs/quickstart.md shows: train/, dev/ and test/",
            )
    return folder


def training_files(folder: Path, *, needed: bool = True) -> list[str]:
    """The record files of a data folder's train/, by name.

    Raises:
        UsageError: there is none, and one is needed.
    """
    files = sorted(
        str(p) for p in (folder / "train").iterdir() if p.is_file() and not p.name.startswith(".")
    )
    if not files and needed:
        raise UsageError(
            "There is no training file.",
            where=folder / "train",
            fix="put one file per task there: .jsonl, .jsonl.zst, .jsonl.gz or .parquet",
        )
    return files


def read_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.read`."""
    return {"max_rejected": recipe.data.max_rejected, "tasks": recipe.tasks}


def kinds_of(records: Records) -> dict[str, str]:
    """The kind of each task of saved records."""
    return {task["name"]: task["kind"] for task in records.manifest["tasks"]}


def mined_tasks(recipe: Recipe, store: Store) -> list[str]:
    """The retrieval tasks of a store whose hard negatives are mined; the others have their own."""
    kinds = {name: store.task(name)["kind"] for name in store.task_names}
    return [
        name
        for name, kind in kinds.items()
        if kind == "retrieval" and recipe.tasks.get(name, Task()).mined
    ]


def mined_classes(recipe: Recipe, tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """Classes of the texts of those tasks that are labelled sets turned into pairs, whose mined
    negatives must be of other classes; from the files of the data folder."""
    from embkit.data.sources import classes_of, find, of_tasks

    labelled = _labelled(recipe, tasks)
    if not labelled:
        return {}
    files = training_files(data_folder(recipe))
    found: dict[str, dict[str, str]] = {name: {} for name in labelled}
    made = written_tasks(recipe)
    own = {name: task for name, task in recipe.tasks.items() if name not in made}
    for source in of_tasks(find(files, task=None, kind="auto"), own):
        if source.task in found:
            found[source.task] |= classes_of(source)
    return found


def _labelled(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    rules = {name: recipe.tasks.get(name, Task()).convert.rule for name in tasks}
    return [name for name, rule in rules.items() if rule == "classes"]


def relabelled_tasks(recipe: Recipe, store: Store, mined: Sequence[str]) -> list[str]:
    """The tasks that the relabel stage gives new positives and negatives.

    Args:
        mined: tasks whose hard negatives are mined otherwise; the default, without labelled sets.

    Raises:
        UsageError: there is none, or one that the recipe names is no retrieval task.
    """
    if not recipe.relabel.on:
        return []
    pairs = [name for name in mined if not recipe.tasks.get(name, Task()).convert.on]
    found = list(recipe.relabel.tasks or pairs)
    known = [name for name in store.task_names if store.task(name)["kind"] == "retrieval"]
    for name in found:
        if name not in known:
            raise UsageError(
                f"relabel.tasks names {name!r}, no retrieval task; {nearest(name, known)}"
            )
    if not found:
        raise UsageError(
            "There is no retrieval task to relabel.", fix="name one in relabel.tasks, or leave it"
        )
    return found


def dedup_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.dedup`."""
    return dict(recipes.to_table(recipe)["dedup"])


def filter_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.filter`."""
    from embkit.data import FilterRules, ScoreFilter

    f = recipe.filter
    score = None
    if f.score_model is not None:
        score = ScoreFilter(model=f.score_model, threshold=f.min_score)
    return {
        "rules": FilterRules.preset(f.preset, f.rules),
        "languages": list(f.languages) or None,
        "action": f.action,
        "score": score,
    }


def tokenizer_options(recipe: Recipe, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.tokenize` for records of such tasks."""
    t = recipe.tokenizer
    return {
        "tokenizer": t.path or recipe.model.path,
        "vocab_size": t.vocab_size,
        "max_length_query": t.max_length_query,
        "max_length_passage": t.max_length_passage,
        "prompts": t.prompts("retrieval"),
        "task_prompts": recipe.task_prompts(kinds),
        "end_token": t.end_token,
        "prompt_dropout": any(
            train.prompt_dropout > 0
            for train in (recipe.prefinetune, *map(recipe.run_config, range(len(recipe.runs))))
        ),
    }


def miner(recipe: Recipe, store: Path, *, given: Sequence[str] = ()) -> Miner:
    """How a refresh mines during fine-tuning: `embkit mine` with the recipe's rules.

    Args:
        given: tasks whose negatives a language model has chosen.
    """
    from embkit.train import Miner

    options = dict(recipes.to_table(recipe)["mine"])
    settings = [
        word for key, value in options.items() for word in ("--set", f"mine.{key}={_toml(value)}")
    ]

    own = dict.fromkeys([*(n for n, t in recipe.tasks.items() if not t.mined), *given])
    plain = recipes.to_table(recipe)["tasks"]
    mined = [name for name in recipe.tasks if name not in own]
    labelled = _labelled(recipe, mined)
    told = {
        **{name: {"negatives": "given"} for name in own},
        **{name: plain[name] for name in labelled},
    }
    if told:
        settings += ["--set", f"tasks={_toml(told)}"]
    if labelled and recipe.data.path is not None:  # where their classes are
        settings += ["--set", f"data.path={_toml(recipe.data.path)}"]

    def command(model: Path, out: Path) -> list[str]:
        words = [sys.executable, "-m", "embkit", "mine", str(model), str(store)]
        return [*words, "--out", str(out), "--recipe", "quickstart", *settings]

    return Miner(command=command, params={**options, **({"given": sorted(own)} if own else {})})


def start_encoder(recipe: Recipe, store: Store, *, model: str | None = None) -> Encoder:
    """The encoder that training starts from: ``model``, the recipe's path, or a new small BERT."""
    from embkit.model import Encoder, Tuning

    t = recipe.tokenizer
    sides: dict[str, Any] = {
        "max_length": {"query": t.max_length_query, "passage": t.max_length_passage},
        "prompts": recipe.encoder_prompts(),
    }
    path = model or recipe.model.path
    if path is None:
        return Encoder.from_config(recipe.model, store.path / "tokenizer", **sides)
    m = recipe.model
    sides |= {"dims": m.dims, "pooling": m.pooling, "tuning": Tuning.from_recipe(m)}
    if t.end_token:  # the model's own tokenizer does not have it
        sides["tokenizer"] = store.path / "tokenizer"
    if not m.include_prompt:
        sides["include_prompt"] = False
    if model is None:  # a model that is given has had its changes
        sides |= {"bidirectional": m.bidirectional, "soft_mask_steps": m.soft_mask_steps}
        sides |= {"keep_layers": m.keep_layers, "new_head": m.new_head, "seed": m.seed}
        sides["projection_hidden"] = m.projection_hidden
    return Encoder.from_pretrained(path, **sides)


def describe(recipe: Recipe, *, out: Path) -> str:
    """The stages with what is there already and their sizes, for ``--dry-run``."""
    data = data_folder(recipe)
    size = sum(p.stat().st_size for p in data.rglob("*") if p.is_file())
    m, t = recipe.model, recipe.tokenizer
    lines = [f"recipe {recipe.name}, data {data} ({size / 1e6:.1f} MB), run directory {out}"]
    parameters = None
    if m.path is None:
        body = m.layers * (4 * m.hidden**2 + 2 * m.hidden * m.intermediate) + m.hidden * max(m.dims)
        parameters = body + t.vocab_size * m.hidden
        lines.append(f"model: BERT, about {parameters / 1e6:.1f} M parameters")
        rate = _measured_flops()
        for name, config, times in (
            ("prefinetune", recipe.prefinetune, 1),
            ("finetune", recipe.finetune, len(recipe.runs)),
        ):
            tokens = config.batch_size * (t.max_length_query + t.max_length_passage)
            flops = 6 * body * tokens * config.steps
            states = 4 * (4 * parameters + tokens * m.hidden * (14 * m.layers + 4))
            lines.append(
                f"{name}: {times} x {config.steps} steps of {config.batch_size} rows, at most "
                f"{times * flops / rate:.0f} s of arithmetic here, {states / 2**30:.1f} GiB"
            )
    if asking(recipe):
        lines += costs(recipe, training_files(data, needed=not recipe.synth.on), out)
    for name in stages_of(recipe):
        there = any(any(out.glob(pattern)) for pattern in _OUTPUTS[name])
        lines.append(
            f"  {name:<12} {', '.join(_OUTPUTS[name]):<16} {'there' if there else 'to do'}"
        )
    return "\n".join(lines)


def explain(source: Path | str, *, overrides: Sequence[str] = (), ranks: int = 1) -> str:
    """The resolved recipe with the origin of each value, and who is a negative of whom.

    Args:
        source: a recipe's file, or the name of a built-in one. overrides: as for `--set`.
        ranks: processes that train together.

    Raises:
        UsageError: ranks that are none.
    """
    from embkit.losses import explain as candidates

    if ranks < 1:
        raise UsageError(f"--ranks {ranks}.", fix="give the number of processes, from 1")

    file = recipes.read_table(source)
    table: dict[str, Any] = {}
    for item in overrides:
        recipes.apply_override(table, item)
    resolved = recipes.load(source, overrides=overrides)
    lines = []
    for section, value in recipes.to_table(resolved).items():
        if not isinstance(value, dict):
            lines.append(f"{section} = {json.dumps(value)}  # {_origin((section,), table, file)}")
            continue
        lines.append(f"[{section}]")
        for key, item in value.items():
            origin = _origin((section, key), table, file)
            lines.append(f"{key} = {json.dumps(item)}  # {origin}")
    tasks, complete = known_tasks(resolved)
    lines += ["", "Who is a negative of whom:"]
    for stage_name, config in (
        ("prefinetune", resolved.prefinetune),
        ("finetune", resolved.finetune),
    ):
        mined = stage_name == "finetune"  # comes after mining
        about = {n: dataclasses.replace(t, mined=t.mined and mined) for n, t in tasks.items()}
        told = candidates(config, about, complete=complete, ranks=ranks)
        lines += [f"[{stage_name}]", told]
    return "\n".join(lines)


def known_tasks(recipe: Recipe) -> tuple[dict[str, Known], bool]:
    """The tasks of a recipe as `embkit explain` tells of them, and whether there are no others.

    Those of its data folder, whose kinds the first rows say; without one, those that it names.
    """
    from embkit.data.sources import find, kind_of, of_tasks
    from embkit.losses import Known

    def about(name: str, kind: str) -> Known:
        task = recipe.tasks.get(name, Task())
        return Known(kind=kind, rule=task.convert.rule, mined=task.mined)

    try:
        files = training_files(data_folder(recipe), needed=not recipe.synth.on)
    except (UsageError, OSError):
        named = {n: recipes.RULES.get(t.convert.rule, t.kind) for n, t in recipe.tasks.items()}
        return {n: about(n, kind) for n, kind in named.items() if kind != "auto"}, False
    made = written_tasks(recipe)
    own = {name: task for name, task in recipe.tasks.items() if name not in made}
    sources = of_tasks(find(files, task=None, kind="auto"), own) if files else []
    found = {s.task: about(s.task, kind_of(s)) for s in sources}
    return found | {name: about(name, kind) for name, kind in made.items()}, True


def _origin(keys: tuple[str, ...], overrides: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    for table, name in ((overrides, "--set"), (file, "recipe")):
        at: Any = table
        for key in keys:
            at = at.get(key) if isinstance(at, Mapping) else None
        if at is not None:
            return name
    return "default"


def _measured_flops() -> float:
    """float32 matrix-product rate of this machine, FLOP/s, in a fraction of a second."""
    import torch

    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 1024**3 / (time.perf_counter() - started)


def _place(stage: str | None) -> int | None:
    """Where a stage stands among all."""
    if stage is not None and stage not in _EVERY:
        raise UsageError(f"There is no stage {stage!r}; {nearest(stage, _EVERY)}")
    return None if stage is None else _EVERY.index(stage)


def _clear(out: Path, from_stage: str | None) -> None:
    """Remove the outputs of a stage and of all after it."""
    for name in reversed(() if from_stage is None else _EVERY[_place(from_stage) :]):
        for pattern in _OUTPUTS[name]:
            for path in [*out.glob(pattern), *out.glob(f".partial-{pattern}-*")]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)


def _checked(encoder: Encoder, exported: Path, texts: list[str]) -> dict[str, float | None]:
    """How much the exported model differs, and how much it may.

    That is 2e-6, or what the encoder differs from itself when it takes the texts one by one: in 30
    layers of a real language model the rounding of float32 comes to 3e-5.
    """
    import numpy as np

    from embkit.model import check_export

    difference, limit = check_export(encoder, exported, texts), 2e-6
    if difference is not None and difference > limit:
        prompt = encoder.prompts["passage"]
        longest = len(texts) * max(encoder.max_length.values())
        together = encoder.encode(texts, prompt=prompt, token_budget=longest)
        alone = np.concatenate([encoder.encode([text], prompt=prompt) for text in texts])
        limit = max(limit, float(np.abs(together - alone).max()))
    return {"max_abs_difference": difference, "limit": limit}


def _sample_texts(data: Path) -> list[str]:
    """Some real texts of several lengths, to compare the export on."""
    from embkit.evaluate.tasks import load_split

    columns = ("queries", "corpus", "first", "test")
    sets = load_split(data / "test")
    return [text for found in sets for name in columns for text in getattr(found, name, [])[:16]]


def _toml(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _publish_json(path: Path, content: Mapping[str, Any]) -> None:
    from embkit import _rust

    _rust.publish_file(str(path), (json.dumps(content, indent=1) + "\n").encode())
