"""Tasks of a recipe: how their data become examples, and which prompts stand before their texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embkit.recipe.prompts import FORMATS, prompt
from embkit.recipe.schema import one_of, require

if TYPE_CHECKING:
    from embkit.recipe.data import Tokenizer

KINDS = ("retrieval", "sts", "classification")
# Rule of a conversion -> the kind of the examples that it makes.
RULES = {
    "classes": "retrieval",
    "label-names": "retrieval",
    "pairs": "retrieval",
    "pair-scores": "sts",
    "scored-pairs": "retrieval",
    "bitext": "retrieval",
    "nli": "retrieval",
    "reranking": "retrieval",
    "title-body": "retrieval",
}


_WITH_NEGATIVES = ("classes", "label-names", "pairs", "nli", "reranking")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How the rows of a labelled set become training examples (docs/conversions.md).

    Attributes:
        rule: ``"off"``, or one of :data:`RULES`.
        columns: names of the set's columns where they are not among those that are known, e.g.
            ``{sentence1 = "premise_text"}``.
        names: what a label stands for: of label-names the text of each class; of nli
            "entailment", "neutral" or "contradiction"; of pairs and pair-scores "1" or "0".
        negatives: hard negatives of an example; None is 1 for classes and all for label-names.
        min_score: of scored-pairs, the least score of a pair that is kept; of reranking with
            graded documents, the least grade of a positive (None: any above 0).
        unique_id: of classes, put an id that an example has alone behind its texts (Gecko).
        seed: of what is drawn.
    """

    rule: str = "off"
    columns: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    negatives: int | None = None
    min_score: float | None = None
    unique_id: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("convert.rule", self.rule, ("off", *RULES))
        require(
            self.negatives is None or self.negatives >= 0,
            f"convert.negatives = {self.negatives} is negative.",
            "give 0 or more",
        )
        require(
            self.rule != "scored-pairs" or self.min_score is not None,
            "convert.rule = 'scored-pairs' keeps the pairs above a score, and there is none.",
            "set min_score on the set's own scale, e.g. 4.0 of 0 to 5",
        )

    @property
    def on(self) -> bool:
        """Whether anything is converted."""
        return self.rule != "off"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: a file of train/ by its name without suffixes.

    Attributes:
        kind: of its rows, ``"auto"`` by their columns, retrieval, sts or classification.
        description: what the format puts for ``{task}``, e.g. "question answering".
        format: of its prompts, a name in :data:`FORMATS`; None takes ``tokenizer.format``.
        symmetric: both sides of a retrieval task take the prompt of the query.
        prompt_query, prompt_passage: the prompts themselves instead; of sts and classification
            prompt_query stands before all texts.
        convert: how its rows become examples.
        negatives: of a retrieval task, "mined", or those "given" with its rows; "auto" is given
            where a conversion has made them.
    """

    kind: str = "auto"
    description: str = ""
    format: str | None = None
    symmetric: bool = False
    prompt_query: str | None = None
    prompt_passage: str | None = None
    convert: Conversion = field(default_factory=Conversion)
    negatives: str = "auto"

    def __post_init__(self) -> None:
        one_of("tasks: negatives", self.negatives, ("auto", "mined", "given"))
        one_of("tasks: kind", self.kind, ("auto", *KINDS))
        if self.format is not None:
            one_of("tasks: format", self.format, tuple(FORMATS))
        require(
            not (self.convert.unique_id and self.negatives == "mined"),
            "tasks: unique_id tells an example's texts from all others, and mined negatives are "
            "others' texts.",
            'leave negatives = "mined" out, or unique_id',
        )
        made = RULES.get(self.convert.rule)
        require(
            made is None or self.kind in ("auto", made),
            f"tasks: kind = {self.kind!r}, and convert.rule = {self.convert.rule!r} makes {made}.",
            "leave kind out",
        )

    @property
    def mined(self) -> bool:
        """Whether its hard negatives are mined."""
        return self.negatives == "mined" or (
            self.negatives == "auto" and self.convert.rule not in _WITH_NEGATIVES
        )

    def prompts(self, kind: str, tokenizer: Tokenizer) -> dict[str, str]:
        """Its prompts by side: query and passage of a retrieval task, text of the others.

        Args:
            kind: of the task's examples.
            tokenizer: what holds for tasks that say nothing.
        """
        sides = tokenizer.prompts(kind)
        if self.format is not None or self.description:
            form = self.format or tokenizer.format
            sides = {side: prompt(form, side, kind, self.description) for side in sides}
        given = {"query": self.prompt_query, "passage": self.prompt_passage}
        if kind != "retrieval":
            given = {"text": self.prompt_query}
        sides |= {side: text for side, text in given.items() if text is not None}
        if self.symmetric and kind == "retrieval":
            sides["passage"] = sides["query"]
        return sides
