"""An OpenAI-compatible server as a backend: vLLM, TGI, llama.cpp and the like.

Log-probabilities of given text are no part of what all servers do. What this one does is found out
once: completions with ``echo`` and ``logprobs``, vLLM's ``prompt_logprobs``, or the likeliest first
tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

from embkit.errors import UsageError
from embkit.synth.cache import Cache
from embkit.synth.llm import FIRST_TOKEN, GENERATE, LOGLIKELIHOOD, Completion, Likelihood, Usage
from embkit.synth.transport import Malformed, Rejected, Transport

_TOP = 20  # first tokens that servers give at the most, as a rule
_PROBE = ("The capital of France is", " Paris")


class Server:
    """A model behind an OpenAI-compatible address.

    Args:
        url: e.g. ``http://localhost:8000/v1``.
        model: the model's name there; None takes the one that the server lists.
        chat: ask for generated text as a chat (the server puts the model's template around a
            prompt), or as a plain completion.
        concurrency: requests at a time.
        structured: let the server enforce the JSON schema of an answer (``response_format``).
        cache: file of answers, see :class:`embkit.synth.Cache`.
        **limits: of :class:`embkit.synth.transport.Transport`: timeout, retries, rates, budget.

    Raises:
        UsageError: no address, or several models and none named.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        chat: bool = True,
        concurrency: int = 8,
        structured: bool = False,
        cache: Path | str | None = None,
        **limits: Any,
    ) -> None:
        if concurrency < 1:
            raise UsageError(f"concurrency = {concurrency} is not positive.")
        self.chat, self.structured, self.concurrency = chat, structured, concurrency
        self.transport = Transport(
            url, Usage(), cache=None if cache is None else Cache(cache), **limits
        )
        self._model = model

    @property
    def usage(self) -> Usage:
        """What was asked so far: the transport's counts, which the budget goes by."""
        return self.transport.usage

    @usage.setter
    def usage(self, value: Usage) -> None:
        self.transport.usage = value

    @cached_property
    def name(self) -> str:
        """The model's name; asked of the server when it was not given."""
        if self._model is not None:
            return self._model
        found = self.transport.get("/models")
        listed = found.get("data") if isinstance(found, dict) else None
        entries = listed if isinstance(listed, list) else []
        names = [str(entry.get("id")) for entry in entries if isinstance(entry, dict)]
        if len(names) != 1:
            raise UsageError(
                f"The server lists {len(names)} models: {', '.join(names[:5])}.",
                where=self.transport.address,
                fix="name the model",
            )
        return names[0]

    def params(self) -> dict[str, Any]:
        """Model and form of the requests; the address decides nothing."""
        return {
            "backend": "server", "model": self.name, "chat": self.chat,
            "structured": self.structured, "likelihood": self.likelihood,
        }  # fmt: skip

    @property
    def capabilities(self) -> frozenset[str]:
        """Generation, and what the probe has found."""
        found = {"first": FIRST_TOKEN, "": GENERATE}.get(self.likelihood, LOGLIKELIHOOD)
        return frozenset({GENERATE, found})

    @cached_property
    def likelihood(self) -> str:
        """How this server gives log-probabilities: ``"echo"``, ``"prompt_logprobs"``, ``"first"``
        or, where it does not, ``""``."""
        for way in ("echo", "prompt_logprobs"):
            try:
                if way == "echo":
                    self._checked_echo()
                else:
                    self._likelihood(_PROBE, way)
            except (Rejected, UsageError):
                continue
            return way
        try:
            self._first(_PROBE[0], ["Paris"])
        except (Rejected, UsageError):
            return ""
        return "first"

    def _checked_echo(self) -> None:
        """Ask for echoed values, and see that they belong to their tokens.

        Some servers give, for a token, its probability after itself (llama-cpp-python, for models
        without a first token). So: the likeliest token in the place of the probe's last one must
        be the likeliest when it stands there. A server that names none is believed.

        Raises:
            Rejected, UsageError: no such values, or wrong ones.
        """

        def ask(last: str) -> tuple[dict[str, Any], tuple[str, float] | None]:
            prompt, text = _PROBE[0], _PROBE[0] + last
            return self._post(
                "/completions", self._echo(text),
                lambda said: (echoed(said, prompt, text), likeliest(said, prompt, text)),
            )  # fmt: skip

        _, best = ask(_PROBE[1])
        if best is None or not best[0].strip() or "\ufffd" in best[0]:
            return
        found, again = ask(best[0])
        if again is None:
            return  # the text has other tokens there
        alone = found["tokens"] == 1
        if again[0] != best[0] or (alone and found["value"] < again[1] - 1e-3):
            raise Rejected("shape")

    # ------------------------------------------------------------ generation

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

        def ask(prompt: str, seed: int) -> Completion:
            body: dict[str, Any] = {
                "model": self.name, "max_tokens": max_tokens, "temperature": temperature,
                "seed": seed, "n": 1,
            }  # fmt: skip
            if stop:
                body["stop"] = list(stop)
            if schema is not None and self.structured:
                body["response_format"] = {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": dict(schema)},
                }
            if self.chat:
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            try:
                found = self._post(
                    "/chat/completions" if self.chat else "/completions", body, text_of
                )
            except Rejected as error:
                self.usage.add(reject=error.reason)
                return Completion(reason=error.reason)
            return Completion(**found)

        return self._all(ask, prompts, seeds if seeds is not None else repeat(0))

    # ------------------------------------------------------------ likelihood

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See :class:`embkit.synth.LLM`.

        Raises:
            UsageError: the server gives no log-probabilities of what it is told.
        """
        way = self.likelihood
        if way not in ("echo", "prompt_logprobs"):
            raise UsageError(
                "This server gives no log-probabilities of given text.",
                where=self.transport.address,
                fix="score with a model in this process, or with a server that has completions "
                "with echo and logprobs, or prompt_logprobs",
            )

        def ask(pair: tuple[str, str]) -> Likelihood:
            try:
                return Likelihood(**self._likelihood(pair, way))
            except Rejected as error:
                self.usage.add(reject=error.reason)
                return Likelihood(reason=error.reason)

        return self._all(ask, pairs)

    def _likelihood(self, pair: tuple[str, str], way: str) -> dict[str, Any]:
        prompt, text = pair[0], pair[0] + pair[1]
        body, read = self._echo(text), echoed
        if way == "prompt_logprobs":
            body = {k: v for k, v in body.items() if k not in ("echo", "logprobs")}
            body, read = body | {"prompt_logprobs": 0}, listed
        return self._post("/completions", body, lambda payload: read(payload, prompt, text))

    def _echo(self, text: str) -> dict[str, Any]:
        # One token is generated, and not counted: some servers take 0 for no limit.
        return {
            "model": self.name, "prompt": text, "max_tokens": 1, "temperature": 0.0, "echo": True,
            "logprobs": 1,
        }  # fmt: skip

    def first_token(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float] | str]:
        """See :class:`embkit.synth.LLM`. A choice that is not among the likeliest 20 gets the
        least log-probability of these: a bound from above."""

        def ask(prompt: str) -> list[float] | str:
            try:
                return self._first(prompt, choices)
            except Rejected as error:
                self.usage.add(reject=error.reason)
                return error.reason

        return self._all(ask, prompts)

    def _first(self, prompt: str, choices: Sequence[str]) -> list[float]:
        body: dict[str, Any] = {"model": self.name, "max_tokens": 1, "temperature": 0.0}
        if self.chat:
            body |= {
                "messages": [{"role": "user", "content": prompt}], "logprobs": True,
                "top_logprobs": _TOP,
            }  # fmt: skip
        else:
            body |= {"prompt": prompt, "logprobs": _TOP}
        path = "/chat/completions" if self.chat else "/completions"
        tokens = self._post(path, body, first_tokens)
        least = min(tokens.values())
        found = []
        for choice in choices:
            wanted = choice.strip()
            hits = [v for t, v in tokens.items() if t.strip() and wanted.startswith(t.strip())]
            found.append(max(hits, default=least))
        return found

    # ------------------------------------------------------------ requests

    def _post(self, path: str, body: dict[str, Any], check: Callable[[Any], Any]) -> Any:
        def counted(payload: Any) -> Any:
            answer = check(payload)
            used = payload.get("usage") or {}
            self.usage.add(
                prompt=int(used.get("prompt_tokens") or 0),
                completion=int(used.get("completion_tokens") or 0),
            )
            return answer

        return self.transport.post(path, body, counted)

    def _all(self, ask: Callable[..., Any], *columns: Any) -> list[Any]:
        """Ask for all rows, so many at a time; the first error stops the rest."""
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="embkit-llm") as pool:
            futures = [pool.submit(ask, *row) for row in zip(*columns, strict=False)]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.transport.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                self.transport.stop.clear()
                raise


# ---------------------------------------------------------------- what responses say


def text_of(payload: Any) -> dict[str, Any]:
    """The text of a chat or a completion."""
    choice = payload["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if not isinstance(text, str):
        raise Malformed("empty" if text is None else "shape")
    if not text.strip():
        raise Malformed("empty")
    # Halves of characters, which JSON can say, join where they are pairs.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    used = payload.get("usage") or {}
    return {
        "text": text,
        "cut": choice.get("finish_reason") == "length",
        "prompt_tokens": int(used.get("prompt_tokens") or 0),
        "completion_tokens": int(used.get("completion_tokens") or 0),
    }


def echoed(payload: Any, prompt: str, text: str) -> dict[str, Any]:
    """Likelihood of ``text`` after ``prompt`` from completions with ``echo``."""
    said = payload["choices"][0]["logprobs"]
    return _summed(_spans(said, prompt, text), said["token_logprobs"], prompt, text)


def likeliest(payload: Any, prompt: str, text: str) -> tuple[str, float] | None:
    """The likeliest token in the place after ``prompt``, if the server names it, and its value."""
    said = payload["choices"][0]["logprobs"]
    tops = said.get("top_logprobs") or []
    for (start, _), top in zip(_spans(said, prompt, text), tops, strict=False):
        if start == len(prompt) and top:
            token = max(top, key=lambda name: float(top[name]))
            return str(token), float(top[token])
    return None


def _spans(said: Any, prompt: str, text: str) -> list[tuple[int, int]]:
    """Where each echoed token stands in the text."""
    tokens, values, starts = said["tokens"], said["token_logprobs"], said["text_offset"]
    if not len(tokens) == len(values) == len(starts) > 0 or starts != sorted(starts):
        raise Malformed("shape")
    # Some servers show, and count in the offsets, a token that begins every text.
    stops = [*starts[1:], starts[-1] + len(tokens[-1])]
    for shift in (0, len(tokens[0])):
        if len(text) + shift in (*starts, stops[-1]):
            spans = [(a - shift, b - shift) for a, b in zip(starts, stops, strict=True)]
            wrong = [
                token for token, (a, b) in zip(tokens, spans, strict=True)
                if b > len(prompt) and a < len(text) and text[a:b] != token
                and "\ufffd" not in token and not token.startswith("bytes:")  # parts of a character
            ]  # fmt: skip
            if wrong:
                raise Malformed("shape")
            return spans
    raise Malformed("shape")


def listed(payload: Any, prompt: str, text: str) -> dict[str, Any]:
    """The same from vLLM's ``prompt_logprobs``: per token a table with one entry, its own."""
    entries = payload["choices"][0].get("prompt_logprobs") or payload.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise Malformed("shape")
    values: list[float | None] = []
    pieces: list[str] = []
    for entry in entries:
        if entry is None:
            continue  # the first token: nothing comes before it
        if len(entry) != 1:
            raise Malformed("shape")
        (only,) = entry.values()
        values.append(only["logprob"])
        pieces.append(only["decoded_token"])
    after = "".join(pieces)
    if not text.endswith(after):
        raise Malformed("shape")
    at, spans = len(text) - len(after), []
    for piece in pieces:
        spans.append((at, at + len(piece)))
        at += len(piece)
    return _summed(spans, values, prompt, text)


def _summed(
    spans: Sequence[tuple[int, int]], values: Sequence[Any], prompt: str, text: str
) -> dict[str, Any]:
    """Sum over the tokens that end after the prompt and begin before the end of the text."""
    counted = [
        v for (a, b), v in zip(spans, values, strict=True) if b > len(prompt) and a < len(text)
    ]
    if not counted or any(v is None or not math.isfinite(v) or v > 1e-4 for v in counted):
        raise Malformed("shape")
    inside = sum(a < len(text) for a, _ in spans)
    return {"value": float(sum(counted)), "tokens": len(counted), "prompt_tokens": inside}


def first_tokens(payload: Any) -> dict[str, float]:
    """The likeliest first tokens of an answer, from a chat or a completion."""
    said = payload["choices"][0]["logprobs"]
    if "content" in said:
        found = {
            e["token"]: float(e["logprob"]) for e in reversed(said["content"][0]["top_logprobs"])
        }
    else:
        found = {str(t): float(v) for t, v in said["top_logprobs"][0].items()}
    if not found or any(not v <= 1e-4 for v in found.values()):
        raise Malformed("shape")
    return found
