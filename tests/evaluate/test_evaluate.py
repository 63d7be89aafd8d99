"""Evaluation: every width equals an encode of its own, BM25, and each broken set's error."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit.errors import CorruptError, UsageError
from embkit.evaluate import evaluate, judge, load_split
from embkit.evaluate import run as runner
from embkit.evaluate.bm25 import bm25_rank
from embkit.evaluate.kinds import held_out_sets
from embkit.evaluate.run import prefix, score_set
from embkit.evaluate.tasks import RetrievalSet


def test_every_width_equals_an_encode_at_that_width(encoder: Any, split: Path) -> None:
    result = evaluate(encoder, split, bm25=False)
    for found in load_split(split):
        for width in encoder.dims:
            roles = ("query", "passage") if isinstance(found, RetrievalSet) else (None, None)
            lists = (
                (found.queries, found.corpus)
                if isinstance(found, RetrievalSet)
                else (found.first, found.second)
                if found.type == "sts"
                else (found.train, found.test)
            )
            parts = [
                encoder.encode(texts, role=role, dim=width)
                for texts, role in zip(lists, roles, strict=True)
            ]
            want = score_set(found, parts)
            got = result["tasks"][found.name]["widths"][str(width)]
            # Rounding may swap two passages of nearly the same score in one query of a hundred.
            assert got == pytest.approx(want, abs=0.3)


def test_the_result_is_consistent_and_kept(encoder: Any, split: Path, tmp_path: Path) -> None:
    result = evaluate(encoder, split, out=tmp_path / "scores")
    assert result == evaluate(encoder, split)
    assert json.loads((tmp_path / "scores" / "result.json").read_text()) == result
    assert {t["type"] for t in result["tasks"].values()} == {"retrieval", "sts", "classification"}
    for width in ("20", "12", "5"):
        each = [result["types"][kind][width] for kind in result["types"]]
        assert result["mean"][width] == pytest.approx(sum(each) / 3)
    assert judge(encoder, split) == result["mean"]["20"]
    stamp = (tmp_path / "scores" / "manifest.json").stat().st_mtime_ns
    evaluate(encoder, split, out=tmp_path / "scores")
    assert (tmp_path / "scores" / "manifest.json").stat().st_mtime_ns == stamp


def test_chosen_widths_and_their_limits(encoder: Any, split: Path) -> None:
    result = evaluate(encoder, split, dims=[7], bm25=False)
    assert list(result["mean"]) == ["7"]
    with pytest.raises(UsageError, match="Width 21 is out of range"):
        evaluate(encoder, split, dims=[21])
    with pytest.raises(UsageError, match="dims is empty"):
        evaluate(encoder, split, dims=[])


def test_a_remembered_score_is_not_shared(encoder: Any, split: Path) -> None:
    first = evaluate(encoder, split, bm25=False)
    first["tasks"].clear()
    assert evaluate(encoder, split, bm25=False)["tasks"]
    assert len(runner._remembered) <= runner._REMEMBER


def test_prefixes_are_unit_vectors() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 9)).astype(np.float32)
    vectors[2, :4] = 0
    cut = prefix(vectors, 4)
    assert np.linalg.norm(cut, axis=1) == pytest.approx([1, 1, 0, 1, 1], abs=1e-6)


# ---------------------------------------------------------------- BM25


def test_bm25_equals_its_formula() -> None:
    corpus = ["red fox", "red red car park", "blue ocean wave", "fox ocean", "quiet lake"]
    queries = ["red fox", "ocean", "nothing known", "wave fox"]
    k1, b = 1.5, 0.75
    documents = [Counter(d.split()) for d in corpus]
    mean = sum(sum(d.values()) for d in documents) / len(documents)
    want = []
    for query in queries:
        scores = []
        for d in documents:
            total = 0.0
            for word in query.split():
                n = sum(word in e for e in documents)
                idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
                tf = d[word] / (d[word] + k1 * (1 - b + b * sum(d.values()) / mean))
                total += idf * tf if n else 0
            scores.append(total)
        want.append(sorted(range(len(corpus)), key=lambda i: (-scores[i], i)))
    assert bm25_rank(queries, corpus).tolist() == want


def test_bm25_beside_the_model_and_alone(encoder: Any, split: Path) -> None:
    both = evaluate(encoder, split)
    alone = evaluate(None, split)
    name = next(n for n, t in both["tasks"].items() if t["type"] == "retrieval")
    assert both["tasks"][name]["bm25"] == alone["tasks"][name]["bm25"]
    assert both["tasks"][name]["bm25"]["ndcg@10"] > 50  # real text: titles say what a package is
    assert alone["mean"] == {}
    with pytest.raises(UsageError, match="Nothing to evaluate"):
        evaluate(None, split, bm25=False)


def test_bm25_of_a_corpus_without_words() -> None:
    assert bm25_rank(["a"], ["!!!", "the"]).tolist() == [[0, 1]]


# ---------------------------------------------------------------- broken sets


@pytest.fixture
def broken(split: Path, tmp_path: Path) -> Path:
    shutil.copytree(split, tmp_path / "dev")
    return tmp_path / "dev"


def retrieval(folder: Path) -> Path:
    return next((folder / "retrieval").iterdir())


def test_held_out_texts_are_the_ones_that_count(broken: Path) -> None:
    path = retrieval(broken) / "corpus.jsonl"
    extra = {"_id": "unjudged", "text": "only a distractor"}
    path.write_text(path.read_text() + json.dumps(extra) + "\n")
    probe = next((broken / "classification").iterdir()) / "train.jsonl"
    probe.write_text(probe.read_text() + '{"text": "only for the probe", "label": "x"}\n')
    found = {t for _, texts in held_out_sets(broken) for t in texts}
    ranked = next(s for s in load_split(broken) if isinstance(s, RetrievalSet))
    assert set(ranked.queries) <= found
    assert {ranked.corpus[i] for i in ranked.seen} <= found
    assert not {"only a distractor", "only for the probe"} & found


def test_no_such_folder_and_no_sets(tmp_path: Path, small_data: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such folder"):
        load_split(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no evaluation sets"):
        load_split(tmp_path)
    with pytest.raises(UsageError, match="give .*dev"):
        load_split(small_data)  # the data folder instead of its dev/
    (tmp_path / "sts").mkdir()
    with pytest.raises(UsageError, match="empty"):
        load_split(tmp_path)


def test_judgements_of_unknown_ids(broken: Path) -> None:
    path = retrieval(broken) / "qrels.jsonl"
    row = {"query_id": "no query", "corpus_id": "no passage", "score": 1}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(CorruptError, match="1 judgements name ids .* no query -> no passage"):
        load_split(broken)


def test_an_empty_corpus(broken: Path) -> None:
    (retrieval(broken) / "corpus.jsonl").write_text("")
    with pytest.raises(CorruptError, match="corpus is empty"):
        load_split(broken)


def test_a_missing_file_of_a_set(broken: Path) -> None:
    (retrieval(broken) / "queries.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_split(broken)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "Line 1 is not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"sentence1": "a", "score": 1}', "no text in column 'sentence2'"),
        ('{"sentence1": "a", "sentence2": "b"}', "no numeric score"),
    ],
)
def test_broken_sentence_pairs(broken: Path, line: str, message: str) -> None:
    path = next((broken / "sts").iterdir())
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(CorruptError, match=message):
        load_split(broken)


def test_broken_classes(broken: Path) -> None:
    folder = next((broken / "classification").iterdir())
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    one = [{**row, "label": "same"} for row in rows]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in one))
    with pytest.raises(CorruptError, match="only one label"):
        load_split(broken)
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(CorruptError, match="Row 1 has no label"):
        load_split(broken)


def test_a_doubled_id(broken: Path) -> None:
    path = retrieval(broken) / "corpus.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(CorruptError, match="is there twice"):
        load_split(broken)


def test_a_beir_tsv_reads_the_same(broken: Path) -> None:
    folder = retrieval(broken)
    want = load_split(broken)[0]
    rows = [json.loads(line) for line in (folder / "qrels.jsonl").read_text().splitlines()]
    (folder / "qrels.jsonl").unlink()
    (folder / "qrels").mkdir()
    text = "query-id\tcorpus-id\tscore\n" + "".join(
        f"{r['query_id']}\t{r['corpus_id']}\t{r['score']}\n" for r in rows
    )
    (folder / "qrels" / "dev.tsv").write_text(text)
    assert load_split(broken)[0] == want
