"""The dedup stage on planted duplicates and leaks, and its promises: idempotent, same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container, data
from embkit.errors import UsageError

from .test_records import content, files

Write = Callable[[str, list[dict[str, Any]]], Path]

LONG = (
    "The quick brown fox jumps over the lazy dog while seventeen curious children watch quietly "
    "from behind the old wooden fence near the river"
)
OTHER = (
    "Photosynthesis converts light energy into chemical energy that plants store in sugars made "
    "from carbon dioxide and water during the day"
)
EVAL = (
    "Migrating birds navigate by the stars the sun and the magnetic field of the earth over "
    "thousands of kilometres every single year without maps"
)


@pytest.fixture
def planted(write: Write) -> Path:
    """One near-duplicate, one shared query, one query that is its positive, four kinds of leaks."""
    near = LONG.replace("river", "stream")
    rows = [
        {"query": "fox story", "positive": LONG},
        {"query": "animals by a fence", "positive": near},
        {"query": "fox story", "positive": OTHER},
        {"query": OTHER, "positive": OTHER},
        {"query": "birds", "positive": EVAL},  # exactly an evaluation text
        {"query": "birds again", "positive": EVAL.replace("every single year", "each year")},
        {"query": "span", "positive": f"Unrelated start. {EVAL[:110]} and then something else."},
        {"query": "how do birds find their way", "positive": "They look at the sky at night."},
        {"query": "innocent", "positive": "Nothing here is in the evaluation data.",
         "negative": [EVAL, "An innocent negative text."]},
    ]  # fmt: skip
    return write("train/t.jsonl", rows)


@pytest.fixture
def evaluation(write: Write, tmp_path: Path) -> Path:
    root = "eval/test/retrieval/birds"
    corpus = [{"_id": "1", "text": EVAL}, {"_id": "2", "text": LONG}]  # 2 is only a distractor
    write(f"{root}/corpus.jsonl", corpus)
    write(f"{root}/queries.jsonl", [{"_id": "q", "text": "how do birds find their way"}])
    write(f"{root}/qrels.jsonl", [{"query_id": "q", "corpus_id": "1", "score": 1}])
    return tmp_path / "eval"


def test_planted_duplicates_merge_and_leaks_go(
    planted: Path, evaluation: Path, tmp_path: Path
) -> None:
    clean = data.dedup(planted, out=tmp_path / "clean", against=evaluation)
    found = content(clean)["t"]
    queries = [row[0] for row in found]
    assert sorted(queries) == ["animals by a fence", "fox story", "innocent"]
    by_query = dict(zip(queries, found, strict=True))
    assert len(by_query["fox story"][1]) == 2 and OTHER in by_query["fox story"][1]
    # Both near-duplicates are one text now.
    assert by_query["animals by a fence"][1][0] in by_query["fox story"][1]
    assert by_query["innocent"][2] == ["An innocent negative text."]
    counts = clean.report["examples"]["t"]
    assert counts["before"] == 9 and counts["after"] == 3
    assert (counts["leaked"], counts["same_text"], counts["merged"]) == (4, 1, 1)
    assert counts["leaked_negatives"] == 1
    leaks = clean.report["leaks"]
    assert leaks["exact"] == 2 and leaks["texts"] == 4
    assert any("Migrating birds" in s["span"] for s in leaks["spans"])
    assert clean.report["clusters"]["largest"][0]["size"] == 2
    assert len(clean.texts) == len(set(clean.texts)) == clean.report["texts"]["after"]


def test_what_many_training_texts_share_is_reported_and_stays(write: Write, tmp_path: Path) -> None:
    """A notice in eleven training texts and in the evaluation is no leak; in ten it is one."""
    notice = (
        "this program is free software you can redistribute it and modify it under the terms of "
        "its licence"
    )
    for count in (11, 10):
        rows = [
            {"query": f"tool {i}", "positive": f"Subject {i} of kind {i * 7}: {notice}."}
            for i in range(count)
        ]
        train = write(f"train{count}/t.jsonl", rows)
        held = write(
            f"held{count}/e.jsonl", [{"query": "evaluated", "positive": f"About: {notice}"}]
        )
        out = data.dedup([train], out=tmp_path / f"clean{count}", against=held)
        leaks = out.report["leaks"]
        removed = count if count == 10 else 0
        assert leaks["texts"] == removed
        assert sum(map(len, out.tasks().values())) == count - removed
        assert (leaks["common"]["ngrams"] > 0) == (count == 11)
        assert leaks["common"]["texts_with_nothing_else"] == count - removed
        if count == 11:
            assert leaks["common"]["samples"][0]["training_texts"] == 11


def test_the_unsaved_records_and_a_saved_copy_give_the_same(planted: Path, tmp_path: Path) -> None:
    records = data.read(planted).save(tmp_path / "records")
    a = data.dedup(records, out=tmp_path / "a")
    b = data.dedup(data.read(planted), out=tmp_path / "b")
    c = data.dedup(tmp_path / "records", out=tmp_path / "c")
    everything = [files(x.dir) for x in (a, b, c)]
    for found in everything:  # the manifest names its inputs, which differ here
        found.pop("manifest.json")
    assert everything[0] == everything[1] == everything[2]


def test_clusters_table_names_every_text(planted: Path, tmp_path: Path) -> None:
    records = data.read(planted).save(tmp_path / "records")
    clean = data.dedup(records, out=tmp_path / "clean")
    table = container.load(clean.dir / "clusters.safetensors")
    ids = records.texts.text_id
    np.testing.assert_array_equal(table["text_id"], ids)
    np.testing.assert_array_equal(table["cluster"], ids[table["representative"].astype(int)])
    moved = table["representative"] != np.arange(len(ids))
    assert (table["similarity"][moved] >= 0.8).all() and moved.any()
    # A representative stands for itself (stars, not chains).
    heads = table["representative"][table["representative"].astype(int)]
    np.testing.assert_array_equal(heads, table["representative"])


@pytest.mark.parametrize("action", ["merge", "drop", "mark"])
def test_a_clean_directory_is_already_clean(planted: Path, tmp_path: Path, action: str) -> None:
    once = data.dedup(planted, out=tmp_path / "one", action=action)
    twice = data.dedup(once, out=tmp_path / "two", action=action)
    assert content(once) == content(twice)


def test_actions_differ_as_described(planted: Path, tmp_path: Path) -> None:
    mark = content(data.dedup(planted, out=tmp_path / "mark", action="mark"))["t"]
    drop = content(data.dedup(planted, out=tmp_path / "drop", action="drop"))["t"]
    assert [r[0] for r in mark].count("fox story") == 2  # nothing joined
    assert len(mark) == 8  # only the query that is its own positive went
    # The near-duplicate that is not the representative was dropped with its example.
    assert len(drop) == len(mark) - 1
    assert sum("quick brown fox" in text for row in drop for text in row[1]) == 1


@pytest.mark.promise
def test_the_same_bytes_with_any_number_of_threads(
    planted: Path, evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = []
    records = data.read(planted).save(tmp_path / "records")
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("EMBKIT_THREADS", threads)
        done = data.dedup(records, out=tmp_path / threads, against=[evaluation])
        out.append(files(done.dir))
    assert out[0] == out[1] == out[2]


def test_a_second_run_is_free_and_other_settings_are_not(planted: Path, tmp_path: Path) -> None:
    first = data.dedup(planted, out=tmp_path / "clean")
    stamp = (first.dir / "manifest.json").stat().st_mtime_ns
    data.dedup(planted, out=tmp_path / "clean")
    assert (first.dir / "manifest.json").stat().st_mtime_ns == stamp
    data.dedup(planted, out=tmp_path / "clean", threshold=0.95)
    assert (first.dir / "manifest.json").stat().st_mtime_ns != stamp


def test_against_files_of_any_columns(planted: Path, write: Write, tmp_path: Path) -> None:
    held = write("held.jsonl", [{"sentence1": EVAL, "sentence2": "another", "score": 1}])
    clean = data.dedup(planted, out=tmp_path / "clean", against=str(held))
    assert clean.report["leaks"]["exact"] == 1
    assert EVAL not in list(clean.texts)


def test_wrong_arguments(planted: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'merge'"):
        data.dedup(planted, out=tmp_path / "x", action="merg")
    with pytest.raises(UsageError, match="threshold"):
        data.dedup(planted, out=tmp_path / "x", threshold=1.5)
    with pytest.raises(FileNotFoundError, match="No such evaluation data"):
        data.dedup(planted, out=tmp_path / "x", against=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="No evaluation texts"):
        data.dedup(planted, out=tmp_path / "x", against=tmp_path / "empty")
    assert not (tmp_path / "x").exists()


def test_the_report_is_json_without_nan(planted: Path, evaluation: Path, tmp_path: Path) -> None:
    clean = data.dedup(planted, out=tmp_path / "clean", against=evaluation)

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    json.loads((clean.dir / "report.json").read_text(), parse_constant=no_constant)


def test_the_better_source_represents(write: Write, tmp_path: Path) -> None:
    near = LONG.replace("river", "stream and the old mill")  # longer: represents without priority
    curated = write("in/curated.jsonl", [{"query": "fox", "positive": LONG}])
    web = write("in/web.jsonl", [{"query": "animals", "positive": near}])
    records = data.read([web, curated], task="t").save(tmp_path / "records")
    for priority, kept in (((), near), (("curated.jsonl",), LONG), (("web.jsonl",), near)):
        out = tmp_path / "-".join(("clean", *priority))
        clean = data.dedup(records, out=out, priority=priority, threshold=0.7)
        assert {p for row in content(clean)["t"] for p in row[1]} == {kept}
    with pytest.raises(UsageError, match="did you mean 'curated.jsonl'"):
        data.dedup(records, out=tmp_path / "x", priority=["curated"])


def test_exact_joins_only_equal_forms(write: Write, tmp_path: Path) -> None:
    rows = [
        {"query": "one", "positive": "First, of   its kind"},
        {"query": "two", "positive": "first, OF its\tkind"},
        {"query": "three", "positive": "first of its kind!"},
        {"query": "four", "positive": "first of its kind too"},
    ]
    path = write("t.jsonl", rows)

    def positives(**options: Any) -> list[str]:
        clean = data.dedup(path, out=tmp_path / "c", method="exact", **options)
        return [row[1][0] for row in content(clean)["t"]]

    one, _, three, four = (row["positive"] for row in rows)
    assert positives() == [one, one, three, four]
    assert positives(punctuation="drop") == [one, one, one, four]


def test_contradictions_are_shown_and_can_go(write: Write, tmp_path: Path) -> None:
    rows = [
        {"query": "fox story", "positive": LONG},
        {"query": "fox story", "positive": OTHER, "negative": [LONG]},
    ]
    path = write("t.jsonl", rows)
    kept = data.dedup(path, out=tmp_path / "kept")
    assert kept.report["examples"]["t"]["conflicts"] == 1
    assert kept.report["conflicts"]["t"] == [["fox story", LONG]]
    assert sorted(content(kept)["t"][0][1]) == sorted([LONG, OTHER])
    dropped = data.dedup(path, out=tmp_path / "dropped", conflicts="drop")
    assert [row[1:3] for row in content(dropped)["t"]] == [([OTHER], [])]


def test_the_memory_limit_changes_nothing(planted: Path, tmp_path: Path) -> None:
    rows = [
        {"query": f"query number {i}", "positive": f"{LONG} {i % 700} {OTHER if i % 3 else EVAL}"}
        for i in range(2000)
    ]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records = data.read(path).save(tmp_path / "records")
    free = data.dedup(records, out=tmp_path / "free")
    with pytest.raises(UsageError, match="memory"):
        data.dedup(records, out=tmp_path / "x", memory=1000)
    bound = data.dedup(records, out=tmp_path / "bound", memory=1 << 20)
    assert files(free.dir) == files(bound.dir)
    assert not list(tmp_path.glob(".partial-bound-*"))
