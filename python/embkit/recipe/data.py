"""Sections of a recipe that decide the texts and tokens: data, dedup, filter, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embkit.recipe.prompts import FORMATS, prompt
from embkit.recipe.schema import one_of, require


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read.

    Attributes:
        path: a data folder (train/, dev/, test/), or None for the bundled demo data.
        max_rejected: share of faulty rows above which reading stops with exit code 3.
    """

    path: str | None = None
    max_rejected: float = 0.01

    def __post_init__(self) -> None:
        require(
            0 <= self.max_rejected <= 1,
            f"data.max_rejected = {self.max_rejected} is no share.",
            "give a number from 0 to 1",
        )


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Near-duplicate removal and decontamination.

    Attributes:
        method: near, or exact (only texts of the same normalised form).
        threshold: Jaccard similarity of shingles from which two texts are near-duplicates.
        action: what becomes of duplicates: merge, drop or mark.
        conflicts: examples that contradict each other: keep or drop.
        priority: names of sources, the best first: of duplicates its text stays.
        punctuation: of method exact: keep, or drop to compare words alone.
        leaked: examples with texts of the evaluation sets: remove or mark.
        words: length in words of the runs that mark a leak into the evaluation sets.
        chars: the same in characters, for scripts without spaces.
        units: of the runs: auto (by the script of each text), words or chars.
        common: a run in more training texts than this is a fixed phrase, and no leak.
        seed: seed of the MinHash permutations.
    """

    method: str = "near"
    threshold: float = 0.8
    action: str = "merge"
    conflicts: str = "keep"
    priority: tuple[str, ...] = ()
    punctuation: str = "keep"
    leaked: str = "remove"
    words: int = 13
    chars: int = 50
    units: str = "auto"
    common: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 < self.threshold <= 1,
            f"dedup.threshold = {self.threshold} is out of range.",
            "give a Jaccard similarity above 0 and at most 1, e.g. 0.8",
        )
        require(
            min(self.words, self.chars) >= 1 and self.common >= 0,
            f"dedup.words = {self.words}, chars = {self.chars}, common = {self.common}: one is out "
            "of range.",
            "words and chars are at least 1, common at least 0",
        )
        one_of("dedup.method", self.method, ("near", "exact"))
        one_of("dedup.action", self.action, ("merge", "drop", "mark"))
        one_of("dedup.conflicts", self.conflicts, ("keep", "drop"))
        one_of("dedup.punctuation", self.punctuation, ("keep", "drop"))
        one_of("dedup.leaked", self.leaked, ("remove", "mark"))
        one_of("dedup.units", self.units, ("auto", "words", "chars"))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Rule and score filters, between deduplication and tokenization.

    Attributes:
        enabled: whether the stage runs.
        preset: bounds of the rules: default, gopher or off.
        rules: bounds that differ from the preset's, by rule (docs/filters.md); "off" is none.
        languages: codes of the languages that stay; empty for all.
        action: drop, or mark (write what would go).
        score_model: a model that compares queries and positives, or None.
        min_score: the least cosine of a pair under that model.
    """

    enabled: bool = False
    preset: str = "default"
    rules: Mapping[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    action: str = "drop"
    score_model: str | None = None
    min_score: float = 0.4

    def __post_init__(self) -> None:
        one_of("filter.action", self.action, ("drop", "mark"))
        require(
            -1 <= self.min_score <= 1,
            f"filter.min_score = {self.min_score} is no cosine.",
            "give -1 to 1, e.g. 0.4",
        )


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """How texts become tokens.

    Attributes:
        path: a tokenizer (directory, tokenizer.json or model id), or None to train WordPiece.
        vocab_size: vocabulary of a trained tokenizer.
        max_length_query: tokens a query keeps, special tokens included.
        max_length_passage: tokens a passage keeps, special tokens included.
        format: prompts of a published form by name: plain, gecko, embedding-gemma, gemini,
            instruct, e5, jina (docs/conversions.md); ``[tasks.NAME]`` may have others.
            description: what it says of retrieval, e.g. "question answering"; empty takes the
            form's own.
        end_token: put behind every text, e.g. "<|endoftext|>" (Qwen3-Embedding, whose embedding is
            that token's state); empty leaves the tokenizer as it is.
        prompt_query: put before every query, as serving will, in the place of the format's.
        prompt_passage: put before every passage.
        task_prompts: prompts of single tasks, in the place of those: a table per task with query
            and passage (retrieval) or text (other kinds).
    """

    path: str | None = None
    vocab_size: int = 16000
    max_length_query: int = 32
    max_length_passage: int = 96
    format: str = "plain"
    description: str = ""
    end_token: str = ""
    prompt_query: str = ""
    prompt_passage: str = ""
    task_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("tokenizer.format", self.format, tuple(FORMATS))

    def prompts(self, kind: str) -> dict[str, str]:
        """Prompts of a kind of task: query and passage of retrieval, text of the others."""
        if kind != "retrieval":
            return {"text": prompt(self.format, "text", kind)}
        given = {"query": self.prompt_query, "passage": self.prompt_passage}
        return {
            side: text or prompt(self.format, side, kind, self.description)
            for side, text in given.items()
        }
