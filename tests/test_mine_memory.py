"""The cap on the memory of mining: kept, or refused before the work begins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory import growth

from embkit import data
from embkit.errors import UsageError
from embkit.mine import load_negatives, mine, mine_vectors

N, D, K = 12_000, 256, 16
SETTINGS: dict[str, Any] = {"k": K, "candidates": 100, "percent_of_positive": None, "threads": 2}


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unit vectors [2 N, D] around 200 centres, in a file: passages, then queries."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, D), np.float32)
    x = rng.standard_normal((2 * N, D), np.float32) + 2 * centres[rng.integers(0, 200, 2 * N)]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    path = tmp_path_factory.mktemp("vectors") / "vectors.npy"
    np.save(path, x)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> data.Store:
    """A retrieval task of N pairs; nothing is like anything."""
    root = tmp_path_factory.mktemp("memory")
    lines = (
        json.dumps({"query": f"q{i} w{i % 97}", "positive": f"p{i} of a{i % 89} b{i % 83} c{i}"})
        for i in range(N)
    )
    (root / "pairs.jsonl").write_text("\n".join(lines))
    records = data.read(root / "pairs.jsonl", task="retrieval")
    return data.tokenize(records, out=root / "store", vocab_size=300, max_length_passage=8)


def least(error: str) -> int:
    found = re.search(r"takes (\d+) MB at the least here", error)
    assert found, error
    return int(found[1]) * 10**6


@pytest.mark.promise
@pytest.mark.parametrize("search", [{"engine": "exact"}, {"engine": "ivf", "recall": 0.9}])
def test_arrays_keep_the_cap(vectors: Path, search: dict[str, Any]) -> None:
    mapped = np.load(vectors, mmap_mode="r")
    corpus, queries, positives = mapped[:N], mapped[N:], np.arange(N)
    texts = [f"passage {i} of {i % 97} about {i % 89} and {i}" * 4 for i in range(N)]

    def run(memory: int) -> Any:
        return mine_vectors(
            queries, corpus, positives, texts=texts, memory=memory, **SETTINGS, **search
        )

    with pytest.raises(UsageError, match="MB at the least here, not 1 MB") as refused:
        run(10**6)
    result = N * (K * 16 + 16)
    bound = least(str(refused.value))
    assert bound < 60e6
    for cap in (bound, 2 * bound):
        took = growth(lambda cap=cap: run(cap))
        assert took <= 1.1 * cap + result, f"{took / 1e6:.1f} MB under a cap of {cap / 1e6} MB"


@pytest.mark.promise
@pytest.mark.parametrize("search", [{"engine": "exact"}, {"engine": "ivf", "recall": 0.9}])
def test_stores_keep_the_cap(
    store: data.Store, vectors: Path, tmp_path: Path, search: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("EMBKIT_PROGRESS", "off")

    def run(memory: int, out: str) -> None:
        mine(
            None, store, embeddings=vectors, out=tmp_path / out, memory=memory,
            **SETTINGS, **search,
        )  # fmt: skip

    with pytest.raises(UsageError, match="MB at the least") as refused:
        run(10**6, "refused")
    assert not (tmp_path / "refused").exists()
    bound = least(str(refused.value))
    assert bound < 60e6
    result = N * (K * 16 + 16)
    for cap in (bound, 2 * bound):
        took = growth(lambda cap=cap: run(cap, f"at-{cap}"))
        assert took <= 1.1 * cap + result, f"{took / 1e6:.1f} MB under a cap of {cap / 1e6} MB"
        kept = load_negatives(tmp_path / f"at-{cap}", "retrieval")
        assert len(kept[1]) > N
