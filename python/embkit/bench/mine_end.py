"""From embeddings to filtered negatives, each way in a process of its own, which measures itself.

    python -m embkit.bench.mine_end WAY FOLDER     ways: embkit, st-faiss, st

FOLDER has the vectors and texts (:class:`Work`). The last line of output is JSON: CPU and wall
seconds, bytes by which the peak grew, and seconds of the search where they can be told apart. The
negatives are left in ``WAY.npz``: query and passage positions of each.

The rules are those that sentence-transformers has: 7 negatives among the 71 nearest, none above 95%
of the positive's score; ours drop near-duplicates of the positive as well.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Reported, Sample
from embkit.bench.corpus import Pairs, pairs
from embkit.errors import EmbkitError

KEEP, CANDIDATES, SHARE = 7, 71, 0.95
WAYS = {
    "embkit": "embkit",
    "mine_hard_negatives, faiss": "st-faiss",
    "mine_hard_negatives": "st",
}
_D = 384
_WORD = re.compile(r"[a-z0-9_][a-z0-9_+#]*")


class Work:
    """The pairs in a temporary folder, and what each way made of them."""

    def __init__(self, made: Pairs) -> None:
        self.pairs = made
        self.home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
        path = Path(self.home.name)
        np.savez(
            path / "vectors.npz",
            queries=made.query_vectors, passages=made.passage_vectors, positive=made.positive,
        )  # fmt: skip
        (path / "texts.json").write_text(json.dumps([made.queries, made.passages]))
        self.said: dict[str, dict[str, Any]] = {}

    def run(self, way: str) -> Reported:
        """One run; its value are the negatives."""
        source = str(Path(__file__).resolve().parents[2])
        quiet = {"OMP_NUM_THREADS": "1", "EMBKIT_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        paths = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "embkit.bench.mine_end", way, self.home.name]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False,
            env={**os.environ, **quiet, "PYTHONPATH": paths},
        )  # fmt: skip
        if done.returncode:
            raise EmbkitError(f"{way} failed: {done.stderr.strip().splitlines()[-1]}")
        said = json.loads(done.stdout.splitlines()[-1])
        self.said[way] = said
        with np.load(Path(self.home.name) / f"{way}.npz") as found:
            value = (found["query"], found["passage"])
        return Reported(value, Sample(said["cpu"], said["wall"], said["peak"]))

    @cache  # noqa: B019 - the object lives as long as its results are wanted
    def once(self, way: str) -> Reported:
        """A way that takes minutes: one run serves every row."""
        return self.run(way)

    def close(self) -> None:
        """Remove the folder."""
        self.home.cleanup()

    def rivals(self) -> dict[str, Callable[[], Reported]]:
        """The ways that are not ours, by the name of their row."""
        return {n: partial(self.once, way) for n, way in WAYS.items() if way != "embkit"}

    def near_share(self, found: tuple[np.ndarray, np.ndarray]) -> float:
        """Negatives whose word-3-gram Jaccard with their positive reaches 0.7, of ASCII pairs."""
        query, passage = found
        order = np.random.default_rng(0).permutation(len(query))[:30_000]
        sets: dict[int, frozenset[tuple[str, ...]]] = {}
        near = seen = 0
        for q, p in zip(query[order].tolist(), passage[order].tolist(), strict=True):
            ours = int(self.pairs.positive[q])
            if not (self.pairs.passages[ours].isascii() and self.pairs.passages[p].isascii()):
                continue
            for row in (ours, p):
                if row not in sets:
                    sets[row] = _shingles(self.pairs.passages[row])
            a, b = sets[ours], sets[p]
            seen += 1
            near += len(a & b) >= 0.7 * len(a | b)
        return near / max(seen, 1)


@cache
def work(quick: bool) -> Work:
    """64,000 passages and as many queries; 2,000 when quick."""
    return Work(pairs(2_000 if quick else 64_000, _D, quick))


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return frozenset(tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1)))


# ---------------------------------------------------------------- in the process of its own


def _ours(q: Any, p: Any, positive: Any, texts: Any) -> tuple[Any, Any, dict[str, float]]:
    from embkit.mine import mine_vectors

    found = mine_vectors(
        q, p, positive, texts=texts[1], k=KEEP, candidates=CANDIDATES, percent_of_positive=SHARE
    )
    owner = np.repeat(np.arange(len(q)), np.diff(found.offsets.astype(np.int64)))
    return owner, found.row.astype(np.int64), {}


class _Given:
    """The model of `mine_hard_negatives`: it looks its embeddings up."""

    def __init__(self, q: Any, p: Any, queries: list[str], passages: list[str]) -> None:
        import torch

        self.device = torch.device("cpu")
        self.q, self.p = q, p
        self.query = {t: i for i, t in enumerate(queries)}
        self.passage = {t: i for i, t in enumerate(passages)}

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        return self.q[[self.query[t] for t in texts]]

    def encode_document(self, texts: list[str], **_: Any) -> Any:
        return self.p[[self.passage[t] for t in texts]]

    def get_embedding_dimension(self) -> int:
        return int(self.q.shape[1])

    def similarity(self, a: Any, b: Any) -> Any:
        import torch

        return torch.as_tensor(a) @ torch.as_tensor(b).T

    def similarity_pairwise(self, a: Any, b: Any) -> Any:
        import torch

        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(1)


def _theirs(
    q: Any, p: Any, positive: Any, texts: Any, use_faiss: bool
) -> tuple[Any, Any, dict[str, float]]:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    queries, passages = texts
    model = _Given(q, p, queries, passages)
    rows = {"anchor": queries, "positive": [passages[i] for i in positive.tolist()]}
    spent = [0.0]
    if use_faiss:
        _clock_faiss(spent)
    found = mine_hard_negatives(
        Dataset.from_dict(rows), model, corpus=passages, relative_margin=1 - SHARE,
        num_negatives=KEEP, sampling_strategy="top", use_faiss=use_faiss,
        output_format="n-tuple", verbose=False,
    )  # fmt: skip
    columns = [found[f"negative_{i}"] for i in range(1, KEEP + 1)]
    about = {"search_cpu": spent[0]} if use_faiss else {}
    owner = np.repeat([model.query[t] for t in found["anchor"]], KEEP)
    return owner, [model.passage[c[i]] for i in range(len(found)) for c in columns], about


def _clock_faiss(spent: list[float]) -> None:
    """Count the seconds of faiss apart from the Python around it."""
    import faiss

    def clocked(inner: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return inner(*args, **options)
            finally:
                spent[0] += time.process_time() - begun

        return call

    for name in ("add", "search"):
        setattr(faiss.IndexFlatIP, name, clocked(getattr(faiss.IndexFlatIP, name)))


def main(way: str, home: Path) -> None:
    """Measure one way."""
    from embkit.bench.mine_rivals import timed

    with np.load(home / "vectors.npz") as kept:
        q, p, positive = (np.array(kept[x]) for x in ("queries", "passages", "positive"))
    texts = json.loads((home / "texts.json").read_text())
    if way == "embkit":
        from embkit.mine import mine_vectors  # noqa: F401 - the import is not the work

        do: Any = lambda: _ours(q, p, positive, texts)  # noqa: E731
    else:
        import datasets  # noqa: F401
        import torch
        from sentence_transformers.util import mine_hard_negatives  # noqa: F401

        torch.set_num_threads(1)
        do = lambda: _theirs(q, p, positive, texts, way == "st-faiss")  # noqa: E731
    (query, passage, about), took = timed(do)
    np.savez(home / f"{way}.npz", query=np.asarray(query), passage=np.asarray(passage, np.int64))
    said = {"cpu": took.cpu, "wall": took.wall, "peak": took.peak, "queries": len(q), **about}
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
