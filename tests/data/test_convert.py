"""Labelled sets as examples: each rule by example, invariants by drawn sets, what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from embkit import data
from embkit.data import Conversion, Task
from embkit.data.convert import Counts, convert
from embkit.errors import CorruptError, UsageError
from embkit.recipe.tasks import RULES

from .test_records import content

Rows = list[dict[str, Any]]
Write = Callable[[str, Rows], Path]


def run(rows: Any, rule: str, **options: Any) -> tuple[Rows, Counts]:
    counts = Counts()
    return list(convert(rows, Conversion(rule=rule, **options), counts)), counts


# ---------------------------------------------------------------- each rule by example

CLASSES = [
    {"text": "good film", "label": 1},
    {"text": "fine play", "label": 1.0},
    {"text": "bad film", "label": "0"},
    {"text": "good film", "label": True},
    {"text": "odd", "label": 2},
    {"text": "both", "label": 0},
    {"text": "both", "label": 1},
    {"text": " ", "label": 1},
    {"text": "no class"},
]


def test_a_text_of_the_class_is_the_positive_and_of_another_the_negative() -> None:
    made, counts = run([*CLASSES, {"text": "poor play", "label": 0}], "classes")
    assert {(row["query"], *row["positive"]) for row in made} == {
        ("good film", "fine play"),
        ("fine play", "good film"),
        ("bad film", "poor play"),
        ("poor play", "bad film"),
    }
    for row in made:
        own = {"good film", "fine play"} & {row["query"]}
        others = {"bad film", "poor play"} if own else {"good film", "fine play"}
        assert len(row["negative"]) == 1 and set(row["negative"]) <= others | {"odd"}
    assert counts.dropped == {
        "a repeat": 1, "a text of several classes": 2, "no other text of its class": 1,
    }  # fmt: skip
    assert counts.faults == {"text is blank": 1, "no label": 1}


def test_an_id_of_its_own_is_behind_all_texts_of_an_example() -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(8)]
    made, _ = run(rows, "classes", unique_id=True)
    plain, _ = run(rows, "classes")
    ids = set()
    for row, bare in zip(made, plain, strict=True):
        texts = [row["query"], *row["positive"], *row["negative"]]
        (mark,) = {text.rsplit(" ", 1)[1] for text in texts}
        ids.add(mark)
        assert [text.rsplit(" ", 1)[0] for text in texts] == [
            bare["query"], *bare["positive"], *bare["negative"],
        ]  # fmt: skip
    assert len(ids) == 8


def test_names_of_classes_are_targets_and_wrong_names_negatives() -> None:
    names = {"0": "a bad review", "1": "a good review", "2": "no review"}
    made, counts = run(CLASSES[:5], "label-names", names=names)
    assert made[0] == {
        "query": "good film",
        "positive": ["a good review"],
        "negative": ["a bad review", "no review"],
    }
    assert len(made) == 5 and not counts.dropped
    few, _ = run(CLASSES[:5], "label-names", names=names, negatives=1)
    assert all(len(row["negative"]) == 1 for row in few)
    _, alone = run(CLASSES[:2], "label-names")
    assert alone.dropped == {"no other class": 2}


PAIRS = [
    {"sentence1": "a", "sentence2": "b", "label": 1},
    {"sentence1": "a", "sentence2": "c", "label": 0},
    {"sentence1": "a", "sentence2": "d", "label": "1"},
    {"sentence1": "e", "sentence2": "f", "label": 0},
    {"sentence1": "g", "sentence2": "g", "label": 1},
    {"sentence1": "h", "sentence2": "i", "label": 1},
    {"sentence1": "h", "sentence2": "i", "label": 0},
    {"sentence1": "j", "sentence2": "k", "label": 0.5},
]


def test_labelled_pairs_become_pairs_with_hard_negatives_or_grades() -> None:
    made, counts = run(PAIRS, "pairs")
    assert made == [{"query": "a", "positive": ["b", "d"], "negative": ["c"]}]
    assert counts.dropped == {
        "no pair of label 1": 1, "both sides are one text": 1, "a pair of both labels": 1,
    }  # fmt: skip
    assert counts.faults == {"a label of type float": 1}
    graded, _ = run(PAIRS[:4], "pair-scores")
    assert [row["score"] for row in graded] == [1.0, 0.0, 1.0, 0.0]
    named, _ = run(
        [{"q": "a", "r": "b", "label": "same"}],
        "pairs",
        columns={"sentence1": "q", "sentence2": "r"},
        names={"same": "1", "other": "0"},
    )
    assert named == [{"query": "a", "positive": ["b"], "negative": []}]


def test_a_translation_gives_both_directions() -> None:
    rows = [{"translation": {"en": "dog", "de": "Hund"}}, {"source": "cat", "target": "Katze"}]
    made, counts = run([*rows, {"source": "Taxi", "target": "Taxi"}], "bitext")
    assert [(row["query"], row["positive"]) for row in made] == [
        ("Hund", ["dog"]), ("dog", ["Hund"]), ("cat", ["Katze"]), ("Katze", ["cat"]),
    ]  # fmt: skip
    assert counts.dropped == {"both sides are one text": 1}


def test_pairs_of_a_high_score_are_kept() -> None:
    rows = [{"sentence1": f"a{s}", "sentence2": "b", "score": s} for s in (0, 3.9, 4, "5", None)]
    made, counts = run(rows, "scored-pairs", min_score=4.0)
    assert [row["query"] for row in made] == ["a4", "a5"]
    assert counts.dropped == {"a score below min_score": 2}
    assert counts.faults == {"score is no number": 1}


def test_entailments_are_positives_and_contradictions_hard_negatives() -> None:
    rows = [
        {"premise": "a man eats", "hypothesis": h, "label": label}
        for h, label in [("he eats", 0), ("he sleeps", 2), ("he is fat", 1), ("he?", -1)]
    ]
    rows += [
        {"premise": "x", "hypothesis": "y", "label": "contradiction"},
        {"premise": "a man eats", "hypothesis": "someone eats", "label": "entailment"},
        {"premise": "a man eats", "hypothesis": "z", "label": "maybe"},
    ]
    made, counts = run(rows, "nli")
    assert made == [
        {"query": "a man eats", "positive": ["he eats", "someone eats"], "negative": ["he sleeps"]}
    ]
    assert counts.dropped == {"neutral": 1, "no gold label": 1, "no entailment of the premise": 1}
    assert counts.faults == {"a label that is no NLI label": 1}
    other = {"0": "contradiction", "2": "entailment"}
    turned, _ = run(rows[:4], "nli", names=other)
    assert turned[0]["positive"] == ["he sleeps"] and turned[0]["negative"] == ["he eats"]


def test_judged_documents_become_positives_and_hard_negatives() -> None:
    rows: Rows = [
        {"query": "q", "positive": ["a", "b"], "negative": ["c", "a", "c"]},
        {"query": "q2", "documents": ["a", "b", "c"], "grades": [0, 2, 1]},
        {"query": "q3", "documents": ["a"], "grades": [0]},
        {"query": "q4", "positive_passages": [{"docid": 1, "title": "T", "text": "x"}]},
        {"query": "q5", "documents": ["a"], "grades": [0, 1]},
    ]
    made, counts = run(rows, "reranking")
    assert made == [
        {"query": "q", "positive": ["a", "b"], "negative": ["c"]},
        {"query": "q2", "positive": ["b", "c"], "negative": ["a"]},
        {"query": "q4", "positive": ["T x"], "negative": []},
    ]
    assert counts.dropped == {"no relevant document": 1}
    assert counts.faults == {"as many grades as documents are needed": 1}
    strict, _ = run(rows[1:2], "reranking", min_score=2, negatives=1)
    assert strict[0]["positive"] == ["b"] and len(strict[0]["negative"]) == 1


def test_a_title_finds_its_body_without_itself() -> None:
    rows = [
        {"title": "Tides", "text": "Tides: the rise of the sea."},
        {"title": "", "text": "x"},
        {"title": "Only", "text": "Only."},
        {"headline": "News", "abstract": "Something was said."},
        {"title": 3, "text": "x"},
    ]
    made, counts = run(rows, "title-body")
    assert made == [
        {"query": "Tides", "positive": ["the rise of the sea."]},
        {"query": "News", "positive": ["Something was said."]},
    ]
    assert counts.dropped == {"no title": 1, "no body beside the title": 1}
    assert counts.faults == {"a title or body that is no text": 1}


# ---------------------------------------------------------------- invariants

words = st.sampled_from([f"w{i}" for i in range(12)])
labelled = st.lists(st.fixed_dictionaries({"text": words, "label": st.integers(0, 3)}), max_size=30)
pairs = st.lists(
    st.fixed_dictionaries({"sentence1": words, "sentence2": words, "label": st.integers(0, 1)}),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(labelled, st.integers(0, 3), st.integers(0, 5))
def test_classes_hold_their_invariants(rows: Rows, negatives: int, seed: int) -> None:
    made, counts = run(rows, "classes", negatives=negatives, seed=seed)
    label_of: dict[str, set[int]] = {}
    for row in rows:
        label_of.setdefault(row["text"], set()).add(row["label"])
    sure = {text: min(labels) for text, labels in label_of.items() if len(labels) == 1}
    for row in made:
        (positive,) = row["positive"]
        assert positive != row["query"] and sure[positive] == sure[row["query"]]
        others = [t for t in sure if sure[t] != sure[row["query"]]]
        assert len(row["negative"]) == len(set(row["negative"])) == min(negatives, len(others))
        assert set(row["negative"]) <= set(others)
    assert len({row["query"] for row in made}) == len(made)
    # Every row is an example, or counted once for why it is none.
    assert len(rows) == len(made) + counts.dropped.total() and counts.rows == len(rows)
    assert run(rows, "classes", negatives=negatives, seed=seed)[0] == made


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_pairs_hold_their_invariants(rows: Rows) -> None:
    made, _ = run(rows, "pairs")
    labels: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        labels.setdefault((row["sentence1"], row["sentence2"]), set()).add(row["label"])
    want: dict[str, tuple[set[str], set[str]]] = {}
    for (a, b), found in labels.items():
        if a != b and len(found) == 1:
            want.setdefault(a, (set(), set()))[1 - found.pop()].add(b)
    found_sides = {r["query"]: (set(r["positive"]), set(r["negative"])) for r in made}
    assert found_sides == {a: sides for a, sides in want.items() if sides[0]}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["text", "label", "title", "score"]),
       st.one_of(st.none(), st.text(max_size=3), st.integers(), st.floats(), st.lists(words))),
       max_size=6), st.sampled_from(sorted(RULES)))  # fmt: skip
def test_any_rows_are_counted_and_none_raises(rows: Rows, rule: str) -> None:
    made, counts = run([*rows, None], rule, min_score=0.5)
    assert counts.rows == len(rows) + 1 and counts.faults["no JSON object"] == 1
    assert counts.examples == len(made)
    json.dumps(counts.as_json())


# ---------------------------------------------------------------- through read


def test_every_form_is_converted_alike(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [{"text": f"text {i}", "label": i % 3} for i in range(20)]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(raw.rstrip())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["0", "1", "2"])})
    dataset = Dataset.from_list(rows, features=features)
    inputs: list[Any] = [
        *(tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")),
        dataset, dataset.to_iterable_dataset(),
    ]  # fmt: skip
    how = Conversion(rule="classes", seed=3)
    found = [
        content(data.read(item, task="t", convert=how).save(tmp_path / f"out{i}"))
        for i, item in enumerate(inputs)
    ]
    assert all(f == found[0] for f in found[1:])
    assert len(found[0]["t"]) == 20 and all(n for _, _, n, _, _ in found[0]["t"])


def test_tasks_name_their_conversions_and_the_report_says_what_went(
    write: Write, tmp_path: Path
) -> None:
    write("in/pairs.jsonl", PAIRS[:7])
    write("in/facts.jsonl", [{"query": "q", "positive": "p"}])
    tasks = {"pairs": Task(convert=Conversion(rule="pairs"))}
    records = data.read(tmp_path / "in", tasks=tasks).save(tmp_path / "out")
    assert content(records)["pairs"] == [("a", ["b", "d"], ["c"], None, None)]
    by_task = {entry["task"]: entry for entry in records.report["sources"]}
    assert "conversion" not in by_task["facts"]
    found = by_task["pairs"]["conversion"]
    assert (found["rows"], found["examples"]) == (7, 1)
    assert found["dropped"]["no pair of label 1"] == 1
    assert {s["reason"] for s in found["samples"]} == set(found["dropped"])
    # What is not converted has the digest that it always had.
    plain = data.read(tmp_path / "in" / "facts.jsonl").save(tmp_path / "plain")
    assert "conversion" not in json.dumps(plain.manifest["sources"])
    again = data.read(
        tmp_path / "in", tasks={"pairs": Task(convert=Conversion(rule="pair-scores"))}
    )
    assert again.save(tmp_path / "out").manifest["digest"] != records.manifest["digest"]


def test_too_many_unreadable_rows_are_refused(write: Write, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    bad = write("bad.jsonl", [*rows, {"text": "x"}, {"label": 1}])
    how = Conversion(rule="classes")
    with pytest.raises(CorruptError, match=r"(?s)2 of 22 rows .*1 x no label.*row 20") as caught:
        data.read(bad, convert=how).save(tmp_path / "out")
    assert "max_rejected" in str(caught.value)
    kept = data.read(bad, convert=how, max_rejected=0.2).save(tmp_path / "out")
    assert kept.manifest["counts"]["examples"] == 20
    with pytest.raises(CorruptError, match="makes no example of 22 rows: 22 x no column for"):
        data.read(bad, convert=Conversion(rule="bitext")).save(tmp_path / "none")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Conversion(rule="class"), "did you mean 'classes'"),
        (lambda: Conversion(rule="scored-pairs"), "min_score"),
        (lambda: Conversion(rule="nli", negatives=-1), "negative"),
        (lambda: Task(kind="sts", convert=Conversion(rule="nli")), "makes retrieval"),
        (lambda: run([{}], "nli", columns={"premis": "x"}), "premis"),
    ],
)
def test_wrong_settings_say_what(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_a_task_without_a_source_is_refused(write: Write, tmp_path: Path) -> None:
    write("in/pairs.jsonl", PAIRS)
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        data.read(tmp_path / "in", tasks={"pair": Task()})
    write("beir/corpus.jsonl", [{"_id": "d", "text": "x"}])
    write("beir/queries.jsonl", [{"_id": "q", "text": "x"}])
    with pytest.raises(UsageError, match="queries and positives already"):
        data.read(tmp_path / "beir", convert=Conversion(rule="pairs"))
