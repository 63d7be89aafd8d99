"""Prompts of the published models by name (docs/recipes.md)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Format:
    """Prompts of one form; ``{task}`` is the description of a task.

    Attributes:
        query, passage: of the sides of a retrieval task.
        text: of texts that are compared with their like: sentence pairs, classified texts.
        retrieval, sts, classification: the description of a task that has none of its own.
    """

    query: str = ""
    passage: str = ""
    text: str = ""
    retrieval: str = "search result"
    sts: str = "sentence similarity"
    classification: str = "classification"


_TASK = "task: {task} | query: "
_TITLE = "title: none | text: "
_INSTRUCT = "Instruct: {task}\nQuery:"
FORMATS = {
    "plain": Format(),
    "gecko": Format(query=_TASK, passage=_TITLE, text=_TASK, sts="semantic similarity"),
    "embedding-gemma": Format(query=_TASK, passage=_TITLE, text=_TASK),
    "gemini": Format(query="{task}: ", text="{task}: "),
    "instruct": Format(
        query=_INSTRUCT,
        text=_INSTRUCT,
        retrieval="Given a search query, retrieve passages that answer it",
        sts="Retrieve texts of the same meaning",
        classification="Classify the text",
    ),
    "e5": Format(query="query: ", passage="passage: ", text="query: "),
    "jina": Format(query="Query: ", passage="Document: ", text="Query: "),
}


def prompt(form: str, side: str, kind: str, description: str = "") -> str:
    """A prompt of a format: ``prompt("e5", "query", "retrieval") == "query: "``."""
    found = FORMATS[form]
    text: str = getattr(found, side)
    return text.replace("{task}", description or getattr(found, kind))
