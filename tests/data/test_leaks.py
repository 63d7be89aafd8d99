"""Decontamination set by set: what is found, where, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container, data
from embkit.data import leaks
from embkit.data.leaks import NEAR, RUN, WHOLE, held_out
from embkit.errors import UsageError

from .test_records import content

Write = Callable[[str, list[dict[str, Any]]], Path]

WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november"
FIRST = f"{WORDS} oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu"
SECOND = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)


@pytest.fixture
def training(write: Write) -> Path:
    rows = [
        {"query": "q whole", "positive": FIRST.upper()},
        {"query": "q run", "positive": f"Before. {WORDS}! After it come other things entirely."},
        {"query": "q near", "positive": SECOND.replace("eleven", "11")},
        {"query": "q clean", "positive": "nothing of the kind", "negative": [SECOND, "fine"]},
        {"query": "short", "positive": "a text that nobody evaluates"},
    ]
    return write("train/t.jsonl", rows)


@pytest.fixture
def evaluation(write: Write, tmp_path: Path) -> Path:
    """Two sets that share a text, a BEIR triple and sentence pairs."""
    root = "eval/test"
    write(f"{root}/retrieval/letters/corpus.jsonl", [{"_id": "1", "text": FIRST}])
    write(f"{root}/retrieval/letters/queries.jsonl", [{"_id": "q", "text": "Short"}])
    write(
        f"{root}/retrieval/letters/qrels.jsonl", [{"query_id": "q", "corpus_id": "1", "score": 1}]
    )
    pairs = [
        {"sentence1": SECOND, "sentence2": FIRST, "score": 1},
        {"sentence1": "unrelated", "sentence2": "words", "score": 0},
    ]
    write(f"{root}/sts/numbers.jsonl", pairs)
    return tmp_path / "eval"


def test_each_kind_of_leak_is_found_with_its_set_and_span(
    training: Path, evaluation: Path, tmp_path: Path
) -> None:
    clean = data.dedup(training, out=tmp_path / "clean", against=evaluation, threshold=0.7)
    assert [row[0] for row in content(clean)["t"]] == ["q clean"]
    assert content(clean)["t"][0][2] == ["fine"]
    report = clean.report["leaks"]
    assert report["evaluation_texts"] == 6 and report["texts"] == 5
    assert (report["exact"], report["near"], report["span"]) == (3, 1, 1)
    sets = report["sets"]
    assert set(sets) == {"test/retrieval/letters", "test/sts/numbers"}
    assert (sets["test/retrieval/letters"]["texts"], sets["test/sts/numbers"]["texts"]) == (3, 4)
    span = next(s for s in report["spans"] if s["span"] == WORDS)
    assert span["train"].startswith("Before.") and span["overlap"] == pytest.approx(14 / 21, 1e-3)
    assert report["near_samples"][0]["train"].startswith("one two")
    table = container.load(clean.dir / "leaks.safetensors", kind="embkit.leaks")
    assert sorted(table["how"].tolist()) == [RUN, NEAR, *[WHOLE | NEAR] * 3]
    assert table["sets"][-1] == len(table["set"]) == 7


def test_mark_only_says_what_leaks(training: Path, evaluation: Path, tmp_path: Path) -> None:
    gone = data.dedup(training, out=tmp_path / "gone", against=evaluation)
    marked = data.dedup(training, out=tmp_path / "marked", against=evaluation, leaked="mark")
    assert len(content(marked)["t"]) == 5 and marked.report["examples"]["t"]["leaked"] == 0
    assert marked.report["leaks"] == gone.report["leaks"]
    a = container.load(gone.dir / "leaks.safetensors")
    b = container.load(marked.dir / "leaks.safetensors")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_runs_of_characters_where_words_are_too_few(write: Write, tmp_path: Path) -> None:
    long_words = "pneumonoultramicroscopicsilicovolcanoconiosis floccinaucinihilipilification"
    training = write("t/t.jsonl", [{"query": "q", "positive": f"about {long_words} and more"}])
    held = write("e.jsonl", [{"text": f"of {long_words}"}])
    by_words = data.dedup(training, out=tmp_path / "words", against=held)
    by_chars = data.dedup(training, out=tmp_path / "chars", against=held, units="chars")
    assert by_words.report["leaks"]["texts"] == 0
    assert by_chars.report["leaks"]["span"] == 1
    assert (
        by_chars.report["leaks"]["spans"][0]["span"]
        .replace(" ", "")
        .startswith(long_words.replace(" ", "")[:40])
    )


def test_every_form_of_evaluation_data(evaluation: Path, write: Write, tmp_path: Path) -> None:
    beir = evaluation / "test/retrieval/letters"
    records = data.read(write("r/r.jsonl", [{"query": "a", "positive": SECOND}]))
    saved = records.save(tmp_path / "saved").dir
    lines = write("lines.jsonl", [{"id": "1", "question": "What?", "answers": ["This", " "]}])
    held = held_out([evaluation, beir, saved, lines])
    names = ("test/retrieval/letters", "test/sts/numbers", "letters", "saved", "lines.jsonl")
    assert held.names == names
    texts = [held.get(i) for i in range(len(held.set_of))]
    by_set = [[t for t, s in zip(texts, held.set_of, strict=True) if s == i] for i in range(5)]
    assert sorted(by_set[0]) == sorted(by_set[2]) == sorted([FIRST, "Short"])
    assert sorted(by_set[3]) == sorted(["a", SECOND]) and by_set[4] == ["What?", "This"]


def test_evaluation_data_without_texts_is_refused(
    training: Path, write: Write, tmp_path: Path
) -> None:
    for name, rows in (("none.jsonl", []), ("blank.jsonl", [{"text": "  "}])):
        held = write(name, rows)
        with pytest.raises(UsageError, match="No evaluation texts"):
            data.dedup(training, out=tmp_path / "x", against=held)
    assert not (tmp_path / "x").exists()


def test_a_lone_surrogate_is_a_rejected_row_and_no_match(tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": f"fine text number {i}"} for i in range(200)]
    lines = [json.dumps(r) for r in rows] + ['{"query": "bad", "positive": "half \\ud83d a pair"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "e.jsonl").write_text('{"text": "half \\ud83d a pair"}\n')
    clean = data.dedup(tmp_path / "t.jsonl", out=tmp_path / "c", against=tmp_path / "e.jsonl")
    assert clean.report["leaks"]["texts"] == 0 and len(content(clean)["t"]) == 200
    read = json.loads((tmp_path / "c.records" / "report.json").read_text())
    assert read["rejected"] == 1


def test_the_bits_of_how() -> None:
    assert (WHOLE, RUN, NEAR) == (1, 2, 4)  # docs/formats.md
    assert leaks.ACTIONS == ("remove", "mark")
