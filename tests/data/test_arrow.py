"""Arrow data gives the records, and the faults, that the same rows give as JSON lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embkit import _rust, data
from embkit.data import decoding
from embkit.errors import CorruptError, UsageError

from .conftest import CLASSES, RETRIEVAL, STS, lines
from .test_records import files

FULL = bool(os.environ.get("EMBKIT_TEST_FULL"))


def result(feed: Any, kind: str = "auto") -> dict[str, Any]:
    """What a builder has found, in plain types."""
    builder = _rust.RecordsBuilder()
    if isinstance(feed, bytes):
        builder.add_lines(feed, "s", "t", kind)
    else:
        for table in feed:
            builder.add_arrow(table, "s", "t", kind)
    found = builder.finish()
    (table,) = found.pop("examples")
    (report,) = found.pop("rejected")
    samples = report.pop("samples")
    return {
        **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()},
        # NaN is not equal to itself: bits are.
        **{k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in table.items()},
        **report,
        "samples": [(line, reason) for line, reason, _ in samples],
    }


text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
score = st.one_of(st.none(), st.floats(-1e30, 1e30), st.floats(-1, 1, width=32))
maybe = st.one_of(st.none(), text)
ROWS = {
    "retrieval": st.fixed_dictionaries(
        {
            "query": text,
            "anchor": maybe,
            "positive": st.lists(text, min_size=1, max_size=3),
            "negative_2": maybe,
            "negative_1": maybe,
            "neg": st.one_of(st.none(), st.lists(maybe, max_size=3)),
            "score": score,
            "weight": st.one_of(st.none(), st.floats(0, 3)),
            "id": st.integers(0, 9),
            "other": maybe,
        }
    ),
    "sts": st.fixed_dictionaries(
        {"sentence1": text, "sentence2": text, "score": st.floats(-5, 5), "weight": score}
    ),
    "named": st.fixed_dictionaries({"text": text, "label": text}),
    "numbered": st.fixed_dictionaries({"text": maybe, "labels": st.integers(-3, 9)}),
}
SCHEMAS = {
    "retrieval": pa.schema(
        [
            ("query", pa.string()),
            ("anchor", pa.string()),
            ("positive", pa.list_(pa.string())),
            ("negative_2", pa.string()),
            ("negative_1", pa.string()),
            ("neg", pa.list_(pa.string())),
            ("score", pa.float64()),
            ("weight", pa.float64()),
            ("id", pa.int64()),
            ("other", pa.string()),
        ]
    ),
    "sts": pa.schema(
        [
            ("sentence1", pa.string()),
            ("sentence2", pa.string()),
            ("score", pa.float64()),
            ("weight", pa.float64()),
        ]
    ),
    "named": pa.schema([("text", pa.string()), ("label", pa.string())]),
    "numbered": pa.schema([("text", pa.string()), ("labels", pa.int64())]),
}


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    kept = [{k: v for k, v in row.items() if v is not None} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()


def recast(table: pa.Table, of: dict[pa.DataType, pa.DataType]) -> pa.Table:
    """The table with some types replaced, inside lists too."""

    def new(kind: pa.DataType) -> pa.DataType:
        if kind in of:
            return of[kind]
        return of.get(pa.list_, pa.list_)(new(kind.value_type)) if pa.types.is_list(kind) else kind  # type: ignore[call-overload]

    fields = [pa.field(f.name, new(f.type)) for f in table.schema]
    return table.cast(pa.schema(fields))


TYPES: dict[str, dict[Any, Any]] = {
    "large": {pa.string(): pa.large_string(), pa.list_: pa.large_list},
    "views": {pa.string(): pa.string_view()},
    "bytes": {pa.string(): pa.binary()},
    "dictionary": {pa.string(): pa.dictionary(pa.int16(), pa.string())},
    "small numbers": {pa.int64(): pa.int8()},
}


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=400 if FULL else 40, deadline=None, derandomize=True)
@given(draw=st.data())
def test_rows_are_those_of_json(name: str, draw: st.DataObject) -> None:
    rows = draw.draw(st.lists(ROWS[name], min_size=1, max_size=8))
    want = result(as_lines(rows))
    table = pa.Table.from_pylist(rows, SCHEMAS[name])
    assert result([table]) == want
    half = len(rows) // 2
    assert result([table.slice(0, half), table.slice(half)]) == want  # parts of one buffer
    assert result([pa.concat_tables([table.slice(0, half), table.slice(half)])]) == want
    for of in TYPES.values():
        try:
            other = recast(table, of)
        except pa.ArrowNotImplementedError:  # a cast that pyarrow lacks
            continue
        assert result([other]) == want, other.schema


def test_every_cast_is_tried() -> None:
    table = pa.Table.from_pylist([{"query": "q", "positive": ["p"]}], SCHEMAS["retrieval"])
    tried = 0
    for of in TYPES.values():
        try:
            tried += recast(table, of).num_rows
        except pa.ArrowNotImplementedError:
            continue
    assert tried >= 4


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_scores_of_every_width(kind: str) -> None:
    values = np.array([0.1, 1 / 3, -2.5, 60000.0, 1e-7], kind)
    rows = [
        {"sentence1": f"a{i}", "sentence2": "b", "score": float(v)} for i, v in enumerate(values)
    ]
    table = pa.table(
        {
            "sentence1": [r["sentence1"] for r in rows],
            "sentence2": ["b"] * len(rows),
            "score": pa.array(values),
        }
    )
    assert result([table]) == result(as_lines(rows))


@pytest.mark.parametrize("kind", [f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)])
def test_classes_of_every_width(kind: str) -> None:
    top = np.iinfo(kind).max
    values = [0, 7, 100, top, np.iinfo(kind).min]
    rows = [{"text": f"t{i}", "label": int(v)} for i, v in enumerate(values)]
    table = pa.table({"text": [r["text"] for r in rows], "label": pa.array(values, kind)})
    found = result([table])
    assert found == result(as_lines(rows))
    assert found["rejected"] == (kind == "uint64")  # more than JSON rows may have, too


def test_faults_are_those_of_json() -> None:
    good = {"query": "q", "positive": "p"}
    bad: list[tuple[dict[str, Any], pa.DataType | None]] = [
        ({"query": None}, pa.string()),
        ({"query": " \t\u3000"}, None),
        ({"query": ["q"]}, None),
        ({"query": 7}, None),
        ({"query": True}, None),
        ({"query": {"a": "b"}}, None),
        ({"positive": []}, pa.list_(pa.string())),
        ({"positive": [None]}, pa.list_(pa.string())),
        ({"positive": ["p", ""]}, None),
        ({"positive": [["p"]]}, None),
        ({"positive": [7]}, None),
        ({"neg": ["n"], "neg_scores": []}, pa.list_(pa.float64())),
        ({"neg": ["n"], "neg_scores": [None]}, pa.list_(pa.float64())),
        ({"scores": [1.0, 2.0]}, None),
        ({"score": "1"}, None),
        ({"score": True}, None),
        ({"score": float("nan")}, None),
        ({"score": float("-inf")}, None),
        ({"score": 1e300}, None),
        ({"weight": -1}, None),
        ({"title": ["a", "b"]}, None),
    ]
    reasons = set()
    for columns, kind in bad:
        row = {**good, **columns}
        fields = {k: pa.array([v]) for k, v in row.items()}
        if kind is not None:
            last = list(columns)[-1]
            fields[last] = pa.array([row[last]], kind)
        table = pa.table(fields)
        want = result(as_lines([good, row, good]))
        ok = pa.Table.from_pylist([good])
        got = result([ok, table, ok])
        assert got == want, columns
        assert got["rejected"] == 1 and got["samples"][0][0] == 2
        reasons |= set(got["reasons"])
    assert len(reasons) == 11


def test_texts_that_are_not_utf8_or_too_long_are_rejected() -> None:
    def column(texts: list[bytes], kind: pa.DataType) -> pa.Array:
        raw = pa.array(texts, pa.large_binary() if kind == pa.large_string() else pa.binary())
        return pa.Array.from_buffers(kind, len(texts), raw.buffers())

    for kind in (pa.string(), pa.large_string()):
        table = pa.table(
            {"text": column([b"good", b"bad \xff", b"fine"], kind), "label": [1, 2, 3]}
        )
        found = result([table])
        assert found["samples"] == [(2, "invalid UTF-8")]
        assert bytes(found["text"]) == b"goodfine"
    view = pa.array([b"good", b"a bad one, longer than twelve bytes \xff"], pa.binary_view())
    view = pa.Array.from_buffers(pa.string_view(), 2, view.buffers())
    assert result([pa.table({"text": view, "label": [1, 2]})])["samples"] == [(2, "invalid UTF-8")]
    builder = _rust.RecordsBuilder(max_line=10)
    table = pa.table({"text": ["short", "x" * 11, "long enough"[:10]], "label": ["a", "b", "c"]})
    builder.add_arrow(table, "s", "t")
    (report,) = builder.finish()["rejected"]
    assert report["samples"] == [(2, "line too long", '{"text": "xxxxxxxxxxx", "label": "b"}')]


def test_excerpts_are_short_and_printable() -> None:
    table = pa.table({"query": ["é\x1b" * 400], "positive": [None], "score": [0.5]})
    builder = _rust.RecordsBuilder()
    builder.add_arrow(pa.table({"query": ["q"], "positive": ["p"]}), "s", "t")
    builder.add_arrow(table, "s", "t")
    ((_, reason, excerpt),) = builder.finish()["rejected"][0]["samples"]
    assert reason == "missing column: positive"
    assert len(excerpt) == 120 and excerpt.isprintable() and excerpt.startswith('{"query": "é')


def test_what_is_no_arrow_is_refused() -> None:
    builder = _rust.RecordsBuilder()
    with pytest.raises(UsageError, match="dict is no Arrow stream"):
        builder.add_arrow({"text": ["a"]}, "s", "t")
    with pytest.raises(UsageError, match="Arrow stream"):
        builder.add_arrow(pa.chunked_array([[1, 2]]), "s", "t")  # a stream without columns
    with pytest.raises(CorruptError, match="wrong columns: found a, b"):
        builder.add_arrow(pa.table({"b": range(99), "a": range(99)}), "s", "t")
    assert builder.finish()["texts"] == 0


# ---------------------------------------------------------------- every form, through `read`


@pytest.mark.parametrize("rows", [RETRIEVAL[:3], STS, CLASSES], ids=["facts", "pairs", "classes"])
def test_every_form_gives_the_same_bytes(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from datasets import Dataset, IterableDataset

    rows = [*rows * 3, rows[0]]
    (tmp_path / "t.jsonl").write_bytes(lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    dataset = Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "t"))
    shuffled = Dataset.from_list(rows[::-1]).select(range(len(rows) - 1, -1, -1))  # by an index
    inputs: list[Any] = [
        tmp_path / "t.jsonl",
        tmp_path / "t.parquet",
        tmp_path / "t",
        dataset,
        shuffled,
        dataset.to_iterable_dataset(num_shards=2),
        IterableDataset.from_generator(lambda: iter(rows)),
        rows_of(rows),
    ]
    found = []
    for i, item in enumerate(inputs):
        out = data.read(item, task="t").save(tmp_path / f"out{i}")
        assert out.report["kept"] == len(rows)
        kept = files(out.dir)
        found.append({k: v for k, v in kept.items() if k.endswith(".safetensors")})
    assert len(found[0]) == 2
    assert all(f == found[0] for f in found)
    assert not list(tmp_path.glob(".*"))  # nothing of the datasets in memory is left


class rows_of:  # noqa: N801
    """An iterable of dicts that is no list (a list is a list of inputs)."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_arrow_is_not_turned_into_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def never(*_: Any) -> Any:
        raise AssertionError("a row went through JSON")

    monkeypatch.setattr(decoding, "line_of", never)
    pq.write_table(pa.Table.from_pylist(CLASSES), tmp_path / "t.parquet")
    dataset = Dataset.from_list(CLASSES)
    for i, item in enumerate((tmp_path / "t.parquet", dataset, dataset.to_iterable_dataset())):
        assert len(data.read(item, task="t").save(tmp_path / f"out{i}").texts) == 3


def test_class_labels_without_a_name_and_nulls(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "label": [1, -1, None, 0]}, features=features
    )
    records = data.read(dataset, task="t", max_rejected=0.5).save(tmp_path / "r")
    table = records.tasks()["t"]
    assert [table.labels[i] for i in table.label] == ["yes", "-1", "no"]
    assert records.report["sources"][0]["reasons"] == {"missing column: label": 1}


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"text": [rng.bytes(200).hex() for _ in range(3000)], "label": ["x"] * 3000})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=500, compression="zstd")
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 2000] = bytes(2000)
    (tmp_path / "t.parquet").write_bytes(raw)
    with pytest.raises(CorruptError, match="Parquet"):
        data.read(tmp_path / "t.parquet").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- shards, threads, memory, kills


def many(path: Path, rows: int, words: int) -> Path:
    with path.open("w") as out:
        for i in range(rows):
            row = {"query": f"question {i % 977} é", "positive": f"answer {i} " + "lorem " * words}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def built(path: Path, out: Path, **how: Any) -> dict[str, bytes]:
    out.mkdir()
    builder = _rust.RecordsBuilder(dir=out, **how)
    builder.add_jsonl(path, "s", "t")
    found = builder.finish()
    (table,) = found["examples"]
    assert found["shards"] == len(list(out.iterdir()))
    columns = {k: v.tobytes() for k, v in table.items() if isinstance(v, np.ndarray)}
    return {**files(out), **columns}


@pytest.mark.promise
def test_shards_are_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    path = many(tmp_path / "t.jsonl", 20_000, 3)
    found = [built(path, tmp_path / str(n), threads=n, text_bytes=100_000) for n in (1, 2, 7)]
    assert len(found[0]) > 5
    assert found[0] == found[1] == found[2]


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    driver = textwrap.dedent(
        """
        import resource, sys
        from embkit import _rust
        builder = _rust.RecordsBuilder(dir=sys.argv[2], text_bytes=4 << 20)
        builder.add_jsonl(sys.argv[1], "s", "t")
        assert builder.finish()["texts"] > 10_000
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        """
    )
    peaks = []
    for words in (200, 1600):  # 12 and 96 MB of text in as many rows
        path = many(tmp_path / f"{words}.jsonl", 10_000, words)
        (tmp_path / str(words)).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", driver, str(path), str(tmp_path / str(words))],
            check=True, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 24, peaks


@pytest.mark.promise
def test_a_killed_read_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    path = many(tmp_path / "t.jsonl", 30_000, 20)
    driver = textwrap.dedent(
        """
        import functools, os, signal, sys, threading
        from pathlib import Path
        from embkit import _rust, data
        _rust.RecordsBuilder = functools.partial(_rust.RecordsBuilder, text_bytes=100_000)
        path, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        def watch():
            while len(list(out.parent.glob(f".partial-{out.name}-*/raw-*"))) < kill_at:
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        if kill_at:
            threading.Thread(target=watch, daemon=True).start()
        data.read(path).save(out)
        """
    )

    def run(out: str, kill_at: int) -> int:
        words = [sys.executable, "-c", driver, str(path), str(tmp_path / out), str(kill_at)]
        return subprocess.run(words, check=False, timeout=60, capture_output=True).returncode

    assert run("want", 0) == 0
    shards = len(list((tmp_path / "want").glob("raw-*")))
    assert shards > 20
    for kill_at in (2, shards // 2):
        assert run("got", kill_at) == -signal.SIGKILL
        left = next(tmp_path.glob(".partial-got-*"))
        assert kill_at <= len(list(left.glob("raw-*"))) <= shards
    assert run("got", 0) == 0
    assert files(tmp_path / "got") == files(tmp_path / "want")
