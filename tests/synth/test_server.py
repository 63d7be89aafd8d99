"""A server on loopback: what it can do is found out, what fails is tried again or rejected."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import Fault, Loopback

from embkit.errors import UsageError
from embkit.synth import BackendError, Server
from embkit.synth.llm import FIRST_TOKEN, LOGLIKELIHOOD
from embkit.synth.local import Local
from embkit.synth.transport import BudgetError, Rate, after

FAST: dict[str, Any] = {"backoff": 0.01, "timeout": 0.4, "longest": 5.0}
PAIRS = [(f"the passage {i}\nQuery:", f" that {i} in") for i in range(12)]


def first(*names: str) -> Fault:
    """Each of these once, then no fault any more."""
    left = list(names)
    return lambda path, body: left.pop(0) if left else ""


@pytest.mark.parametrize("way", ["echo", "prompt_logprobs"])
def test_likelihood_of_a_server_is_that_in_process(lm: Any, way: str) -> None:
    want = Local(*lm).loglikelihood(PAIRS)
    with Loopback(*lm, likelihood=way) as loop:
        server = Server(loop.url, **FAST)
        assert LOGLIKELIHOOD in server.capabilities and server.likelihood == way
        found = server.loglikelihood(PAIRS)
    assert server.name == "tiny"
    for got, one in zip(found, want, strict=True):
        assert math.isclose(got.value, one.value, rel_tol=1e-5) and got.tokens == one.tokens


def test_without_likelihoods_first_tokens_are_taken_and_nothing_is_made_up(lm: Any) -> None:
    with Loopback(*lm, likelihood="first") as loop:
        server = Server(loop.url, "tiny", **FAST)
        assert server.capabilities >= {FIRST_TOKEN} and LOGLIKELIHOOD not in server.capabilities
        assert server.first_token(["q"], ["Highly", "Not", "Perfectly"]) == [[-0.1, -2.5, -5]]
        with pytest.raises(UsageError, match="no log-probabilities"):
            server.loglikelihood(PAIRS)
    with Loopback(*lm, likelihood="") as loop:
        assert Server(loop.url, "tiny", **FAST).likelihood == ""


def test_echoed_values_that_belong_to_other_tokens_are_not_taken(lm: Any) -> None:
    want = Local(*lm).loglikelihood(PAIRS)
    with Loopback(*lm, likelihood="best") as loop:
        server = Server(loop.url, "tiny", **FAST)
        assert server.likelihood == "echo"
        for got, one in zip(server.loglikelihood(PAIRS), want, strict=True):
            assert math.isclose(got.value, one.value, rel_tol=1e-5)
    with Loopback(*lm, likelihood="shifted") as loop:
        server = Server(loop.url, "tiny", **FAST)
        assert server.likelihood == "" and LOGLIKELIHOOD not in server.capabilities


@pytest.mark.parametrize(
    "fault", ["down", "slow", "rate", "status", "html", "json", "truncated", "shape"]
)
def test_trouble_is_tried_again_and_counted(lm: Any, fault: str) -> None:
    counted = {"down": "connection", "slow": "timeout", "truncated": "json"}.get(fault, fault)
    with Loopback(*lm) as loop:
        server = Server(loop.url, "tiny", concurrency=1, **FAST)
        assert server.likelihood == "echo"
        want = server.loglikelihood(PAIRS[:3])
        loop.fault = first(fault, fault)
        assert server.loglikelihood(PAIRS[:3]) == want
        assert loop.faults[fault] == 2
        assert server.usage.retries == {counted: 2}
        assert not server.usage.rejected


def test_a_pause_that_the_server_asks_for_holds_for_all_threads(lm: Any) -> None:
    with Loopback(*lm) as loop:
        server = Server(loop.url, "tiny", concurrency=4, **FAST)
        assert server.likelihood == "echo"
        loop.fault = first("rate")
        began = time.monotonic()
        server.generate(["a"])
        assert time.monotonic() - began >= 0.3


def test_a_server_that_is_gone_is_an_error_and_keeps_no_secret(
    lm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Loopback(*lm, fault=lambda path, body: "key") as loop:
        server = Server(loop.url, "tiny", cache=tmp_path / "cache.sqlite", **FAST)
        with pytest.raises(UsageError, match="refuses the key") as error:
            server.generate(["a"])
        assert "secret" not in str(error.value)
        assert loop.keys == ["Bearer sk-very-secret"]
        loop.fault = lambda path, body: ""
        server.generate(["a"])
    with pytest.raises(BackendError, match=r"does not answer.*3 attempts") as gone:
        Server(loop.url, "tiny", retries=2, **FAST).generate(["a", "b"])
    assert "secret" not in str(gone.value) and gone.value.exit_code == 4
    files = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"secret" not in files and b"yes" in files


def test_rows_are_rejected_with_a_reason_in_their_place(lm: Any) -> None:
    def fault(path: str, body: dict[str, Any]) -> str:
        text = str(body)
        return next((f for f in ("empty", "shape", "refused") if f"<{f}>" in text), "")

    with Loopback(*lm, fault=fault, longest=100) as loop:
        server = Server(loop.url, "tiny", **FAST)
        found = server.generate(["a", "<empty>", "x" * 200, "<refused>", "b"])
        assert [c.reason for c in found] == ["", "empty", "too_long", "refused", ""]
        assert [c.text for c in found] == ["yes", "", "", "", "yes"]
        scores = server.loglikelihood([PAIRS[0], ("<shape> q", " a"), ("x" * 200, " a"), PAIRS[1]])
        assert [s.reason for s in scores] == ["", "shape", "too_long", ""]
        assert all(math.isnan(s.value) == bool(s.reason) for s in scores)
        assert server.usage.rejected == {"empty": 1, "too_long": 2, "refused": 1, "shape": 1}


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: p["token_logprobs"].pop(),
        lambda p: p["token_logprobs"].__setitem__(-3, None),
        lambda p: p["token_logprobs"].__setitem__(-3, 0.7),
        lambda p: p["token_logprobs"].__setitem__(-3, float("nan")),
        lambda p: p["text_offset"].reverse(),
        lambda p: p.__setitem__("text_offset", [o * 2 for o in p["text_offset"]]),
        lambda p: p.clear(),
    ],
)
def test_log_probabilities_of_the_wrong_form_are_never_taken(
    lm: Any, harm: Callable[[dict[str, Any]], Any]
) -> None:
    with Loopback(*lm) as loop:
        server = Server(loop.url, "tiny", **FAST)
        assert server.likelihood == "echo"
        complete = loop.complete

        def harmed(body: dict[str, Any]) -> Any:
            payload = complete(body)
            assert payload
            harm(payload["choices"][0]["logprobs"])
            return payload

        loop.complete = harmed  # type: ignore[method-assign]
        assert [s.reason for s in server.loglikelihood(PAIRS[:1])] == ["shape"]


def test_a_restart_asks_for_nothing_twice(lm: Any, tmp_path: Path) -> None:
    with Loopback(*lm) as loop:
        first_time = Server(loop.url, "tiny", cache=tmp_path / "c.sqlite", **FAST)
        want = first_time.loglikelihood(PAIRS), first_time.generate(["a", "b"], seeds=[1, 2])
        asked = sum(loop.seen.values())
        again = Server(loop.url, "tiny", cache=tmp_path / "c.sqlite", **FAST)
        assert (again.loglikelihood(PAIRS), again.generate(["a", "b"], seeds=[1, 2])) == want
        assert sum(loop.seen.values()) == asked and again.usage.requests == 0
        assert again.usage.cached == len(PAIRS) + 3  # and the probe
        again.generate(["a"], seeds=[3])
        again.generate(["a"], seeds=[1], max_tokens=9)
        assert sum(loop.seen.values()) == asked + 2
    db = tmp_path / "c.sqlite"
    first_time.transport.cache.close()  # type: ignore[union-attr]
    again.transport.cache.close()  # type: ignore[union-attr]
    data = db.read_bytes()
    db.write_bytes(data.replace(b'"text": "yes"', b'"text": "no!"'))
    with Loopback(*lm) as loop:  # a damaged answer is asked for again
        server = Server(loop.url, "tiny", cache=db, **FAST)
        assert [c.text for c in server.generate(["a", "b"], seeds=[1, 2])] == ["yes", "yes"]
        assert sum(loop.seen.values()) == 2


def test_budget_and_rates(lm: Any) -> None:
    with Loopback(*lm) as loop:
        server = Server(loop.url, "tiny", concurrency=1, token_budget=25, **FAST)
        with pytest.raises(BudgetError, match="25 is used up"):
            server.generate([str(i) for i in range(9)])
        assert sum(loop.seen.values()) == 3  # of ten tokens each
    rate = Rate(600)  # ten a second, a second's worth at once
    waits = [rate.take(1) for _ in range(15)]
    assert sum(w > 0 for w in waits) in (4, 5) and 0.3 < waits[-1] < 0.5


def test_retry_after_is_seconds_or_a_date() -> None:
    assert after("3") == 3 and after(None) is None and after("soon") is None
    assert after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_requests_share_connections(lm: Any) -> None:
    opened = itertools.count()
    with Loopback(*lm) as loop:
        server = Server(loop.url, "tiny", concurrency=2, **FAST)
        kind = loop.http.get_request
        made = []
        loop.http.get_request = lambda: (made.append(next(opened)), kind())[1]  # type: ignore[method-assign]
        server.generate([str(i) for i in range(20)])
    assert len(made) <= 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://user:pw@x/v1", "http://"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no address") as error:
        Server(url)
    assert "pw" not in str(error.value)
