"""What a stage asks of a large language model: text, and the likelihood of a text.

A backend is anything with these methods: an OpenAI-compatible server (``Server``) or a model in
this process (``Local``). A row that cannot be answered comes back with a reason, in its place;
trouble of the whole backend is an exception, and the stage that asked keeps what it has.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from embkit.errors import EmbkitError

GENERATE = "generate"
LOGLIKELIHOOD = "loglikelihood"  # of a whole continuation
FIRST_TOKEN = "first_token"  # the likeliest first tokens of an answer only

STOP = "\n\n"  # ends an answer in lines


class BackendError(EmbkitError):
    """The backend as a whole does not answer; what is done is kept. Exit code 4."""

    exit_code = 4


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Generated text.

    Attributes:
        text: what the model wrote; empty when there is a reason.
        reason: why there is no text: ``"too_long"`` (the prompt), ``"empty"``, ``"refused"`` (the
            server rejects this request), ``"shape"``; empty when all is well.
        cut: the text stopped at its token limit.
        prompt_tokens, completion_tokens: as the backend counts them.
    """

    text: str = ""
    reason: str = ""
    cut: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Log-likelihood of a continuation.

    Attributes:
        value: nats, summed over the tokens that end after the prompt; NaN when there is a reason.
        tokens: how many those are.
        reason: as in :class:`Completion`.
        prompt_tokens: tokens of prompt and continuation.
    """

    value: float = float("nan")
    tokens: int = 0
    reason: str = ""
    prompt_tokens: int = 0


class Usage:
    """What a backend was asked so far; counted by all of its threads.

    Attributes:
        requests: requests sent, retries included. cached: answers that needed none.
        prompt_tokens, completion_tokens: of new answers.
        retries: by reason. rejected: rows given up, by reason.
    """

    def __init__(self) -> None:
        self.requests = self.cached = self.prompt_tokens = self.completion_tokens = 0
        self.retries: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(
        self, *, requests: int = 0, cached: int = 0, prompt: int = 0, completion: int = 0,
        retry: str = "", reject: str = "",
    ) -> None:  # fmt: skip
        """Count, safely from any thread."""
        with self._lock:
            self.requests += requests
            self.cached += cached
            self.prompt_tokens += prompt
            self.completion_tokens += completion
            if retry:
                self.retries[retry] += 1
            if reject:
                self.rejected[reject] += 1

    def counts(self) -> dict[str, Any]:
        """All counts, JSON types."""
        with self._lock:
            return {
                "requests": self.requests, "cached": self.cached,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "retries": dict(sorted(self.retries.items())),
                "rejected": dict(sorted(self.rejected.items())),
            }  # fmt: skip

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens

    def __str__(self) -> str:
        words = [f"{self.requests} requests", f"{self.cached} from the cache",
                 f"{self.prompt_tokens} + {self.completion_tokens} tokens"]  # fmt: skip
        for name, counts in (("retried", self.retries), ("rejected", self.rejected)):
            if counts:
                each = ", ".join(f"{n} x {why}" for why, n in sorted(counts.items()))
                words.append(f"{name}: {each}")
        return ", ".join(words)


class LLM(Protocol):
    """A backend. All methods keep the order of what they are given."""

    usage: Usage

    @property
    def name(self) -> str:
        """The model's name, for provenance."""

    @property
    def capabilities(self) -> frozenset[str]:
        """Which of the methods below work: the names are constants of this module."""

    def params(self) -> dict[str, Any]:
        """What of the backend decides its answers, JSON types: part of a stage's digest."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Answer prompts.

        Args:
            prompts: n texts.
            max_tokens: of an answer.
            temperature: 0 takes the likeliest token each time.
            seeds: one per prompt, for a temperature above 0; 0 by default.
            schema: JSON schema of the answer, for servers that can enforce one.
            stop: texts that end an answer and are no part of it; given for prompts in lines only.
        """

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Likelihood of continuations: of each pair (prompt, continuation), given the prompt."""

    def first_token(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float] | str]:
        """Log-probability that an answer begins with each choice; or the reason of a rejection."""
