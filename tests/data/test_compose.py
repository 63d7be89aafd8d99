"""Stores merged, appended to and cut, against tokenising the joined records anew."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embkit import data, inspection
from embkit.data import Store
from embkit.errors import UsageError

from .composed import LENGTHS, PROMPTS, SAME, WORDS, as_set, examples, make, rows, shards
from .conftest import CLASSES, RETRIEVAL, STS, lines
from .test_records import files

text = st.lists(st.sampled_from(WORDS), min_size=1, max_size=10).map(" ".join)
short = st.sampled_from(WORDS)
either = st.one_of(short, text)
retrieval = st.fixed_dictionaries(
    {"query": either, "positive": st.lists(either, min_size=1, max_size=2)},
    optional={"negative": st.lists(either, min_size=1, max_size=2), "weight": st.just(0.5)},
)
sts = st.fixed_dictionaries(
    {"sentence1": either, "sentence2": either, "score": st.sampled_from([0.0, 1.5])}
)
classes = st.fixed_dictionaries({"text": either, "label": st.sampled_from(["a", "b", "c"])})
tables = st.fixed_dictionaries(
    {"facts": st.lists(retrieval, min_size=1, max_size=4)},
    optional={
        "pairs": st.lists(sts, min_size=1, max_size=3),
        "labels": st.lists(classes, min_size=1, max_size=3),
    },
)


@pytest.mark.parametrize("prompts", [{}, PROMPTS, SAME], ids=["plain", "prompts", "one prompt"])
@settings(
    max_examples=200 if os.environ.get("EMBKIT_TEST_FULL") else 8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(a=tables, b=tables)
def test_merged_is_tokenised_together(
    tokenizer: Path, prompts: dict[str, str], a: Any, b: Any
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = make(folder / "a", a, tokenizer, prompts=prompts)
        two = make(folder / "b", b, tokenizer, prompts=prompts)
        want = data.tokenize(
            data.read([folder / "a" / "in", folder / "b" / "in"]),
            out=folder / "want", tokenizer=tokenizer, prompts=prompts, **LENGTHS,
        )  # fmt: skip
        got = data.merge([one, two], out=folder / "got")
        # With prompts a text has several rows, and the joined records know only its first source.
        without = ("source",) if prompts else ()
        assert as_set(rows(got), *without) == as_set(rows(want), *without)
        assert examples(got) == examples(want)
        assert [r["text_id"] for r in rows(got)[: one.rows]] == [r["text_id"] for r in rows(one)]
        assert got.manifest["counts"]["examples"] == want.manifest["counts"]["examples"]
        assert inspection.verify(got.path)[0] > 0


def three(tmp_path: Path, tokenizer: Path, **how: Any) -> list[Store]:
    """Stores that overlap, with one task in common."""
    return [
        make(tmp_path / "a", {"facts": RETRIEVAL, "reviews": CLASSES[:1]}, tokenizer, **how),
        make(tmp_path / "b", {"facts": RETRIEVAL[1:2] * 2, "pairs": STS}, tokenizer, **how),
        make(
            tmp_path / "c",
            {
                "pairs": [
                    {"sentence1": "a dog runs", "sentence2": "capital of france", "score": 1}
                ],
                "reviews": [*CLASSES, {"text": "so so", "label": "fair"}],
            },
            tokenizer,
            **how,
        ),
    ]


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["plain", "prompts"])
def test_three_at_once_are_two_and_one(
    tmp_path: Path, tokenizer: Path, prompts: dict[str, str]
) -> None:
    a, b, c = three(tmp_path, tokenizer, prompts=prompts)
    want = data.merge([a, b, c], out=tmp_path / "abc")
    left = data.merge([data.merge([a, b], out=tmp_path / "ab"), c], out=tmp_path / "ab_c")
    right = data.merge([a, data.merge([b, c], out=tmp_path / "bc")], out=tmp_path / "a_bc")
    for other in (left, right):
        assert rows(other) == rows(want)
        assert examples(other) == examples(want)
        assert other.manifest["sources"] == want.manifest["sources"]
    assert [s["name"] for s in want.manifest["sources"]] == [
        "facts.jsonl", "reviews.jsonl", "facts.jsonl#2", "pairs.jsonl", "pairs.jsonl#2",
        "reviews.jsonl#2",
    ]  # fmt: skip
    assert want.examples("reviews").labels == (
        "bad",
        "fair",
        "good",
    )  # the first's, then what others add


OWN = {
    "facts": {"query": "query: "},
    "pairs": {"text": "text: "},
    "labels": {"text": "passage: "},
}


@pytest.mark.parametrize("plain", [False, True], ids=["", "dropout"])
@settings(
    max_examples=200 if os.environ.get("EMBKIT_TEST_FULL") else 5,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(a=tables, b=tables)
def test_tasks_with_prompts_of_their_own_are_merged(
    tokenizer: Path, plain: bool, a: Any, b: Any
) -> None:
    """As if tokenised together, by merge and by append; a text behind another prompt is a row."""

    def own(*parts: Any) -> dict[str, Any]:
        there = {name for part in parts for name in part}
        return {"task_prompts": {t: p for t, p in OWN.items() if t in there}}

    with tempfile.TemporaryDirectory() as name:
        folder, how = Path(name), {"prompt_dropout": plain, "prompts": {"passage": "passage: "}}
        one = make(folder / "a", a, tokenizer, **how, **own(a))
        two = make(folder / "b", b, tokenizer, **how, **own(b))
        want = data.tokenize(
            data.read([folder / "a" / "in", folder / "b" / "in"]),
            out=folder / "want", tokenizer=tokenizer, **how, **own(a, b), **LENGTHS,
        )  # fmt: skip
        found = [data.merge([one, two], out=folder / "got")]
        if set(b) <= set(a):
            found.append(data.append(one, data.read(folder / "b" / "in"), out=folder / "more"))
        for got in found:
            assert as_set(rows(got), "source") == as_set(rows(want), "source")
            assert examples(got) == examples(want)
            assert got.task_prompts == want.task_prompts == own(a, b)["task_prompts"]
            assert got.has_plain_rows == plain


def test_a_task_with_two_prompts_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    table = {"t": [{"query": "one", "positive": "two"}]}
    plain = make(tmp_path / "a", table, tokenizer, prompts={"query": "query: "})
    for i, (prompt, fits) in enumerate({"text: ": False, "query: ": True}.items()):
        other = make(
            tmp_path / f"b{i}", table, tokenizer, prompts={"query": "query: "},
            task_prompts={"t": {"query": prompt}},
        )  # fmt: skip
        if fits:  # the same prompts, said in another way
            assert data.merge([plain, other], out=tmp_path / "out").rows == 2
            continue
        with pytest.raises(UsageError, match="prompts of task 't' are not those .* 'query: '"):
            data.merge([plain, other], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_two_forms_of_one_text_are_one_row(tmp_path: Path, tokenizer: Path) -> None:
    a = make(tmp_path / "a", {"t": [{"query": "café", "positive": "one"}]}, tokenizer)
    b = make(tmp_path / "b", {"t": [{"query": "cafe\u0301", "positive": "two"}]}, tokenizer)
    merged = data.merge([a, b], out=tmp_path / "ab")
    assert sorted(merged.texts()) == sorted(["café", "one", "two"])
    assert len(set(merged.examples("t").query.tolist())) == 1


def test_labels_are_matched_by_name(tmp_path: Path, tokenizer: Path) -> None:
    a = make(tmp_path / "a", {"t": [{"text": "x", "label": "zoo"}]}, tokenizer)
    b = make(
        tmp_path / "b",
        {"t": [{"text": "y", "label": "ant"}, {"text": "z", "label": "zoo"}]},
        tokenizer,
    )
    table = data.merge([a, b], out=tmp_path / "ab").examples("t")
    assert table.labels == ("zoo", "ant")
    assert table.label.tolist() == [0, 1, 0]


def test_a_cut_text_that_is_used_both_ways_gets_its_longer_tokens(
    tmp_path: Path, tokenizer: Path
) -> None:
    long = "one two three cat dog bird runs sits"
    a = make(tmp_path / "a", {"t": [{"query": long, "positive": "red"}]}, tokenizer)
    b = make(tmp_path / "b", {"t": [{"query": "blue", "positive": long}]}, tokenizer)
    merged = data.merge([a, b], out=tmp_path / "ab")
    row = int(a.examples("t").query[0])
    assert rows(a)[row]["role"] == 0 and len(rows(a)[row]["ids"]) == 5
    assert rows(merged)[row]["role"] == 2 and len(rows(merged)[row]["ids"]) == 9
    assert merged.manifest["counts"]["lengthened"] == 1
    other = data.merge([b, a], out=tmp_path / "ba")
    assert other.manifest["counts"]["lengthened"] == 0
    assert as_set(rows(other), "source") == as_set(rows(merged), "source")


def test_clusters_that_share_a_text_become_one(tmp_path: Path, tokenizer: Path) -> None:
    def store(name: str, texts: list[str], cluster_of: dict[str, str]) -> Store:
        """A store whose dedup has said that a text is in another's cluster."""
        table = [{"text": t, "label": "x"} for t in texts]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(table))
        records = data.read(tmp_path / f"{name}.jsonl", task="t").save(tmp_path / f"{name}.records")
        ids = {t: int(i) for t, i in zip(records.texts, records.texts.text_id, strict=True)}
        cluster = np.array([ids[cluster_of.get(t, t)] for t in records.texts], np.uint64)
        vars(records)["texts"] = data.Texts(
            shards=records.texts.shards, text_id=records.texts.text_id, cluster=cluster
        )
        return data.tokenize(records, out=tmp_path / name, tokenizer=tokenizer, **LENGTHS)

    a = store("a", ["one", "two", "three", "cat"], {"two": "one"})
    b = store("b", ["dog", "two", "three", "bird"], {"two": "dog", "three": "dog"})
    merged = data.merge([a, b], out=tmp_path / "ab")
    found = {r["text"]: r["cluster"] for r in rows(merged)}
    own = {r["text"]: r["text_id"] for r in rows(merged)}
    assert {t for t in own if found[t] == own["one"]} == {"one", "two", "three", "dog"}
    assert found["cat"] == own["cat"] and found["bird"] == own["bird"]


# ---------------------------------------------------------------- append


def test_append_takes_records_and_keeps_rows_and_shards(tmp_path: Path, tokenizer: Path) -> None:
    first = make(tmp_path / "a", {"facts": RETRIEVAL}, tokenizer, prompts=PROMPTS)
    (tmp_path / "more.jsonl").write_bytes(lines(STS))
    out = data.append(first, tmp_path / "more.jsonl", out=tmp_path / "out")
    assert rows(out)[: first.rows] == rows(first)
    for column in ("query", "positive", "negative", "positive_offsets"):
        np.testing.assert_array_equal(
            getattr(out.examples("facts"), column), getattr(first.examples("facts"), column)
        )
    assert len(out.examples("more")) == len(STS)
    again = data.append(first.path, tmp_path / "out.added", out=tmp_path / "again")
    assert files(again.path) == files(out.path)
    stamp = (out.path / "manifest.json").stat().st_mtime_ns
    data.append(first, tmp_path / "more.jsonl", out=tmp_path / "out")
    assert (out.path / "manifest.json").stat().st_mtime_ns == stamp


def test_unchanged_shards_are_linked_and_changed_ones_keep_their_rows(
    tmp_path: Path, tokenizer: Path, small_shards: None
) -> None:
    rng = np.random.default_rng(0)

    def table(n: int) -> list[dict[str, str]]:
        return [
            {"query": f"{' '.join(rng.choice(WORDS, 3))} q{i}", "positive": f"cat dog {i} {n}"}
            for i in range(n)
        ]

    old = table(60)
    a = make(tmp_path / "a", {"t": old}, tokenizer)
    # One query of the 20th example becomes a passage: its shard changes, the others do not.
    b = make(
        tmp_path / "b",
        {"t": [*table(30), {"query": "new", "positive": old[20]["query"]}]},
        tokenizer,
    )
    merged = data.merge([a, b], out=tmp_path / "ab")
    before, after = shards(a), shards(merged)
    assert len(before) > 10 and len(after) > len(before)
    same = [x.samefile(y) for x, y in zip(before, after, strict=False)]
    assert same.count(False) == 2 and not same[-1]  # the changed one, and the last, filled up
    assert rows(merged)[: a.rows] != rows(a)
    for got, want in zip(rows(merged), rows(a), strict=False):
        assert {**got, "role": 0} == {**want, "role": 0} or want["text"] == old[20]["query"]
    assert inspection.verify(merged.path)
    shutil.rmtree(a.path)  # links, not references
    assert len(rows(Store(merged.path, verify="open"))) == merged.rows


# ---------------------------------------------------------------- subset


def test_a_subset_of_everything_is_the_store(tmp_path: Path, tokenizer: Path) -> None:
    whole = three(tmp_path, tokenizer)[0]
    same = data.subset(whole, out=tmp_path / "same")
    assert rows(same) == rows(whole) and examples(same) == examples(whole)
    before, after = files(whole.path), files(same.path)
    assert before.pop("manifest.json") != after.pop("manifest.json")
    assert before == after
    assert same.manifest["counts"] == whole.manifest["counts"]


@settings(
    max_examples=100 if os.environ.get("EMBKIT_TEST_FULL") else 10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(table=tables, draw=st.data())
def test_a_subset_is_its_examples_and_their_rows(
    tokenizer: Path, table: Any, draw: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = make(Path(name), table, tokenizer, prompts=PROMPTS)
        old = examples(whole)
        mask = {
            task: draw.draw(st.lists(st.booleans(), min_size=n, max_size=n))
            for task, n in ((t["name"], t["examples"]) for t in whole.manifest["tasks"])
        }
        if not any(map(any, mask.values())):
            mask["facts"][0] = True
        part = data.subset(
            whole, out=Path(name) / "part", examples={k: np.array(v) for k, v in mask.items()}
        )
        want = {
            task: [e for e, keep in zip(old[task]["examples"], mask[task], strict=True) if keep]
            for task in old
            if any(mask[task])
        }
        got = examples(part)
        assert {task: found["examples"] for task, found in got.items()} == want
        named = {r for es in want.values() for e in es for r in (e[0], *e[1], *e[2])}
        assert {(r["text"], tuple(r["ids"])) for r in rows(part)} == named
        kept = [r for r in rows(whole) if r in rows(part)]
        assert kept == rows(part)  # in the old order, unchanged
        numbers = {k: np.flatnonzero(v)[::-1].tolist() for k, v in mask.items()}
        other = data.subset(whole, out=Path(name) / "other", examples=numbers)
        assert files(other.path) == files(part.path)


def test_max_examples_draws_evenly_and_by_seed(tmp_path: Path, tokenizer: Path) -> None:
    table = [{"text": f"text {i}", "label": "x"} for i in range(200)]
    whole = make(tmp_path, {"t": table, "u": table[:5]}, tokenizer)

    def drawn(name: str, **how: Any) -> list[int]:
        part = data.subset(whole, out=tmp_path / name, **how)
        texts = list(part.texts())
        return [int(texts[int(q)].split()[1]) for q in part.examples("t").query]

    one = drawn("one", max_examples=20)
    assert one == sorted(one) and len(set(one)) == 20 and 60 < np.mean(one) < 140
    assert one == drawn("same", max_examples={"t": 20})
    assert one != drawn("other", max_examples=20, seed=1)
    assert drawn("u", tasks=["t"], examples={"t": [3, 9]}, max_examples=5) == [3, 9]
    assert Store(tmp_path / "u").task_names == ["t"]
    assert len(Store(tmp_path / "one").examples("u")) == 5
