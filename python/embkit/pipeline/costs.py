"""What the stages that ask a language model will cost: requests and tokens, for `--dry-run`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embkit.pipeline.llm import plain_tasks, settings, written_tasks
from embkit.recipe import Recipe, Task

if TYPE_CHECKING:
    from embkit.data import Records
    from embkit.synth.prompts import Step


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
    from embkit.synth.labelled_plan import Plan

    task = recipe.synth.labelled[name]
    plan = Plan(settings(Labelled, task, lists={n: ("",) for n in task.lists}))
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
        for name in recipe.judge.tasks or plain_tasks(recipe, kinds):
            own = tables.get(name)
            self.judged += more.get(name, 0) + (len(own.positive) + len(own.negative) if own else 0)
        mined = [n for n in plain_tasks(recipe, kinds) if recipe.tasks.get(n, Task()).mined]
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
