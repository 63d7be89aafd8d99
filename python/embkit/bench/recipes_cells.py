"""Cells of the group `recipes`: one training with one seed, scored, kept as a JSON file.

A cell is found again by the digest of what decides it, so a table that was interrupted goes on
where it stopped, and tables share cells. Everything before it (store, start model, mined negatives)
is a stage of embkit, which is resumed likewise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import _rust
from embkit.bench import recipes_data as real
from embkit.bench import recipes_peer as peer
from embkit.bench.recipes_peer import cpu
from embkit.evaluate.tasks import EvalSet, load_split

if TYPE_CHECKING:
    from embkit.model import Encoder

VERSION = 1  # of what a cell does
PROBE = 40  # steps from which the cost of a step is taken: tasks differ by much


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all cells of a table have in common.

    Attributes:
        pre: tasks of the pre-finetuning. fine: retrieval tasks of the fine-tuning. sts, labels:
            its other tasks.
        model: sizes of the encoder (:class:`embkit.recipe.Model`). vocab, query, passage: its
            vocabulary and longest texts, in tokens.
        prefinetune: settings of the pre-finetuning. finetune: of every cell.
        rules: of the mining.
    """

    pre: tuple[str, ...]
    fine: tuple[str, ...]
    sts: tuple[str, ...]
    labels: tuple[str, ...]
    model: Mapping[str, Any]
    vocab: int
    query: int
    passage: int
    prefinetune: Mapping[str, Any]
    finetune: Mapping[str, Any]
    rules: Mapping[str, Any]

    def shares(
        self, retrieval: float = 0.6, sts: float = 0.2, labels: float = 0.2
    ) -> dict[str, float]:
        """Mixture weights: so much for each kind, the tasks of a kind alike."""
        found: dict[str, float] = {}
        for tasks, share in ((self.fine, retrieval), (self.sts, sts), (self.labels, labels)):
            found |= {task: share / len(tasks) for task in tasks if share}
        return found

    def mixture(self, rule: str, sizes: Mapping[str, int]) -> dict[str, float]:
        """Weights by a rule: uniform; size, by examples; or "size, SHARE", that share for the
        retrieval tasks by the root of their examples, the rest for sentences and labels alike."""
        names = (*self.fine, *self.sts, *self.labels)
        if rule == "uniform":
            return dict.fromkeys(names, 1.0)
        if rule == "size":
            return {task: float(sizes[task]) for task in names}
        share = float(rule.split(",")[1])
        roots = {task: sizes[task] ** 0.5 for task in self.fine}
        total = sum(roots.values())
        return self.shares(share, (1 - share) / 2, (1 - share) / 2) | {
            task: share * root / total for task, root in roots.items()
        }


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its scores.

    Attributes:
        train: settings over the plan's ``finetune``; ``first`` in it are those of a stage before
            it, over the plan's ``prefinetune``, with its ``share`` of the budget. seed: of both.
        form: of the store: plain, or a variant of :meth:`World.store`.
        start: "random", "pre", or "pre-FORM", pre-finetuned on that form of the store. mined:
            whether negatives are mined.
        widths: trained in place of the plan's. dims: scored; the full width when empty.
        budget: CPU seconds for tokenization and training, whose steps are then set by a probe,
            unless the settings say them; 0 takes the steps of the settings.
        soup: seeds whose runs are averaged, with no training of its own.
        peer: settings of sentence-transformers in place of ``train``.
        split: whose sets are scored.
    """

    train: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    form: str = "plain"
    start: str = "pre"
    mined: bool = True
    widths: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    budget: float = 0.0
    soup: tuple[int, ...] = ()
    peer: Mapping[str, Any] | None = None
    split: str = "dev"


class World:
    """Data, stores, start models and cells of a plan in one folder."""

    def __init__(self, home: Path, data: Path, plan: Plan) -> None:
        self.home, self.data, self.plan = home, data, plan
        self._sets: dict[str, list[EvalSet]] = {}

    # ------------------------------------------------------------ before the cells

    def folder(self, form: str) -> Path:
        """The data folder of a form of the store."""
        changes: dict[str, Callable[..., Any]] = {"noisy": real.noisy, "few": real.few}
        if form not in changes:
            return self.data
        return real.variant(self.data, self.home / f"data-{form}", form, changes[form])

    def clean(self, form: str) -> Path:
        """Records without near-duplicates and without texts of dev/ and test/."""
        from embkit import data

        base = {"prompted": "plain", "filtered": "noisy"}.get(form, form)
        folder = self.folder(base)
        files = sorted(str(p) for p in (folder / "train").iterdir())
        records = data.read(files).save(self.home / f"records-{base}")
        against = [folder / "dev", folder / "test"]
        out = self.home / f"clean-{base}"
        found = data.dedup(records, out=out, against=against)
        if form != "filtered":
            return found.dir
        score = data.ScoreFilter(model=str(self.start("pre")), threshold=0.4)
        return data.filter(found, out=self.home / "filtered", rules="off", score=score).dir

    def store(self, form: str) -> Path:
        """The token store: plain; prompted, with one format of queries and passages; noisy, with
        wrong positives; filtered, noisy behind the score filter; few, with few examples."""
        from embkit import data

        options: dict[str, Any] = {"vocab_size": self.plan.vocab}
        if form != "plain":
            options = {"tokenizer": self.store("plain") / "tokenizer"}
        if form == "prompted":
            options["prompts"] = {
                "query": "task: search result | query: ",
                "passage": "title: none | text: ",
            }
        options["max_length_query"] = self.plan.query
        options["max_length_passage"] = self.plan.passage
        out, clean = self.home / f"store-{form}", self.clean(form)
        self._timed(out, lambda: data.tokenize(clean, out=out, **options))
        return out

    def start(self, name: str) -> Path:
        """The model that cells start from."""
        from embkit.model import Encoder
        from embkit.recipe import Model, Train
        from embkit.stage import stage
        from embkit.train import prefinetune

        out = self.home / "random"
        with stage(
            out, name="init", params=dict(self.plan.model), inputs=[self.store("plain")]
        ) as work:
            if not work.done:
                lengths = {"query": self.plan.query, "passage": self.plan.passage}
                tokenizer = self.store("plain") / "tokenizer"
                model = Model(**self.plan.model, projection=False)
                Encoder.from_config(model, tokenizer, max_length=lengths).export(work.dir / "model")
                work.publish()
        if name == "random":
            return out / "model"
        config = Train(**self.plan.prefinetune, tasks=dict.fromkeys(self.plan.pre, 1.0))
        begin, trained = Encoder.from_pretrained(out / "model"), self.home / name
        store = self.store(name.removeprefix("pre").removeprefix("-") or "plain")
        self._timed(trained, lambda: prefinetune(begin, store, out=trained, config=config))
        return trained / "model"

    def mined(self, form: str) -> Path:
        """Hard negatives of the fine-tuning tasks, mined with the pre-finetuned model."""
        from embkit.data import Store
        from embkit.mine import mine
        from embkit.model import Encoder

        store, out = self.store(form), self.home / f"mined-{form}"
        names = Store(store).task_names
        encoder = Encoder.from_pretrained(self.start("pre"))
        encoder.adopt_prompts(Store(store).prompts, {})
        tasks = [task for task in self.plan.fine if task in names]
        rules = dict(self.plan.rules)
        self._timed(out, lambda: mine(encoder, store, out=out, tasks=tasks, **rules))
        return out

    def _timed(self, out: Path, work: Callable[[], Any]) -> None:
        """Do it, and keep the CPU seconds of the time when it was done."""
        kept, begun = out.with_name(out.name + ".cpu.json"), cpu()
        there = out.exists() and kept.exists()
        work()
        if not there:
            kept.write_text(json.dumps({"cpu": round(cpu() - begun, 2)}))

    def tokenizing(self) -> float:
        """CPU seconds of tokenization with the start model's tokenizer, of all texts."""
        from embkit import data

        out, tokenizer = self.home / "again", self.store("plain") / "tokenizer"
        clean, query, passage = self.clean("plain"), self.plan.query, self.plan.passage
        self._timed(
            out,
            lambda: data.tokenize(
                clean, out=out, tokenizer=tokenizer,
                max_length_query=query, max_length_passage=passage,
            ),
        )  # fmt: skip
        return self.cost(out)

    def cost(self, out: Path) -> float:
        """CPU seconds that an output took when it was made."""
        return float(json.loads(out.with_name(out.name + ".cpu.json").read_text())["cpu"])

    # ------------------------------------------------------------ cells

    @cached_property
    def identity(self) -> str:
        """Digest of the data and of what comes before all cells."""
        from embkit.stage import digest_of

        parts = [VERSION, asdict(self.plan), digest_of(self.store("plain"))]
        parts += [digest_of(self.data / split) for split in ("dev", "test")]
        return _rust.blake3(json.dumps(parts, sort_keys=True).encode())

    def path(self, cell: Cell) -> Path:
        """Where its result is kept."""
        about = json.dumps([self.identity, asdict(cell)], sort_keys=True)
        return self.home / "cells" / f"{_rust.blake3(about.encode())[:20]}.json"

    def result(self, cell: Cell) -> dict[str, Any]:
        """The cell's result; computed when it is not there.

        Returns:
            in percent, ``scores`` by width and kind of task, and ``items`` by width, kind, set and
            query or text to classify (share of the probes that are right); ``cpu`` seconds of
            training and what it needs; ``steps``.
        """
        path = self.path(cell)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            model, about = self.trained(cell)
            found = {"cell": asdict(cell), **about, **self.score(cell, model)}
            _rust.publish_file(str(path), (json.dumps(found) + "\n").encode())
        return dict(json.loads(path.read_text()))

    def score(self, cell: Cell, model: Path) -> dict[str, Any]:
        """Scores of a model on the cell's split, from one encode of each text."""
        from embkit.model import Encoder

        lengths = {"query": self.plan.query, "passage": self.plan.passage}
        encoder = Encoder.from_pretrained(model, max_length=lengths)
        return scores_of(encoder, self.sets(cell.split), cell.dims)

    def sets(self, split: str) -> list[EvalSet]:
        """The sets of a split, read once."""
        if split not in self._sets:
            self._sets[split] = load_split(self.data / split)
        return self._sets[split]

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.home, ignore_errors=True)

    def _config(self, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of its training and of the stage before it, when ``train`` has a ``first``.

        Tasks may be a rule of :meth:`Plan.mixture`; ``first`` also says its share of the budget.
        """
        from embkit.data import Store

        settings = {**self.plan.finetune, **cell.train, "seed": cell.seed}
        first = settings.pop("first", None)
        stages = [settings, {**self.plan.prefinetune, **first, "seed": cell.seed} if first else {}]
        for stage in stages:
            if isinstance(stage.get("tasks"), str):
                sizes = Store(self.store(cell.form)).task_sizes
                stage["tasks"] = self.plan.mixture(stage["tasks"], sizes)
        return stages[0], stages[1]

    def trained(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """The cell's model, with the CPU seconds and steps of its training; scores play no part."""
        cell = replace(cell, split="dev", dims=())
        out = self.home / "runs" / self.path(cell).stem
        kept = out.with_name(out.name + ".json")
        if not kept.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            make = self._soup if cell.soup else self._peer if cell.peer else self._run
            _rust.publish_file(str(kept), json.dumps(make(cell, out)).encode())
        model = out / "model"
        return model if model.is_dir() else out, dict(json.loads(kept.read_text()))

    def _run(self, cell: Cell, out: Path) -> dict[str, Any]:
        """Train with embkit."""
        settings, first = self._config(cell)
        begin, spent, about = self.start(cell.start), 0.0, {"before": 0.0}
        if cell.budget:
            spent = about["before"] = self.tokenizing()
            if "steps" not in cell.train:
                settings["steps"], *earlier = self.steps(cell)
                first |= {"steps": earlier[0]} if earlier else {}
        if first:
            first.pop("share")
            before = out.with_name(out.name + "-first")
            used, _ = self._train(cell, first, before, begin, mined=False)
            begin, spent = before / "model", spent + used
        used, _ = self._train(cell, settings, out, begin, mined=cell.mined)
        steps = settings["steps"] + first.get("steps", 0)
        about |= {"cpu": round(spent + used, 2), "steps": steps}
        if cell.mined:
            about["mining"] = self.cost(self.mined(cell.form))
        return about

    def steps(self, cell: Cell) -> list[int]:
        """Steps of the cell's training, and of the stage before it, that its budget allows.

        From a probe that is made once for all seeds of a setting: give it the machine alone.
        """
        if cell.peer is not None:
            return [self._affordable(cell, dict(cell.peer), cell.budget)]
        settings, first = self._config(cell)
        budget = cell.budget - self.tokenizing()
        share = first.pop("share") if first else 0.0
        out = [self._affordable(cell, settings, (1 - share) * budget)]
        return out + ([self._affordable(cell, first, share * budget)] if first else [])

    def _affordable(self, cell: Cell, settings: dict[str, Any], budget: float) -> int:
        asked = json.dumps([asdict(replace(cell, seed=0, budget=0)), settings | {"seed": 0}])
        out = self.home / "runs" / f"probe-{_rust.blake3(asked.encode())[:16]}"
        kept = out.with_name(out.name + ".json")
        if not kept.is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            probe = {**settings, "steps": PROBE, "seed": 0}
            used, first = (
                self._train(cell, probe, out, self.start(cell.start), mined=cell.mined)
                if cell.peer is None
                else self._trained_by_peer(cell, probe, out)
            )
            kept.write_text(json.dumps([first, (used - first) / (PROBE - 1)]))
        fixed, step = json.loads(kept.read_text())
        return max(1, round((budget - fixed) / step))

    def _train(
        self, cell: Cell, settings: Mapping[str, Any], out: Path, begin: Path, *, mined: bool
    ) -> tuple[float, float]:
        """CPU seconds of a training, and of it until the end of the first step.

        A run that was stopped begins again: what it had used is not known.
        """
        from embkit.model import Encoder
        from embkit.recipe import Train
        from embkit.recipe.schema import build
        from embkit.train import Callback, finetune

        class First(Callback):
            at = 0.0

            def on_step(self, step: int, line: Any, speed: Any) -> None:
                self.at = self.at or cpu()

        options = {"dims": cell.widths} if cell.widths else {}
        negatives = self.mined(cell.form) if mined else None
        store, made = (
            self.store(cell.form),
            build(Train, {"checkpoint_every": 10**6, **settings}, "cell"),
        )
        first, begun = First(), cpu()
        encoder = Encoder.from_pretrained(begin, **options)
        finetune(
            encoder, store, negatives=negatives, out=out, config=made, callbacks=[first], fresh=True
        )
        return cpu() - begun, first.at - begun

    def _soup(self, cell: Cell, out: Path) -> dict[str, Any]:
        """Average the runs of its seeds."""
        from embkit.soup import soup

        members = [self.trained(replace(cell, soup=(), seed=seed)) for seed in cell.soup]
        soup([model.parent for model, _ in members], out=out, select="uniform")
        return {"cpu": sum(about["cpu"] for _, about in members)}

    def _peer(self, cell: Cell, out: Path) -> dict[str, Any]:
        """Train with sentence-transformers."""
        settings = {**dict(cell.peer or {}), "seed": cell.seed}
        if "steps" not in settings:
            settings["steps"] = self.steps(cell)[0]
        used, _ = self._trained_by_peer(cell, settings, out)
        return {"cpu": round(used, 2), "steps": settings["steps"]}

    def _trained_by_peer(
        self, cell: Cell, settings: Mapping[str, Any], out: Path
    ) -> tuple[float, float]:
        """CPU seconds of a training in a process of its own, and until its first step's end."""
        rows = peer.export(self.clean("plain"), self.home / "pairs", self.plan)
        begin, dims = self.start(cell.start), self.plan.model["dims"]
        said = peer.run(begin, rows, out, settings, dims=dims)
        return said["cpu"], said["first"]


def scores_of(encoder: Encoder, sets: Sequence[EvalSet], dims: Sequence[int]) -> dict[str, Any]:
    """Scores, scores by set and items (:meth:`World.result`) at widths; the full one for none."""
    import numpy as np

    from embkit.evaluate import metrics
    from embkit.evaluate.compare import ndcg_of
    from embkit.evaluate.run import MAIN, encode_set, prefix, score_set
    from embkit.evaluate.tasks import ClassificationSet, RetrievalSet

    each: dict[str, dict[str, dict[str, float]]] = {}
    items: dict[str, dict[str, dict[str, list[float]]]] = {}
    for found in sets:
        whole = encode_set(encoder, found, encoder.width)
        for width in dims or (encoder.width,):
            parts = [prefix(p, width) for p in whole]
            values = None
            if isinstance(found, RetrievalSet):
                values = ndcg_of(found, parts)
            if isinstance(found, ClassificationSet):
                hit = metrics.hits(parts[0], found.train_label, parts[1], found.test_label)
                value, values = metrics.mean_accuracy(hit), 100 * hit.mean(axis=0)
            else:
                value = score_set(found, parts)[MAIN[found.type]]
            each.setdefault(str(width), {}).setdefault(found.type, {})[found.name] = value
            if values is not None:
                by_kind = items.setdefault(str(width), {}).setdefault(found.type, {})
                by_kind[found.name] = np.round(values, 4).tolist()
    kinds = {
        width: {kind: float(np.mean(list(sets.values()))) for kind, sets in by_kind.items()}
        for width, by_kind in each.items()
    }
    return {"scores": kinds, "sets": each, "items": items}
