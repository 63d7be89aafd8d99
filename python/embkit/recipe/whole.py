"""A whole recipe: all its sections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embkit.recipe.data import Data, Dedup, Filter, Tokenizer
from embkit.recipe.llm import JudgeStage, Llm, RelabelStage, Synth
from embkit.recipe.mine import Rules
from embkit.recipe.mix import Mix
from embkit.recipe.model import Model
from embkit.recipe.schema import build, one_of, plain, require
from embkit.recipe.tasks import Task
from embkit.recipe.train import Train


@dataclass(frozen=True, kw_only=True)
class Soup:
    """How fine-tuned runs are merged, judged on the dev sets (docs/soup.md).

    Attributes:
        select: "greedy", "uniform", "slerp", or "search", which looks for weights.
        alpha: how far from the model that fine-tuning began with to their average: 1 is the
            average; of several the best on dev is taken.
        candidates: weights that "search" tries, beside each run alone and their mean.
        method: "grid" around equal weights, "dirichlet" draws, or "bayes", which goes on from
            ``initial`` draws where a model of the scores expects the most.
        factors: by which the grid changes weights, first of one run, then of two ...
        initial: draws before the model of "bayes".
        concentration: of the Dirichlet distribution; 1 is uniform, more is nearer to equal shares.
        seed: of the draws.
    """

    select: str = "greedy"
    alpha: tuple[float, ...] = (1.0,)
    candidates: int = 16
    method: str = "bayes"
    factors: tuple[float, ...] = (2.0, 0.5)
    initial: int = 4
    concentration: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("soup.select", self.select, ("greedy", "uniform", "slerp", "search"))
        one_of("soup.method", self.method, ("grid", "dirichlet", "bayes"))
        require(
            min(self.candidates, self.initial) > 0 and len(self.alpha) > 0,
            f"soup.candidates = {self.candidates}, initial = {self.initial}, alpha = "
            f"{list(self.alpha)}: one is out of range.",
            "candidates and initial are at least 1, alpha has a number or more",
        )
        require(
            self.concentration > 0 and all(f > 0 and f != 1 for f in self.factors),
            f"soup.concentration = {self.concentration}, factors = {list(self.factors)}: one is "
            "out of range.",
            "give numbers above 0, and no factor of 1",
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluation: bm25 also scores BM25 on the retrieval sets."""

    bm25: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, from raw text to exported model.

    Attributes:
        name: for titles and the model card.
        llm, synth, judge, relabel: what a language model does; nothing by default.
        tasks: what is said of single tasks, by the names of their files in train/.
        finetune: the common settings of the fine-tuning runs.
        mix: search of the mixture; its best then are the runs.
        runs: one table per fine-tuning run, with the settings in which it differs (seed, lr ...).
    """

    name: str = "quickstart"
    data: Data = field(default_factory=Data)
    llm: Llm = field(default_factory=Llm)
    synth: Synth = field(default_factory=Synth)
    tasks: Mapping[str, Task] = field(default_factory=dict)
    dedup: Dedup = field(default_factory=Dedup)
    filter: Filter = field(default_factory=Filter)
    judge: JudgeStage = field(default_factory=JudgeStage)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    prefinetune: Train = field(default_factory=Train)
    mine: Rules = field(default_factory=Rules)
    relabel: RelabelStage = field(default_factory=RelabelStage)
    mix: Mix = field(default_factory=Mix)
    finetune: Train = field(default_factory=Train)
    runs: tuple[Mapping[str, Any], ...] = ({"seed": 0},)
    soup: Soup = field(default_factory=Soup)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def __post_init__(self) -> None:
        require(bool(self.runs), "The recipe has no [[runs]].", "add at least one, e.g. seed = 0")
        for i in range(len(self.runs)):
            self.run_config(i)
        marked = [name for name, task in self.tasks.items() if task.convert.unique_id]
        require(
            not marked or self.dedup.action == "mark",
            f"tasks.{''.join(marked[:1])} has unique ids, and dedup.action = {self.dedup.action!r} "
            "takes texts that differ in nothing else for one.",
            'set dedup.action = "mark", or losses.TASK.in_batch = false in the place of ids',
        )
        asking = [n for n in ("synth", "judge", "relabel") if getattr(self, n).on]
        require(
            not asking or self.llm.model is not None,
            f"The recipe has {' and '.join(asking)}, and no language model.",
            "set llm.model to the address of a server or to a model directory",
        )
        require(
            not self.mix.on or not self.finetune.parts,
            "mix.candidates asks for a search, and finetune.parts give each part its own tasks.",
            "leave mix or parts out",
        )

    def run_config(self, i: int) -> Train:
        """The settings of fine-tuning run ``i``: ``finetune`` with ``runs[i]`` over it."""
        return build(
            Train,
            {**plain(self.finetune), **self.runs[i]},
            f"runs[{i}]",
        )

    def encoder_prompts(self) -> dict[str, str]:
        """Prompts of the encoder: of query and passage, and of other kinds where there are any.

        Evaluation puts those of sts and classification before the texts of such sets.
        """
        of_kind = {k: self.tokenizer.prompts(k)["text"] for k in ("sts", "classification")}
        return self.tokenizer.prompts("retrieval") | {k: t for k, t in of_kind.items() if t}

    def task_prompts(self, kinds: Mapping[str, str]) -> dict[str, dict[str, str]]:
        """Prompts of the tasks that have others than the encoder's query and passage, or a text.

        Args:
            kinds: of the tasks that there are, by name.
        """
        both = self.tokenizer.prompts("retrieval")
        found = {
            name: self.tasks.get(name, Task()).prompts(kind, self.tokenizer)
            for name, kind in kinds.items()
        }
        own = {name: p for name, p in found.items() if p not in (both, {"text": ""})}
        return {**own, **{name: dict(p) for name, p in self.tokenizer.task_prompts.items()}}
