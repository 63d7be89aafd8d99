"""The kinds of sets that mteb scores: what is read, what training must not see, broken sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import every_kind
import pytest

from embkit.data.leaks import held_out
from embkit.errors import CorruptError, UsageError
from embkit.evaluate import evaluate_tasks
from embkit.evaluate.kinds import KINDS, load_all, texts_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return every_kind.make(tmp_path / "test")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_kind_is_read_as_it_was_written(folder: Path) -> None:
    found = {one.type: one for one in load_all(folder)}
    assert list(found) == list(KINDS)
    assert {one.name for one in found.values()} == {f"{kind}/small" for kind in KINDS}
    pairs = rows(folder / "pairclass" / "small.jsonl")
    assert found["pairclass"].label.tolist() == [row["label"] for row in pairs]
    assert found["pairclass"].second == [row["sentence2"] for row in pairs]
    ranked = rows(folder / "reranking" / "small.jsonl")
    assert found["reranking"].positive == [row["positive"] for row in ranked]
    assert found["reranking"].negative == [row["negative"] for row in ranked]
    many = rows(folder / "multilabel" / "small" / "test.jsonl")
    assert found["multilabel"].test_labels == [row["labels"] for row in many]
    summaries = rows(folder / "summarization" / "small.jsonl")
    assert found["summarization"].relevance == [row["relevance"] for row in summaries]
    assert found["summarization"].machine == [row["machine_summaries"] for row in summaries]
    asked = {
        row["text"]: row["instruction"]
        for row in rows(folder / "instruction_retrieval" / "small" / "queries.jsonl")
    }
    instructed = found["instruction_retrieval"]
    assert instructed.instructions == [asked[q] for q in instructed.retrieval.queries]


def test_held_out_texts_of_every_kind(folder: Path) -> None:
    """Decontamination sees all kinds; what is only a distractor or probe training is no leak."""
    held = held_out([folder])
    texts = {held.get(i) for i in range(len(held.set_of))}
    assert set(held.names) == {f"test/{kind}/small" for kind in KINDS}
    ranked = rows(folder / "reranking" / "small.jsonl")
    assert {t for row in ranked for t in row["positive"]} <= texts
    only = {t for row in ranked for t in row["negative"]} - {
        t for one in load_all(folder) for t in texts_of(one)
    }
    assert only and not only & texts
    assert {row["text"] for row in rows(folder / "clustering" / "small.jsonl")} <= texts
    probe = {row["text"] for row in rows(folder / "multilabel" / "small" / "train.jsonl")}
    assert not probe & texts


BROKEN = [
    ("pairclass/small.jsonl", {"sentence1": "a", "sentence2": "b", "label": 2}, "not 0 and 1"),
    ("pairclass/small.jsonl", {"sentence1": "a", "label": 1}, "no text in column 'sentence2'"),
    ("reranking/small.jsonl", {"query": "a", "positive": "b", "negative": []}, "no list in column"),
    ("clustering/small.jsonl", {"text": "a"}, "no label"),
    ("bitext/small.jsonl", {"sentence1": "a"}, "no text in column 'sentence2'"),
    (
        "multilabel/small/test.jsonl",
        {"text": "a", "labels": ["unheard of"]},
        "no training text has: 'unheard of'",
    ),
    (
        "summarization/small.jsonl",
        {"text": "a", "human_summaries": ["b"], "machine_summaries": ["c"], "relevance": [1, 2]},
        "other numbers of machine_summaries and relevance",
    ),
]


@pytest.mark.parametrize(("name", "row", "message"), BROKEN)
def test_broken_rows(folder: Path, name: str, row: dict[str, Any], message: str) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(CorruptError, match=message):
        load_all(folder)


def test_an_empty_set_and_no_set(folder: Path, tmp_path: Path) -> None:
    (folder / "bitext" / "small.jsonl").write_text("")
    with pytest.raises(CorruptError, match="The set is empty"):
        load_all(folder)
    with pytest.raises(UsageError, match="give .*test"):
        load_all(tmp_path)
    with pytest.raises(FileNotFoundError, match="No such folder"):
        load_all(tmp_path / "nowhere")


def test_one_query_with_two_instructions(folder: Path) -> None:
    path = folder / "instruction_retrieval" / "small" / "queries.jsonl"
    row = {**rows(path)[0], "_id": "again", "instruction": "another"}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(CorruptError, match="two instructions"):
        load_all(folder)


def test_without_mteb_the_message_says_how_to_get_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(UsageError, match=r"pip install 'embkit\[mteb\]'"):
        evaluate_tasks(None, [folder])  # type: ignore[arg-type]
