"""Stages of `embkit run` that ask a language model: synth, judge, relabel; and what they will cost.

The model is opened when a stage has something to ask, and forgotten after it: a run goes on without
the server that has written its data, and trains without the model in memory.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError
from embkit.recipe import Recipe, Task

if TYPE_CHECKING:
    from embkit.data import Records, Store
    from embkit.data.sources import Source
    from embkit.synth import Labelled, Write
    from embkit.synth.prompts import Step

STAGES = ("synth", "judge", "relabel")


def asking(recipe: Recipe) -> list[str]:
    """The stages of a recipe that ask a language model."""
    return [name for name in STAGES if getattr(recipe, name).on]


def written_tasks(recipe: Recipe) -> dict[str, str]:
    """Tasks that the language model writes and their kinds."""
    from embkit.synth.prompts import load

    s = recipe.synth
    queries = {s.task: "retrieval"} if s.passages is not None else {}
    return queries | {name: load(one.prompt).kind for name, one in s.labelled.items()}


class Asking:
    """The language model of a run and the stages that ask it.

    Args:
        recipe: with at least one of these stages. out: the run directory.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        from embkit.synth.deferred import Deferred

        self.recipe, self.out = recipe, out
        self.llm = Deferred(recipe.llm, out / "llm.json")

    def check(self, *, anew: bool = False) -> None:
        """Find out what would stop the run later: settings, prompts, files, what the model can do.

        Args:
            anew: the model may be another than before: all that it made is made again.

        Raises:
            UsageError, FileNotFoundError, BackendError: as the stages would.
        """
        from embkit.synth import Judge, Relabel
        from embkit.synth.llm import LOGLIKELIHOOD
        from embkit.synth.prompts import load

        recipe = self.recipe
        if anew:
            self.llm.renew()
        if recipe.synth.passages is not None:
            how = self._write()
            load(how.prompt)
            if not Path(recipe.synth.passages).exists():
                raise FileNotFoundError(2, "No such passages", recipe.synth.passages)
            self._personas()
        for name in recipe.synth.labelled:
            self._labelled(name)
        if recipe.judge.on:
            for prompt in _settings(Judge, recipe.judge).prompts:
                load(prompt).graded  # noqa: B018  a wrong one raises
        if recipe.relabel.on:
            how_relabel = _settings(Relabel, recipe.relabel)
            load(how_relabel.likelihood)
            load(how_relabel.relevance).graded  # noqa: B018
            if LOGLIKELIHOOD not in self.llm.capabilities:
                raise UsageError(
                    f"{self.llm.name} gives no log-likelihoods, which relabelling needs.",
                    where=recipe.llm.model,
                    fix="take a model directory, or a server with echo and logprobs",
                )
        self.llm.about  # noqa: B018  asks a server once, before anything is trained
        self.llm.release()

    def write(self) -> list[Source]:
        """Queries and labelled texts, each in a directory; as sources to read."""
        from embkit.data.sources import Source
        from embkit.synth import write_labelled, write_queries

        s, made = self.recipe.synth, []
        if s.passages is not None:
            made.append(
                write_queries(
                    Path(s.passages),
                    llm=self.llm,
                    out=self.out / f"synth-{s.task}",
                    how=self._write(),
                    task=s.task,
                    personas=self._personas(),
                )  # fmt: skip
            )
        for name in s.labelled:
            made.append(
                write_labelled(
                    llm=self.llm,
                    out=self.out / f"synth-{name}",
                    how=self._labelled(name),
                    task=name,
                )  # fmt: skip
            )
        self.llm.release()
        # The source's name is who wrote it: it goes with every example.
        return [
            Source("jsonl", of["name"], of["task"], of["kind"], records.dir / "examples.jsonl")
            for records in made
            for of in records.manifest["sources"]
        ]

    def judge(self, records: Records) -> Records:
        """The records without the pairs that the model finds bad."""
        from embkit.synth import Judge, judge

        kinds = {task["name"]: task["kind"] for task in records.manifest["tasks"]}
        tasks = self.recipe.judge.tasks or tuple(_plain(self.recipe, kinds))
        how = _settings(Judge, self.recipe.judge, tasks=tasks)
        done = judge(records, llm=self.llm, out=self.out / "judged", how=how)
        self.llm.release()
        return done

    def relabel(
        self, embedder: Any, records: Records, store: Store, mined: Path | None,
        tasks: Sequence[str], options: Mapping[str, Any],
    ) -> tuple[Store, Path | None]:  # fmt: skip
        """The store to fine-tune on, and the mined negatives of the other tasks in it.

        Args:
            embedder: trained on the store of these records.
            records: what the store was made of. mined: on that store.
            tasks: that are relabelled. options: of tokenization, but the tokenizer.
        """
        from embkit import data
        from embkit.mine.carry import carry
        from embkit.synth import Relabel, relabel

        how = _settings(Relabel, self.recipe.relabel, tasks=tuple(tasks))
        chosen = relabel(
            records, model=embedder, llm=self.llm, out=self.out / "relabelled", how=how
        )
        self.llm.release()
        # The store's tokenizer has the end token already.
        same = {**options, "tokenizer": store.tokenizer, "end_token": ""}
        new = data.tokenize(chosen, out=self.out / "store-relabelled", **same)
        if mined is None:
            return new, None
        return new, carry(mined, store, new, out=self.out / "mined-relabelled")

    def reports(self) -> dict[str, Any]:
        """What the stages have counted, by stage."""

        def report(folder: str) -> Any:
            return json.loads((self.out / folder / "report.json").read_text(encoding="utf-8"))

        synth = {name: report(f"synth-{name}") for name in written_tasks(self.recipe)}
        return {
            **({"synth": synth} if synth else {}),
            **({"judge": report("judged")} if self.recipe.judge.on else {}),
            **({"relabel": report("relabelled")} if self.recipe.relabel.on else {}),
        }

    def _write(self) -> Write:
        from embkit.synth import Write

        return _settings(Write, self.recipe.synth)

    def _labelled(self, name: str) -> Labelled:
        from embkit.synth import Labelled
        from embkit.synth.labelled import Plan
        from embkit.synth.passages import read_lines

        task = self.recipe.synth.labelled[name]
        lists = {n: read_lines(path) for n, path in task.lists.items()}
        how = _settings(Labelled, task, lists=lists)
        Plan(how)  # checks labels, lists and controls
        return how

    def _personas(self) -> Any:
        from embkit.synth import Personas

        path = self.recipe.synth.personas
        return None if path is None else Personas.read(path)


def _settings(kind: Any, section: Any, **more: Any) -> Any:
    """A stage's settings from a section of the recipe, whose names are the same."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if field.name in names
    }
    return kind(**{**given, **more})


def _plain(recipe: Recipe, kinds: Mapping[str, str]) -> list[str]:
    """The retrieval tasks that are no converted labelled sets: pairs that can be relevant."""
    return [
        name
        for name, kind in kinds.items()
        if kind == "retrieval" and not recipe.tasks.get(name, Task()).convert.on
    ]


# ---------------------------------------------------------------- costs


@dataclasses.dataclass
class Cost:
    """Requests and tokens of a stage, four bytes a token; answers as long as they may be."""

    requests: float = 0.0
    read: float = 0.0
    written: float = 0.0

    def ask(self, step: Step, times: float, texts: float, *, answers: int = 0) -> None:
        """Add a step asked ``times``, with ``texts`` bytes of data in each.

        Args:
            answers: labels that are scored in the place of an answer that is written.
        """
        shown = len(step.render(_Blank()).encode()) + texts
        each = times * max(answers, 1)
        self.requests += each
        self.read += each * shown / 4
        self.written += 0 if answers else each * step.max_tokens

    def __str__(self) -> str:
        return (
            f"at most {self.requests:,.0f} requests, {self.read:,.0f} tokens to read, "
            f"{self.written:,.0f} to write"
        )


class _Blank(dict[str, str]):
    """Every variable is there, and empty."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return ""


def costs(recipe: Recipe, files: Sequence[str], out: Path) -> list[str]:
    """A line for each stage that asks a language model: what it will ask, at the most.

    Args:
        files: of train/. out: the run directory; records that are there are counted, else the
            files are read.
    """
    from embkit import data

    lines = []
    queries = 0
    if recipe.synth.passages is not None:
        cost, queries = _cost_of_queries(recipe)
        lines.append(f"synth, {recipe.synth.task}: {queries:,} queries; {cost}")
    for name, task in recipe.synth.labelled.items():
        lines.append(f"synth, {name}: {task.examples:,} texts; {_cost_of_texts(recipe, name)}")
    if not (recipe.judge.on or recipe.relabel.on):
        return lines
    with tempfile.TemporaryDirectory() as scratch:
        records = next(
            (
                data.Records.open(out / name)
                for name in ("filtered", "clean", "records")
                if (out / name / "manifest.json").is_file()
            ),
            None,
        )
        if records is not None:
            queries = 0  # they are among these
        elif files:
            made = written_tasks(recipe)
            tasks = {name: task for name, task in recipe.tasks.items() if name not in made}
            found = data.read(list(files), max_rejected=recipe.data.max_rejected, tasks=tasks)
            records = found.save(Path(scratch) / "records")
        pairs = _Pairs(records, recipe, queries)
        if recipe.judge.on:
            lines.append(f"judge: {pairs.judged:,} pairs; {pairs.judge()}")
        if recipe.relabel.on:
            n = recipe.relabel.candidates
            lines.append(
                f"relabel: {pairs.relabelled:,} queries with {n} passages; {pairs.relabel()}"
            )
    return lines


def _cost_of_queries(recipe: Recipe) -> tuple[Cost, int]:
    from embkit.synth.passages import read_passages
    from embkit.synth.prompts import load

    s = recipe.synth
    texts, _, _ = read_passages(Path(str(s.passages)))
    taken = min(s.sample or len(texts), len(texts))
    items = taken * s.per_passage
    size = sum(len(text.encode()) for text in texts) / len(texts)
    cost = Cost()
    for step in load(s.prompt).steps:
        cost.ask(step, items, size)
    if s.rater is not None:
        step = load(s.rater).graded
        cost.ask(step, items, size, answers=len(step.labels))
    return cost, items


def _cost_of_texts(recipe: Recipe, name: str) -> Cost:
    from embkit.synth import Labelled
    from embkit.synth.labelled import Plan

    task = recipe.synth.labelled[name]
    plan = Plan(_settings(Labelled, task, lists={n: ("",) for n in task.lists}))
    cost = Cost()
    entries: dict[str, int] = {}
    for listing in plan.prompt.lists:
        above = plan.parent(listing)
        calls = listing.calls * entries.get(above, 1)
        entries[listing.name] = calls * max(1, round(listing.items * listing.tail))
        if listing.name not in plan.given:
            cost.ask(listing, calls, 0)
    for step in plan.prompt.steps:
        cost.ask(step, plan.requests, 100)
    if plan.how.judge and plan.prompt.judge is not None:
        labels = len(plan.prompt.judge.labels)
        cost.ask(plan.prompt.judge, plan.requests * plan.texts, 200, answers=labels)
    return cost


class _Pairs:
    """What judge and relabel will see: counts of pairs and sizes of texts."""

    def __init__(self, records: Records | None, recipe: Recipe, queries: int) -> None:
        """``queries`` are still to be written, and go to their task."""
        tables = {} if records is None else records.tasks()
        kinds = {name: table.kind for name, table in tables.items()}
        more = {recipe.synth.task: queries} if queries else {}
        kinds |= dict.fromkeys(more, "retrieval")
        self.judged = self.relabelled = 0
        for name in recipe.judge.tasks or _plain(recipe, kinds):
            own = tables.get(name)
            self.judged += more.get(name, 0) + (len(own.positive) + len(own.negative) if own else 0)
        mined = [n for n in _plain(recipe, kinds) if recipe.tasks.get(n, Task()).mined]
        for name in recipe.relabel.tasks or mined:
            self.relabelled += more.get(name, 0) + (len(tables[name]) if name in tables else 0)
        # Bytes of a query and a passage.
        self.size = 200.0 if records is None else 2.0 * float(records.texts.lengths().mean())
        self.recipe = recipe

    def judge(self) -> Cost:
        from embkit.synth.prompts import load

        cost = Cost()
        for prompt in self.recipe.judge.prompts:
            step = load(prompt).graded
            cost.ask(step, self.judged, self.size, answers=len(step.labels))
        return cost

    def relabel(self) -> Cost:
        from embkit.synth.prompts import load

        r, cost = self.recipe.relabel, Cost()
        pairs = self.relabelled * r.candidates
        cost.ask(load(r.likelihood).steps[0], pairs, self.size, answers=1)
        step = load(r.relevance).graded
        cost.ask(step, pairs, self.size, answers=len(step.labels))
        return cost
