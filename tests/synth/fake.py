"""Backends and encoders whose answers are functions of the text."""

from __future__ import annotations

from typing import Any

from embkit.synth import Completion, Likelihood, Usage


class Fake:
    """A backend whose answers are a function of the prompt."""

    name = "fake"
    capabilities = frozenset({"generate", "loglikelihood"})

    def __init__(self, answer: Any, score: Any = None) -> None:
        self.answer, self.score, self.usage = answer, score, Usage()
        self.prompts: list[str] = []

    def params(self) -> dict[str, Any]:
        return {"backend": "fake"}

    def generate(self, asked: Any, *, seeds: Any, **more: Any) -> list[Completion]:
        self.prompts += asked
        self.usage.add(requests=len(asked), prompt=3 * len(asked), completion=len(asked))
        found = [self.answer(p, s) for p, s in zip(asked, seeds, strict=True)]
        return [
            a
            if isinstance(a, Completion)
            else Completion(text=a, prompt_tokens=3, completion_tokens=1)
            for a in found
        ]

    def loglikelihood(self, pairs: Any) -> list[Likelihood]:
        found = [self.score(p, c) for p, c in pairs]
        return [
            Likelihood(reason=v) if isinstance(v, str) else Likelihood(value=v, tokens=1)
            for v in found
        ]
