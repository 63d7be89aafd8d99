"""A backend that is opened when it is first asked: a finished stage needs no server.

A stage is known by what decides its answers, the backend's parameters among them, and these are
only known from the server or the weights. A run keeps them in a file beside its stages, so that it
goes on, days later, when the server that wrote its data has long been switched off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.errors import UsageError
from embkit.recipe.llm import Llm
from embkit.synth.backend import open_llm
from embkit.synth.llm import LLM, Completion, Likelihood, Usage
from embkit.synth.spent import Spent

# Fields of the settings that decide answers; the others are ways to get them.
_DECIDE = ("model", "name", "gguf", "plain", "structured")


class Deferred:
    """What :func:`open_llm` opens, when it is needed.

    Args:
        settings: of the model.
        path: where its parameters are kept, JSON.
        spent: where it is kept what each stage has asked.
        ask: whether this process may ask; of several ranks the first one does.

    Attributes:
        stage: that asks now, for ``spent``.

    Raises:
        UsageError: on the first use, when the model is not the one that the file tells of, or when
            this process may not ask.
    """

    def __init__(
        self, settings: Llm, path: Path, *, spent: Spent | None = None, ask: bool = True
    ) -> None:
        self.settings, self.path, self.spent, self.ask = settings, path, spent, ask
        self.stage = ""
        self._usage = Usage()

    @cached_property
    def about(self) -> dict[str, Any]:
        """Name, capabilities and parameters: of the file, else of the model."""
        return self._kept() or self.renew()

    def renew(self) -> dict[str, Any]:
        """Ask the model, whatever the file says, and keep what it says."""
        found = self._asked(self._opened)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        _rust.publish_file(str(self.path), text.encode())
        self.__dict__["about"] = found
        return found

    def _kept(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return dict(found) if found["settings"] == self._key else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    @property
    def _key(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in _DECIDE}

    def _asked(self, llm: LLM) -> dict[str, Any]:
        params = json.loads(json.dumps(llm.params()))
        return {"settings": self._key, "name": llm.name, "capabilities": sorted(llm.capabilities),
                "params": params}  # fmt: skip

    @cached_property
    def _opened(self) -> LLM:
        if not self.ask:
            raise UsageError(
                "The first rank alone asks the language model, and what it has made is not here.",
                where=self.path.parent,
                fix="put the run directory where every rank sees it",
            )
        return open_llm(self.settings)

    @cached_property
    def llm(self) -> LLM:
        """The model, opened, and the same as before."""
        about, llm = self.about, self._opened
        if self._asked(llm) != about:
            raise UsageError(
                "The language model is not the one that this run began with: "
                + _difference(about, self._asked(llm)),
                where=self.path,
                fix="run with the model of before, or all of it anew with --fresh",
            )
        llm.usage = self._usage
        return llm

    def release(self) -> None:
        """Forget a model that was loaded: the stages that train need its memory."""
        for name in ("llm", "_opened"):
            self.__dict__.pop(name, None)

    @property
    def usage(self) -> Usage:
        """What was asked so far."""
        return self._usage

    @usage.setter
    def usage(self, value: Usage) -> None:
        self._usage = value

    @property
    def name(self) -> str:
        """The model's name."""
        return str(self.about["name"])

    @property
    def capabilities(self) -> frozenset[str]:
        """What the model can do."""
        return frozenset(self.about["capabilities"])

    def params(self) -> dict[str, Any]:
        """What decides its answers."""
        return dict(self.about["params"])

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
        """See :class:`embkit.synth.LLM`."""
        with self._counting():
            return self.llm.generate(
                prompts, max_tokens=max_tokens, temperature=temperature, seeds=seeds,
                schema=schema, **({"stop": stop} if stop else {}),
            )  # fmt: skip

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See :class:`embkit.synth.LLM`."""
        with self._counting():
            return self.llm.loglikelihood(pairs)

    def first_token(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float] | str]:
        """See :class:`embkit.synth.LLM`."""
        with self._counting():
            return self.llm.first_token(prompts, choices)

    def _counting(self) -> AbstractContextManager[None]:
        if self.spent is None:
            return nullcontext()
        return self.spent.counting(self.stage, self._usage)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    flat = [{**one["params"], "name": one["name"]} for one in (before, now)]
    names = sorted({*flat[0], *flat[1]})
    wrong = [n for n in names if flat[0].get(n) != flat[1].get(n)]
    return ", ".join(f"{n} is {flat[1].get(n)!r}, was {flat[0].get(n)!r}" for n in wrong)
