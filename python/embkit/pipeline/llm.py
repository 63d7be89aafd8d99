"""Stages of `embkit run` that ask a language model: synth, judge, relabel.

The model is opened when a stage has something to ask, and forgotten after it: a run goes on without
the server that has written its data, and trains without the model in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError
from embkit.recipe import Recipe, Task

if TYPE_CHECKING:
    from embkit.data import Records, Store
    from embkit.data.sources import Source
    from embkit.synth import Labelled, Write

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
        ask: whether this process may ask; the others of a run find what was made.
    """

    def __init__(self, recipe: Recipe, out: Path, *, ask: bool = True) -> None:
        from embkit.synth.deferred import Deferred
        from embkit.synth.spent import Spent

        self.recipe, self.out = recipe, out
        self.spent = Spent(out / "llm-usage.json")
        self.llm = Deferred(recipe.llm, out / "llm.json", spent=self.spent, ask=ask)

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
            for prompt in settings(Judge, recipe.judge).prompts:
                load(prompt).graded  # noqa: B018  a wrong one raises
        if recipe.relabel.on:
            how_relabel = settings(Relabel, recipe.relabel)
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
        from embkit.data.sources import written_in
        from embkit.synth import write_labelled, write_queries

        self.llm.stage = "synth"
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
        return [source for records in made for source in written_in(records.dir)]

    def judge(self, records: Records) -> Records:
        """The records without the pairs that the model finds bad."""
        from embkit.synth import Judge, judge

        kinds = {task["name"]: task["kind"] for task in records.manifest["tasks"]}
        tasks = self.recipe.judge.tasks or tuple(plain_tasks(self.recipe, kinds))
        how = settings(Judge, self.recipe.judge, tasks=tasks)
        self.llm.stage = "judge"
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

        how = settings(Relabel, self.recipe.relabel, tasks=tuple(tasks))
        self.llm.stage = "relabel"
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

        return settings(Write, self.recipe.synth)

    def _labelled(self, name: str) -> Labelled:
        from embkit.synth import Labelled
        from embkit.synth.labelled_plan import Plan
        from embkit.synth.passages import read_lines

        task = self.recipe.synth.labelled[name]
        lists = {n: read_lines(path) for n, path in task.lists.items()}
        how = settings(Labelled, task, lists=lists)
        Plan(how)  # checks labels, lists and controls
        return how

    def _personas(self) -> Any:
        from embkit.synth import Personas

        path = self.recipe.synth.personas
        return None if path is None else Personas.read(path)


def settings(kind: Any, section: Any, **more: Any) -> Any:
    """A stage's settings from a section of the recipe, whose names are the same."""
    names = {field.name for field in dataclasses.fields(kind)}
    given = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if field.name in names
    }
    return kind(**{**given, **more})


def plain_tasks(recipe: Recipe, kinds: Mapping[str, str]) -> list[str]:
    """The retrieval tasks that are no converted labelled sets: pairs that can be relevant."""
    return [
        name
        for name, kind in kinds.items()
        if kind == "retrieval" and not recipe.tasks.get(name, Task()).convert.on
    ]
