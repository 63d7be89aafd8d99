"""Mining against a naive miner that ranks and filters with Python loops."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import killing
import numpy as np
import pytest

from embkit import container, data
from embkit.data import embeddings
from embkit.errors import CorruptError, UsageError
from embkit.mine import candidates_of, explain, load_negatives, mine, miner, work
from embkit.model import Encoder
from embkit.recipe import Model

TASK = "retrieval"
ALONE: dict[int, Any] = {}  # vectors of the one store and encoder, each embedded by itself


@pytest.fixture(scope="module")
def store(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> data.Store:
    root = tmp_path_factory.mktemp("mine")
    clean = data.dedup(small_data, out=root / "clean")
    return data.tokenize(clean, out=root / "store", vocab_size=900, max_length_passage=24)


@pytest.fixture(scope="module")
def encoder(store: data.Store) -> Encoder:
    model = Model(hidden=24, layers=1, heads=2, intermediate=32, dims=(20, 12))
    return Encoder.from_config(
        model, store.tokenizer, max_length=store.max_length, prompts=store.prompts
    )


def files(directory: Path) -> dict[str, bytes]:
    found = (p for p in sorted(directory.rglob("*")) if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in found}


@functools.cache
def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def jaccard(a: str, b: str) -> float:
    x, y = shingles(a), shingles(b)
    return len(x & y) / len(x | y)


def naive(
    encoder: Encoder, store: data.Store, *, k: int, candidates: int, rules: dict[str, Any]
) -> list[list[int]]:
    """Rows of the negatives of every example."""
    table = store.examples(TASK)
    corpus = sorted({*table.positive.tolist(), *table.negative.tolist()})
    for row in sorted({*corpus, *table.query.tolist()} - set(ALONE)):
        ALONE[row] = encoder.encode_rows(store, np.array([row], np.uint64))[0].astype(float)
    vectors = ALONE
    clusters = dict(zip(corpus, store.cluster(np.array(corpus, np.uint64)).tolist(), strict=True))
    out = []
    for i, query in enumerate(table.query.tolist()):
        span = slice(*table.positive_offsets[i : i + 2].astype(int).tolist())
        positives = table.positive[span].tolist()
        low = min(float(vectors[query] @ vectors[p]) for p in positives)
        own = {store.cluster(np.array([query], np.uint64))[0], *(clusters[p] for p in positives)}
        score = {row: float(vectors[query] @ vectors[row]) for row in corpus}
        ranked = sorted(corpus, key=lambda row: (-score[row], row))
        kept: list[int] = []
        left = [r for r in ranked if r not in positives and clusters[r] not in own]
        close = [store.text(t) for t in [query, *positives]]
        for row in left[rules.get("skip", 0) : candidates]:
            s = score[row]
            if s > low - abs(low) * (1 - rules["percent"]):
                continue
            if "margin" in rules and s > low - rules["margin"]:
                continue
            if "max_score" in rules and s > rules["max_score"]:
                continue
            if any(jaccard(store.text(row), t) >= 0.7 for t in close):
                continue
            kept.append(row)
            if len(kept) == k:
                break
        out.append(kept)
    return out


@pytest.mark.parametrize(
    "rules",
    [{"percent": 0.95}, {"percent": 1.0, "skip": 3}, {"percent": 0.99, "margin": 0.01},
     {"percent": 1.0, "max_score": 0.9}],
)  # fmt: skip
def test_negatives_equal_a_naive_miner(
    encoder: Encoder, store: data.Store, tmp_path: Path, rules: dict[str, Any]
) -> None:
    given = {("percent_of_positive" if k == "percent" else k): v for k, v in rules.items()}
    # All of the corpus are candidates here, so that both look at the same ones.
    out = mine(encoder, store, out=tmp_path / "mined", k=3, candidates=400, **given)
    offsets, row, score, rank = load_negatives(out, TASK)
    ends = offsets.astype(int).tolist()
    got = [row[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]
    want = naive(encoder, store, k=3, candidates=400, rules=rules)
    same = sum(a == b for a, b in zip(got, want, strict=True))
    # Scores within rounding of the limit may fall on either side of it.
    assert same >= 0.98 * len(want)
    assert sum(map(len, got)) > 0
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        assert (np.diff(score[a:b]) <= 0).all() and (np.diff(rank[a:b].astype(int)) > 0).all()


def test_no_positive_query_or_near_copy_is_ever_a_negative(tmp_path: Path) -> None:
    text = "an editor for plain text files with syntax colours and many small windows for code"
    rows = [
        {"query": "text editor", "positive": text},
        {"query": "editor of texts", "positive": text.replace("code", "notes")},
        {"query": text, "positive": "a tool that edits files"},  # the query is in the corpus
        {"query": "a player", "positive": "plays sounds and music from the shell"},
        {"query": "a mailer", "positive": "sends and reads electronic mail", "negative": [text]},
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records = data.read(path, task=TASK).save(tmp_path / "records")  # no dedup: clusters are alone
    store = data.tokenize(records, out=tmp_path / "store", vocab_size=150)
    model = Model(hidden=24, layers=1, heads=2, intermediate=32, dims=(20,))
    small = Encoder.from_config(model, store.tokenizer, max_length=store.max_length)
    out = mine(small, store, out=tmp_path / "mined", k=4, candidates=10, percent_of_positive=None)
    offsets, row, _, _ = load_negatives(out, TASK)
    table = store.examples(TASK)
    for i in range(len(table)):
        query = store.text(int(table.query[i]))
        span = slice(*table.positive_offsets[i : i + 2].astype(int).tolist())
        close = [query, *(store.text(int(p)) for p in table.positive[span])]
        found = [store.text(int(r)) for r in row[int(offsets[i]) : int(offsets[i + 1])]]
        assert found
        for negative in found:
            assert all(jaccard(negative, t) < 0.7 for t in close)
    audit = json.loads((out / "report.json").read_text())["tasks"][TASK]["audit"]
    assert audit["near_duplicate"] > 0


def test_the_audit_adds_up(encoder: Encoder, store: data.Store, tmp_path: Path) -> None:
    out = mine(encoder, store, out=tmp_path / "mined", k=3, candidates=30, percent_of_positive=1.0)
    task = json.loads((out / "report.json").read_text())["tasks"][TASK]
    offsets, row, score, _ = load_negatives(out, TASK)
    counts = np.diff(offsets.astype(int))
    assert task["kept"] == task["audit"]["kept"] == len(row) == counts.sum()
    assert {int(k): v for k, v in task["per_query"].items()} == {
        int(n): int((counts == n).sum()) for n in np.unique(counts)
    }
    totals = ("queries", "candidates", "kept", "short_queries")
    removed = sum(v for k, v in task["audit"].items() if k not in totals)
    assert task["audit"]["queries"] == task["examples"] == len(counts)
    assert task["audit"]["short_queries"] == (counts < 3).sum()
    assert task["audit"]["candidates"] == removed + task["audit"]["kept"]
    assert task["mean_negative_score"] == pytest.approx(float(score.mean()), abs=1e-4)


@pytest.mark.promise
def test_the_same_bytes_with_any_number_of_threads(
    encoder: Encoder, store: data.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = []
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("EMBKIT_THREADS", threads)
        out.append(files(mine(encoder, store, out=tmp_path / threads, sample="random")))
    assert out[0] == out[1] == out[2]


def test_a_killed_run_adopts_whole_blocks_only(
    encoder: Encoder, store: data.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "BLOCK", 100)
    whole = mine(encoder, store, out=tmp_path / "whole")
    names = sorted((whole / "embeddings").iterdir())
    assert len(names) >= 5

    calls = []
    encode = Encoder.encode_rows

    def stops(self: Encoder, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(self, *args, **options)

    monkeypatch.setattr(Encoder, "encode_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        mine(encoder, store, out=tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    partial = next(tmp_path.glob(".partial-killed-*"))
    done = sorted((partial / "embeddings").iterdir())
    assert len(done) == 3
    raw = bytearray(done[1].read_bytes())
    raw[-5] ^= 1  # damaged while the machine was down: must not be adopted
    done[1].write_bytes(raw)
    calls[:] = [1] * 10
    mine(encoder, store, out=tmp_path / "killed")
    assert len(calls) - 10 == len(names) - 2
    assert files(tmp_path / "killed") == files(whole)


def test_a_second_run_is_free(encoder: Encoder, store: data.Store, tmp_path: Path) -> None:
    out = mine(encoder, store, out=tmp_path / "mined")
    stamp = (out / "manifest.json").stat().st_mtime_ns
    mine(encoder, store, out=tmp_path / "mined")
    assert (out / "manifest.json").stat().st_mtime_ns == stamp


def test_embeddings_say_what_made_them(encoder: Encoder, store: data.Store, tmp_path: Path) -> None:
    out = mine(encoder, store, out=tmp_path / "mined")
    path = next((out / "embeddings").iterdir())
    meta = container.metadata(path)
    assert meta["model"] == encoder.digest()
    assert (meta["width"], meta["pooling"], meta["normalised"]) == ("20", "mean", "true")
    tensors = container.load(path)
    norms = np.linalg.norm(tensors["embedding"], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)
    again = encoder.encode_rows(store, tensors["row"][:3])
    np.testing.assert_allclose(tensors["embedding"][:3], again, atol=1e-6)


def test_explain_shows_one_query(encoder: Encoder, store: data.Store, tmp_path: Path) -> None:
    shutil.copytree(store.path, tmp_path / "store")
    out = mine(encoder, data.Store(tmp_path / "store"), out=tmp_path / "mined", candidates=40)
    text = explain(out, 5)
    table = store.examples(TASK)
    assert store.text(int(table.query[5]))[:60] in text
    assert "percent_of_positive 0.95" in text and "example 5" in text
    with pytest.raises(UsageError, match="No task has an example 99999"):
        explain(out, 99999)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(UsageError, match="not beside"):
        explain(out, 5)
    assert explain(out, 5, store=store) == text


def test_wrong_arguments(encoder: Encoder, store: data.Store, tmp_path: Path) -> None:
    out = tmp_path / "x"
    with pytest.raises(UsageError, match="did you mean 'retrieval'"):
        mine(encoder, store, out=out, tasks=["retreival"])
    with pytest.raises(UsageError, match="only retrieval tasks"):
        mine(encoder, store, out=out, tasks=["sts"])
    with pytest.raises(UsageError, match="less than k"):
        mine(encoder, store, out=out, k=8, candidates=4)
    with pytest.raises(UsageError, match="percent_of_positive"):
        mine(encoder, store, out=out, percent_of_positive=95)
    other = data.tokenize(Path(store.path).parent / "clean", out=tmp_path / "s", vocab_size=500)
    with pytest.raises(UsageError, match="different tokenizers"):
        mine(encoder, other, out=out)
    with pytest.raises(CorruptError):
        mine(encoder, tmp_path, out=out)
    assert not out.exists()


# ---------------------------------------------------------------- blocks, vectors, several miners


@pytest.fixture(scope="module")
def vectors(encoder: Encoder, store: data.Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vectors as the encoder's, of every row of the store, in two shards."""
    folder = tmp_path_factory.mktemp("vectors")
    rows = encoder.encode_rows(store, np.arange(store.rows, dtype=np.uint64))
    np.save(folder / "part-0.npy", rows[:777])
    np.save(folder / "part-1.npy", rows[777:])
    return folder


RULES: dict[str, Any] = {"k": 3, "candidates": 30, "percent_of_positive": 0.99, "skip": 1}


def test_given_vectors_mine_what_their_encoder_mines(
    encoder: Encoder, store: data.Store, vectors: Path, tmp_path: Path
) -> None:
    a = mine(encoder, store, out=tmp_path / "a", **RULES)
    b = mine(None, store, embeddings=vectors, out=tmp_path / "b", **RULES)
    name = f"negatives-{TASK}.safetensors"
    assert (a / name).read_bytes() == (b / name).read_bytes()
    assert not (b / "embeddings").exists()
    assert explain(b, 3, store=store, embeddings=vectors) == explain(a, 3, store=store)
    with pytest.raises(UsageError, match="lie elsewhere"):
        explain(b, 3, store=store)
    with pytest.raises(CorruptError, match="not the embeddings that were mined"):
        explain(b, 3, store=store, embeddings=vectors / "part-0.npy")


def test_vectors_that_do_not_belong_to_the_store_are_refused(
    encoder: Encoder, store: data.Store, vectors: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x"
    with pytest.raises(UsageError, match="777 embeddings for the 1491 rows"):
        mine(None, store, embeddings=vectors / "part-0.npy", out=out)
    with pytest.raises(UsageError, match="nothing to mine with"):
        mine(None, store, out=out)
    rows = np.concatenate([np.load(p) for p in sorted(vectors.iterdir())])
    path = tmp_path / "rows.safetensors"
    about = {"model": encoder.digest(), "pooling": "mean", "width": "20", "normalised": "true"}
    about["prompts"] = json.dumps(store.prompts)
    for key, value in (("model", "another"), ("pooling", "cls"), ("normalised", "false"),
                       ("prompts", '{"query": "q: "}')):  # fmt: skip
        container.save(path, {"embedding": rows}, kind=embeddings.KIND,
                       metadata={**about, key: value})  # fmt: skip
        with pytest.raises(UsageError, match=f"have {key}"):
            mine(encoder, store, embeddings=path, out=out)
    rows[[4, 9]] = 0
    np.save(tmp_path / "zero.npy", rows)
    with pytest.raises(UsageError, match="2 vectors of the embeddings in zero.npy are zero"):
        mine(None, store, embeddings=tmp_path / "zero.npy", out=out)
    assert not out.exists()


@pytest.mark.promise
def test_kills_and_block_sizes_do_not_show(
    store: data.Store, vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBKIT_PROGRESS", "off")
    want = files(mine(None, store, embeddings=vectors, out=tmp_path / "whole", **RULES))
    rng = random.Random(7)
    out, landed = tmp_path / "killed", Counter[int]()
    write = work.save_block

    def slowly(*given: Any) -> None:  # so that an aimed kill does not come after the end
        write(*given)
        time.sleep(0.02)

    monkeypatch.setattr(work, "save_block", slowly)

    def blocks() -> int:
        try:  # the folder is renamed when the run is done
            return len(list(tmp_path.glob(".partial-killed-*/blocks/0-*.safetensors")))
        except FileNotFoundError:
            return 0

    for _ in range(200 if os.environ.get("EMBKIT_TEST_FULL") else 12):
        target = blocks() + rng.randint(0, 4)
        monkeypatch.setattr(miner, "MOST", rng.choice([64, 70, 90]))  # it changes from try to try
        killed = killing.attempt(
            lambda: mine(None, store, embeddings=vectors, out=out, **RULES),
            lambda target=target: blocks() >= target,  # type: ignore[misc]
            rng,
            jitter=0.02,
        )
        if killed:
            landed[blocks()] += 1
        else:
            assert files(out) == want
            shutil.rmtree(out)
    monkeypatch.setattr(miner, "MOST", 64)
    mine(None, store, embeddings=vectors, out=out, **RULES)
    assert files(out) == want
    assert sum(landed.values()) >= 6 and len(landed) >= 3, f"kills landed after blocks {landed}"


def test_miners_together_give_their_own_negatives(
    encoder: Encoder, store: data.Store, vectors: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = np.concatenate([np.load(p) for p in sorted(vectors.iterdir())])
    rows += 0.1 * rng.standard_normal(rows.shape).astype(np.float32)
    np.save(tmp_path / "other.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
    one = load_negatives(mine(encoder, store, out=tmp_path / "one", **RULES), TASK)
    two = mine(None, store, embeddings=tmp_path / "other.npy", out=tmp_path / "two", **RULES)
    alone = [one, load_negatives(two, TASK)]
    given: dict[str, Any] = {"embeddings": tmp_path / "other.npy", **RULES}
    keep = mine(encoder, store, out=tmp_path / "keep", **given)
    merge = mine([encoder], store, out=tmp_path / "merge", ensemble="merge", **given)
    table = container.load(keep / f"negatives-{TASK}.safetensors")
    for number, (_, row, score, rank) in enumerate(alone):
        of = table["miner"] == number
        for name, want in (("row", row), ("score", score), ("rank", rank)):
            assert np.array_equal(table[name][of], want)
    ends = table["offsets"].astype(int)
    merged, distinct = load_negatives(merge, TASK), 0
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        assert (np.diff(table["rank"][a:b][table["miner"][a:b] == 0].astype(int)) > 0).all()
        wanted = list(dict.fromkeys(table["row"][a:b].tolist()))
        distinct += len(wanted) < b - a
        assert merged[1][int(merged[0][i]) : int(merged[0][i + 1])].tolist() == wanted
    assert distinct > 0
    assert explain(keep, 0, store=store, embeddings=tmp_path / "other.npy").count("example 0") == 2
    with pytest.raises(UsageError, match="no number 2"):
        candidates_of(keep, 0, task=TASK, store=store, miner=2)


def length_of(queries: list[str], passages: list[str]) -> list[float]:
    return [len(p) + len(set(q) & set(p)) / 10 for q, p in zip(queries, passages, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"sample": "random"}, {"refill": "relax", "k": 9}, {"refill": "random", "k": 20},
     {"reranker": length_of, "rerank_percent": 0.9}],
)  # fmt: skip
def test_explain_agrees_with_the_table(
    store: data.Store, vectors: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    given = {**RULES, **settings, "rerank_candidates": 25}
    out = mine(None, store, embeddings=vectors, out=tmp_path / "mined", **given)
    offsets, row, score, rank = load_negatives(out, TASK)
    task = json.loads((out / "report.json").read_text())["tasks"][TASK]
    counted = Counter[str]()
    table = store.examples(TASK)
    every = "sample" in settings or "reranker" in settings
    for i in range(0, len(table), 1 if every else 7):
        found, scores = candidates_of(out, i, task=TASK, store=store, embeddings=vectors)
        counted.update(c.rule for c in found)
        span = slice(int(offsets[i]), int(offsets[i + 1]))
        drawn = rank[span] == 2**32 - 1
        relaxed = (rank[span] >> 31 == 1) & ~drawn
        want = set(zip(row[span].tolist(), score[span].tolist(), strict=True))
        shown = {(c.row, c.score) for c in found if c.rule in ("kept", "relaxed")}
        assert shown == {(r, s) for r, s in want if np.isfinite(s)}
        assert sum(c.rule == "relaxed" for c in found) == relaxed.sum()
        low = min(scores)
        for c in found:
            if c.rule == "percent":
                assert c.number == pytest.approx(low - abs(low) * 0.01, abs=1e-6)
                assert c.number is not None and c.score > c.number - 1e-6
            if c.rule == "near_duplicate":
                assert c.number is not None and c.number >= 0.7
            if c.rule not in ("surplus", "beyond"):  # not looked at
                assert (c.rank is None) == (c.rule in ("positive", "cluster", "repeat"))
            assert c.why()
    if every:  # the verdicts are the audit
        audit = {k: v for k, v in task["audit"].items() if v and k in counted}
        assert counted == audit
