"""Scores of a language model: graded labels and the likelihood of a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit.errors import UsageError
from embkit.synth.llm import FIRST_TOKEN, LLM, LOGLIKELIHOOD


def query_likelihoods(
    llm: LLM, prompts: Sequence[str], queries: Sequence[str]
) -> tuple[NDArray[np.float64], list[str]]:
    """log P(query | prompt), nats, F64 [n]; and the reason of each row that has none (NaN).

    Raises:
        UsageError: the backend cannot tell.
    """
    if LOGLIKELIHOOD not in llm.capabilities:
        raise UsageError(
            f"{llm.name} gives no log-likelihoods.",
            fix="take a model in this process for the query likelihood (a directory), or a server "
            "with echo and logprobs",
        )
    found = llm.loglikelihood([(p, " " + q) for p, q in zip(prompts, queries, strict=True)])
    return np.array([one.value for one in found], np.float64), [one.reason for one in found]


def graded(
    llm: LLM, prompts: Sequence[str], labels: Sequence[tuple[str, float]]
) -> tuple[NDArray[np.float64], list[str]]:
    """Expected grade of each prompt's item, F64 [n]; and the reason where there is none (NaN).

    The log-probabilities of the labels, as continuations of the prompt, are normalised over the
    labels; the grade is the mean of their values under that distribution.

    Args:
        llm: a backend with likelihoods, or with the likeliest first tokens.
        labels: text and value of each label.
    """
    values = np.array([value for _, value in labels], np.float64)
    weights, reasons = label_weights(llm, prompts, [text for text, _ in labels])
    out = np.full(len(prompts), np.nan)
    for i, weight in enumerate(weights):
        if not reasons[i]:
            out[i] = float((weight * values).sum() / weight.sum())
    return out, reasons


def label_weights(
    llm: LLM, prompts: Sequence[str], labels: Sequence[str]
) -> tuple[NDArray[np.float64], list[str]]:
    """Weights of labels as continuations of each prompt, F64 [n, labels], the largest of a row 1.

    A row divided by its sum is the model's distribution over the labels; a row of NaN has the
    reason beside it.
    """
    texts = list(labels)
    able = llm.capabilities
    if LOGLIKELIHOOD in able:
        found = llm.loglikelihood([(p, " " + t) for p in prompts for t in texts])
        logs: list[Any] = [
            next((one.reason for one in row if one.reason), None) or [one.value for one in row]
            for row in (
                found[i : i + len(texts)] for i in range(0, len(found), len(texts))
            )
        ]  # fmt: skip
    elif FIRST_TOKEN in able:
        starts = {text.split()[0] for text in texts}
        if len(starts) < len(texts):
            raise UsageError("Labels that begin alike need a backend with log-likelihoods.")
        logs = list(llm.first_token(prompts, texts))
    else:
        raise UsageError(f"{llm.name} gives no log-probabilities.", fix="take another backend")
    out = np.full((len(prompts), len(texts)), np.nan)
    for i, row in enumerate(logs):
        if not isinstance(row, str):
            out[i] = np.exp(np.array(row) - np.max(row))
    return out, [row if isinstance(row, str) else "" for row in logs]
