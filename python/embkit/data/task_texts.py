"""Queries with a task of their own: ``{task_text}`` in a prompt is what each row says.

A language model that writes a query says in words what it is for (Gecko's FRet); the query is
tokenized behind these words. They are no part of the text: identity, near-duplicates and leaks are
found without them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from embkit.errors import UsageError

if TYPE_CHECKING:
    from embkit.data.tables import Texts
    from embkit.data.tokenize import Rows

TASK_TEXT = "{task_text}"
_MOST = np.iinfo(np.uint16).max  # a row's prompt is a U16


def key(text: str) -> str:
    """A query as its records have it."""
    return unicodedata.normalize("NFC", text).strip()


def fill(
    rows: Rows, texts: Texts, said: Mapping[str, str], *, tokenizer_json: str, limit: int, role: str
) -> tuple[Rows, dict[str, int]]:
    """Rows whose prompt has ``{task_text}`` get the prompt of their own query.

    Args:
        rows: planned with such prompts as they are.
        texts: that the rows name.
        said: task texts by query, see :func:`key`.
        limit: tokens of a query. A prompt that takes more than half of them is left out.
        role: prompt of queries that say nothing, or too much.

    Returns:
        The rows, and how many have a prompt of their own, none to fill in, or one too long.

    Raises:
        UsageError: no query says anything, or there are more prompts than a store can have.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    number = {prompt: i for i, prompt in enumerate(rows.prompts)}
    prompts, prompt = list(rows.prompts), rows.prompt.astype(np.int64)
    counts = {"own": 0, "missing": 0, "long": 0}
    fits: dict[str, bool] = {}
    for form in [p for p in rows.prompts if TASK_TEXT in p]:
        for at in np.flatnonzero(rows.prompt == number[form]).tolist():
            words = said.get(key(texts.get(int(rows.text[at]))), "")
            own = form.replace(TASK_TEXT, words)
            if words and own not in fits:
                fits[own] = len(tokenizer.encode(own).ids) <= limit // 2
            why = "own" if words and fits[own] else "long" if words else "missing"
            counts[why] += 1
            chosen = own if why == "own" else role
            if chosen not in number:
                number[chosen] = len(prompts)
                prompts.append(chosen)
            prompt[at] = number[chosen]
    if not counts["own"]:
        raise UsageError(
            f"No query has a task_text that fits ({counts['missing']} have none, {counts['long']} "
            f"would take more than half of {limit} tokens).",
            fix="give the rows a column task_text, raise tokenizer.max_length_query, or leave "
            f"{TASK_TEXT} out of the prompt",
        )
    if len(prompts) > _MOST:
        raise UsageError(
            f"There are {len(prompts):,} different prompts, and a store has room for {_MOST:,}.",
            fix=f"let rows share task texts, or leave {TASK_TEXT} out of the prompt",
        )
    return replace(rows, prompts=prompts, prompt=prompt.astype(np.uint16)), counts
