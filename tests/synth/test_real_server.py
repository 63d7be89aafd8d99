"""Gecko's chain over a server that others wrote, llama-cpp-python's, killed and resumed.

Its log-probabilities differ a little with what it was asked before (it keeps a prefix), so two
runs may differ. What is promised: an answer that came is never asked for again, rows that were
done stay, nothing is lost or doubled, and the ranking is that of the model in process.
"""

from __future__ import annotations

import http.client
import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import loads
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import killing
import numpy as np
import pytest
import tiny
from real_chain import (
    Shards,
    chain,
    check_chain,
    check_done,
    has_shard,
    real_passages,
    rows_of,
    shards,
    word_encoder,
)
from scipy.stats import spearmanr

from embkit import container
from embkit.bench import llm as real
from embkit.data.records import Records
from embkit.errors import EmbkitError
from embkit.synth import Relabel, Server, Write
from embkit.synth.cache import Cache
from embkit.synth.prompts import load
from embkit.synth.score import query_likelihoods

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# The server sorts its whole vocabulary for every token of a prompt, 0.1 s each: few and short ones.
SHORT = {
    "likelihood": '[[steps]]\none_line = true\ninstructions = "Questions."\n'
    'item = "{passage}\\nQuestion:"\nanswer = "{query}"\n',
    "grade": '[[steps]]\none_line = true\ninstructions = "Yes or No."\n'
    'item = "{passage}\\nQuestion: {query}\\nAnswer:"\n[steps.labels]\nYes = 3.0\nNo = 0.0\n',
}
N = 3
SPEARMAN = 0.95  # of likelihoods here and there: the server's activations have 8 bits


@pytest.fixture(scope="module")
def model() -> Any:
    """The model in process, reading texts as the server does; with it the server is there."""
    try:
        with real.server():
            found = real.real_model(chat=False)
    except EmbkitError as error:
        pytest.skip(f"no language model and server, which `make llm` makes: {error}")
    vars(found)["_begin"] = found.tokenizer.bos_token_id
    return found


class Counted:
    """What was sent through :func:`counting`: keys of the request cache, in order."""

    def __init__(self, url: str) -> None:
        self.url, self.sent, self.lock = url, list[str](), threading.Lock()


@contextmanager
def counting(behind: str) -> Iterator[Counted]:
    """A server in front of a server, which keeps count."""
    to = urlsplit(behind)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with found.lock:
                found.sent.append(Cache.key(self.path.removeprefix(to.path), loads(body)))
            upstream = http.client.HTTPConnection(str(to.hostname), to.port, timeout=600)
            with closing(upstream) as link:
                link.request("POST", self.path, body, {"Content-Type": "application/json"})
                answer = link.getresponse()
                data = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass  # clients that were killed

    with Quiet(("127.0.0.1", 0), Handler) as server:
        found = Counted(f"http://127.0.0.1:{server.server_address[1]}{to.path}")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        server.shutdown()


def answered(cache: Path) -> set[str]:
    """Requests whose answers are kept."""
    if not cache.exists():
        return set()
    with closing(sqlite3.connect(f"file:{cache}?mode=ro", uri=True)) as db:
        try:
            return {str(key) for (key,) in db.execute("SELECT key FROM answers")}
        except sqlite3.OperationalError:  # it is just being made
            return set()


def test_the_chain_over_a_server_killed_and_resumed(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "HANG", 1500.0)  # a busy machine is not a hanging child
    passages = real_passages(4, 10)
    encoder = word_encoder(passages)  # once: its weights are random
    prompts = {name: tmp_path / f"{name}.toml" for name in SHORT}
    for name, path in prompts.items():
        path.write_text(f'name = "{name}"\n{SHORT[name]}')
    write = Write(prompt="gecko-lines", temperature=0.0, shard=1)
    how = Relabel(
        candidates=N, likelihood=prompts["likelihood"], relevance=prompts["grade"], shard=1
    )
    cache, out = tmp_path / "answers.sqlite", tmp_path / "killed"
    rng, done = random.Random(0), dict[str, Shards]()
    with real.server() as behind, counting(behind) as counted:

        def run(out: Path = out) -> Server:
            llm = Server(
                counted.url, "smollm2", chat=False, concurrency=1, timeout=600, cache=cache
            )
            chain(
                passages, encoder, llm, out, write=write, relabelling=how,
                grade=prompts["grade"],
            )  # fmt: skip
            return llm

        before = set[str]()
        for stage, more in (("queries", 0), ("relabelled", 0), ("relabelled", 4)):
            aim, start = len(answered(cache)) + more, len(counted.sent)
            killed = killing.attempt(
                run,
                lambda stage=stage, aim=aim: has_shard(out, stage) and len(answered(cache)) >= aim,
                rng,
                jitter=0.5,
            )
            assert killed and not before & set(counted.sent[start:])
            before, done[stage] = answered(cache), shards(out, stage)
            assert done[stage]
        start = len(counted.sent)
        llm = run()
        assert not before & set(counted.sent[start:])
        assert not llm.usage.rejected and not llm.usage.retries
        # What was sent twice was on its way when its sender was killed.
        assert len(counted.sent) - len(set(counted.sent)) <= 3
        assert answered(cache) == set(counted.sent)
    assert not tiny.strays(out)
    check_chain(out, passages, llm, write, N)
    check_done(out, done, 1)
    assert sum(not row["reason"] for row in rows_of(out)) >= 3
    # The server is gone; whoever starts anew has all from the cache.
    again = run(tmp_path / "again")
    assert not again.usage.requests and again.usage.cached >= len(set(counted.sent))
    assert tiny.tree(tmp_path / "again") == tiny.tree(out)
    check_likelihoods(model, out, prompts["likelihood"])


def check_likelihoods(model: Any, out: Path, prompt: Path) -> None:
    """Those of the server rank as those in process do."""
    records, step = Records.open(out / "queries"), load(prompt).steps[0]
    scores = container.load(out / "relabelled" / "relabel-synthetic.safetensors")
    text_of = {int(t): records.texts.get(i) for i, t in enumerate(records.texts.text_id)}
    queries = [records.texts.get(int(q)) for q in records.tasks()["synthetic"].query]
    prompts = [step.render({"passage": text_of[int(t)]}) for t in scores["text_id"]]
    want, why = query_likelihoods(model, prompts, [q for q in queries for _ in range(N)])
    assert not any(why)
    agreement = spearmanr(want, scores["likelihood"]).statistic
    error = np.abs(want - scores["likelihood"]) / np.abs(want)
    print(f"Spearman {agreement:.4f}, relative error mean {error.mean():.4f} max {error.max():.4f}")
    assert agreement >= SPEARMAN


def test_values_of_the_server_are_those_in_process(model: Any) -> None:
    pairs = [(" ".join(text.split()[:8]), f" {text.split()[8]}") for text in real_passages(6, 9)]
    want = np.array([one.value for one in model.loglikelihood(pairs)])
    with real.server() as url:
        server = Server(url, "smollm2", chat=False, concurrency=1, timeout=300)
        assert server.likelihood == "echo"
        found = np.array([one.value for one in server.loglikelihood(pairs)])
    assert np.abs(found - want).max() < 0.15 * np.abs(want).max()
    with real.server(first=False) as url:  # its echoed values belong to other tokens
        server = Server(url, "smollm2", chat=False, concurrency=1, timeout=300)
        assert server.likelihood != "echo"
