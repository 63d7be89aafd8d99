"""Sections of a recipe that ask a language model: llm, synth, relabel, judge (docs/synth.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from embkit.recipe.schema import require


@dataclass(frozen=True, kw_only=True)
class Llm:
    """The language model that synth, relabel and judge ask.

    Attributes:
        model: address of an OpenAI-compatible server, or a directory of a model to load; None:
            there is none, and no stage may ask one.
        name: the model's name on the server, or for provenance.
        gguf: name of a GGUF file inside the directory.
        plain: completions, without a chat template.
        structured: let the server enforce the form of answers.
        concurrency: requests at a time.
        cache: file of answers, so that nothing is asked twice.
        token_budget: tokens after which no request is sent.
        requests_per_minute, tokens_per_minute: rates that are not passed.
        timeout: seconds for one response. retries: attempts after the first.
    """

    model: str | None = None
    name: str | None = None
    gguf: str | None = None
    plain: bool = False
    structured: bool = False
    concurrency: int = 8
    cache: str | None = None
    token_budget: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self) -> None:
        require(
            self.concurrency > 0 and self.timeout > 0 and self.retries >= 0,
            f"llm.concurrency = {self.concurrency}, timeout = {self.timeout}, retries = "
            f"{self.retries}: one is out of range.",
            "the first two are above 0, retries at least 0",
        )

    @property
    def served(self) -> bool:
        """Whether the model is behind an address."""
        return self.model is not None and "://" in self.model


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """A task of labelled texts or graded pairs that the language model writes.

    Attributes:
        lists: files of entries, one a line, in the place of a list that the model makes.

    The others are those of ``embkit.synth.Labelled``.
    """

    prompt: str = "reviews"
    examples: int = 1000
    shares: Mapping[str, float] = field(default_factory=dict)
    lists: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    temperature: float = 0.9
    seed: int = 0
    judge: bool = True
    min_fit: float = 0.5
    max_off: float = 1.0
    balance: bool = True
    max_rejected: float = 0.05
    shard: int = 32


@dataclass(frozen=True, kw_only=True)
class Synth:
    """Data that the language model writes before anything is read.

    Attributes:
        passages: JSON lines or a records directory; queries are written for its passages. None
            writes none.
        task: the task that the queries go to, which may be one of train/.
        personas: file of characters, one a line.
        labelled: further tasks, by their names.

    The others are those of ``embkit.synth.Write``.
    """

    passages: str | None = None
    task: str = "synthetic"
    sample: int = 0
    prompt: str = "gecko"
    per_passage: int = 1
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    temperature: float = 0.7
    seed: int = 0
    rater: str | None = None
    min_rating: float = 1.0
    max_rejected: float = 0.05
    shard: int = 64
    personas: str | None = None
    labelled: Mapping[str, LabelledTask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.passages is None or self.task not in self.labelled,
            f"synth.task = {self.task!r} is also one of synth.labelled.",
            "give it another name",
        )

    @property
    def on(self) -> bool:
        """Whether anything is written."""
        return self.passages is not None or bool(self.labelled)


@dataclass(frozen=True, kw_only=True)
class RelabelStage:
    """New positives and hard negatives by the pre-finetuned model and the language model.

    Attributes:
        on: whether it is done.
        tasks: retrieval tasks that get them; all whose negatives would be mined when empty.

    The others are those of ``embkit.synth.Relabel``.
    """

    on: bool = False
    tasks: tuple[str, ...] = ()
    candidates: int = 20
    constant: float = 0.0
    positive: str = "best"
    negative: str = "last"
    negatives: int = 1
    likelihood: str = "likelihood"
    relevance: str = "relevance"
    shard: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class JudgeStage:
    """Pairs that the language model grades, and drops, before anything is trained.

    Attributes:
        on: whether it is done.
        tasks: retrieval tasks that are graded; all without a conversion when empty.

    The others are those of ``embkit.synth.Judge``.
    """

    on: bool = False
    tasks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ("relevance",)
    min_positive: float = 1.0
    max_negative: float = 2.0
    action: str = "drop"
    shard: int = 256
