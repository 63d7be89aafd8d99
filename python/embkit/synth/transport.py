"""Requests to an HTTP server of JSON: pooled connections, retries, rates, budget and cache.

What may pass by itself (refused connections, timeouts, 429 and 5xx, a page of HTML, a body cut
short or of the wrong shape) is tried again after a pause that doubles and is drawn at random, or
that the server asks for. The key of the API is read from the environment when a request is sent,
goes nowhere else, and is taken out of whatever the server says before anyone is told of it.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from embkit.errors import EmbkitError, UsageError
from embkit.synth.cache import Cache
from embkit.synth.llm import BackendError, Usage

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_TOO_LONG = re.compile(
    r"context (length|size|window)|maximum context|too long|max_model_len|exceed_context|n_ctx"
    r"|token limit|too many tokens|must have less than \d+ tokens",
    re.I,
)
_LARGEST = 64 << 20  # bytes of a response
_OF_ROWS = ("empty", "shape")  # what one row may cause by itself


class Malformed(Exception):
    """A response that is not what was asked for; ``reason`` is ``"empty"`` or ``"shape"``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Rejected(Exception):
    """This request will never be answered; ``reason`` goes to the row."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class BudgetError(EmbkitError):
    """The token budget is used up. Exit code 1."""


class _Unknown(UsageError):
    """The server does not know the path, or the model."""


class _Again(Exception):
    def __init__(self, reason: str, what: str, after: float | None = None) -> None:
        super().__init__(what)
        self.reason, self.what, self.after = reason, what, after


class Transport:
    """Sends JSON to paths below a base address; any number of threads may.

    Args:
        url: base address, e.g. ``http://localhost:8000/v1``.
        usage: where requests, retries and rejections are counted.
        timeout: seconds for one whole response.
        retries: attempts after the first for trouble of the server; a row that alone is answered
            wrongly is given up after two.
        backoff: seconds before the first retry at most; doubled each time, up to ``longest``.
        longest: the longest pause, also of those that a server asks for.
        requests_per_minute, tokens_per_minute: rates that are not passed; None for none.
        token_budget: tokens in all, after which no request is sent; None for no limit.
        cache: answers that are there already.
        key_variable: environment variable with the key of the API.
    """

    def __init__(
        self,
        url: str,
        usage: Usage,
        *,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        longest: float = 60.0,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        token_budget: int | None = None,
        cache: Cache | None = None,
        key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise UsageError(
                "This is no address of a server.",
                where=f"{parts.scheme}://{parts.hostname or ''}{parts.path}",
                fix=f"give http://HOST:PORT/v1; a key goes into the environment as {key_variable}",
            )
        self.base = parts.path.rstrip("/") or "/v1"
        self.address = f"{parts.scheme}://{parts.netloc}{self.base}"
        self._parts = parts
        self.usage, self.timeout, self.retries, self.cache = usage, timeout, retries, cache
        self.backoff, self.longest, self.budget = backoff, longest, token_budget
        self._variable = key_variable
        self._idle: list[http.client.HTTPConnection] = []  # appended and popped: both are atomic
        weakref.finalize(self, _close, self._idle)
        self._random = random.Random()  # of pauses alone
        self._requests = Rate(requests_per_minute)
        self._tokens = Rate(tokens_per_minute)
        self._not_before = 0.0
        self.stop = threading.Event()

    def post(self, path: str, body: dict[str, Any], check: Callable[[Any], Any]) -> Any:
        """Send a request until it is answered.

        Args:
            path: below the base address.
            body: of JSON types.
            check: turns the response into an answer of JSON types; raises :class:`Malformed`.

        Raises:
            Rejected: the server refuses this request, or answers it wrongly again and again.
            BackendError: the server does not answer.
            BudgetError: the budget is used up.
            UsageError: the server does not know the path, model or key.
        """
        key = Cache.key(path, body) if self.cache else ""
        if self.cache and (found := self.cache.get(key)) is not None:
            self.usage.add(cached=1)
            return found
        answer = self._answered(path, body, check)
        if self.cache:
            self.cache.put(key, answer)
        return answer

    def get(self, path: str) -> Any:
        """Ask for what a path holds; None when the server does not have it.

        Raises:
            BackendError: the server does not answer.
            UsageError: it does not know the key.
        """
        try:
            return self._answered(path, None, lambda payload: payload)
        except (Rejected, _Unknown):
            return None

    def _answered(self, path: str, body: dict[str, Any] | None, check: Callable[[Any], Any]) -> Any:
        """Try until there is an answer."""
        attempt = 0
        while True:
            if body is not None:
                self._wait(body)
                self.usage.add(requests=1)
            try:
                return self._once(path, body, check)
            except _Again as trouble:
                self.usage.add(retry=trouble.reason)
                attempt += 1
                limit = min(2, self.retries) if trouble.reason in _OF_ROWS else self.retries
                if attempt > limit:
                    if trouble.reason in _OF_ROWS:
                        raise Rejected(trouble.reason) from None
                    raise BackendError(
                        f"The server does not answer: {trouble.what} ({attempt} attempts).",
                        where=self.address + path,
                        fix="see to the server; the same command goes on where it stopped",
                    ) from None
                self._pause(attempt, trouble)

    # ------------------------------------------------------------ one attempt

    def _once(self, path: str, body: dict[str, Any] | None, check: Callable[[Any], Any]) -> Any:
        status, headers, data = self._exchange(path, body)
        text = data.decode("utf-8", "replace")
        if status != 200:
            self._refuse(status, headers, text)
        if text.lstrip()[:1] == "<":
            raise _Again("html", f"a page in place of JSON: {self._clean(text)}")
        try:
            payload = json.loads(text)
        except (ValueError, RecursionError):
            raise _Again("json", f"JSON that is broken: {self._clean(text)}") from None
        try:
            return check(payload)
        except Malformed as error:
            raise _Again(
                error.reason, f"a response of the wrong form: {self._clean(text)}"
            ) from None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            raise _Again("shape", f"a response of the wrong form: {self._clean(text)}") from None

    def _exchange(
        self, path: str, body: dict[str, Any] | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        if key := os.environ.get(self._variable):
            headers["Authorization"] = f"Bearer {key}"
        link = self._idle.pop() if self._idle else self._connect()
        try:
            found = self._read(link, "POST" if data else "GET", path, data, headers)
        except BaseException as error:
            link.close()
            if isinstance(error, TimeoutError):
                raise _Again("timeout", f"nothing in {self.timeout:g} s") from None
            if isinstance(error, http.client.IncompleteRead):
                raise _Again("json", "a response that was cut short") from None
            if isinstance(error, (http.client.HTTPException, OSError)):
                raise _Again("connection", str(error) or type(error).__name__) from None
            raise
        self._idle.append(link)
        return found

    def _read(
        self, link: http.client.HTTPConnection, verb: str, path: str, data: bytes | None,
        headers: dict[str, str],
    ) -> tuple[int, http.client.HTTPMessage, bytes]:  # fmt: skip
        deadline = time.monotonic() + self.timeout
        link.request(verb, self.base + path, data, headers)
        with link.getresponse() as response:
            received = bytearray()
            while piece := response.read1(1 << 16):
                received += piece
                if len(received) > _LARGEST:
                    raise _Again("shape", f"a response of more than {_LARGEST} bytes")
                if time.monotonic() > deadline:  # each piece came in time, the whole did not
                    raise TimeoutError
            if response.length:  # bytes that were promised and did not come
                raise _Again("json", "a response that was cut short")
            return response.status, response.headers, bytes(received)

    def _refuse(self, status: int, headers: http.client.HTTPMessage, text: str) -> None:
        said = self._clean(text)
        if status in _RETRIED:
            reason = "rate" if status == 429 else "status"
            raise _Again(reason, f"status {status}: {said}", after(headers.get("Retry-After")))
        if status in (400, 413, 422):
            raise Rejected("too_long" if status == 413 or _TOO_LONG.search(text) else "refused")
        if status in (401, 403):
            raise UsageError(
                f"The server refuses the key (status {status}): {said}",
                where=self.address,
                fix=f"set {self._variable} in the environment",
            )
        raise _Unknown(
            f"The server answers {status}: {said}",
            where=self.address,
            fix="check the address (it ends in /v1 as a rule) and the name of the model",
        )

    def _clean(self, text: str) -> str:
        """What a server says, short and without the key."""
        if key := os.environ.get(self._variable):
            text = text.replace(key, "***")
        return " ".join(text.split())[:200]

    # ------------------------------------------------------------ connections and pauses

    def _connect(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        return kind(str(self._parts.hostname), self._parts.port, timeout=self.timeout)

    def _wait(self, body: dict[str, Any]) -> None:
        if self.budget is not None and self.usage.tokens >= self.budget:
            raise BudgetError(
                f"The token budget of {self.budget} is used up.",
                fix="give more; the same command goes on where it stopped",
            )
        # About four bytes a token: a rate needs no better.
        size = len(json.dumps(body)) / 4 + float(body.get("max_tokens", 0))
        pause = max(
            self._requests.take(1), self._tokens.take(size), self._not_before - time.monotonic()
        )
        if pause > 0 and self.stop.wait(pause):
            raise BackendError("Stopped.")

    def _pause(self, attempt: int, trouble: _Again) -> None:
        pause = min(self.backoff * 2 ** (attempt - 1), self.longest)
        pause *= 0.5 + 0.5 * self._random.random()
        if trouble.after is not None:
            pause = max(pause, min(trouble.after, self.longest))
            # The server speaks to all threads of ours.
            self._not_before = max(self._not_before, time.monotonic() + pause)
        if self.stop.wait(pause):
            raise BackendError("Stopped.")


def _close(links: list[http.client.HTTPConnection]) -> None:
    while links:
        links.pop().close()


class Rate:
    """Spreads amounts over time: at most ``per_minute``, a second's worth at once."""

    def __init__(self, per_minute: float | None) -> None:
        if per_minute is not None and per_minute <= 0:
            raise UsageError(f"A rate of {per_minute} per minute lets nothing pass.")
        self.per_second = None if per_minute is None else per_minute / 60
        self._free = 0.0
        self._lock = threading.Lock()

    def take(self, amount: float) -> float:
        """Seconds to wait before this amount may pass."""
        if self.per_second is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            start = max(self._free, now - 1)
            self._free = start + amount / self.per_second
            return start - now


def after(header: str | None) -> float | None:
    """Seconds of a Retry-After header: a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
