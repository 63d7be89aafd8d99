"""Reading: every form gives the same records, every bad input its own clear error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from embkit import data
from embkit.data.records import Records
from embkit.errors import CorruptError, UsageError

from .conftest import CLASSES, RETRIEVAL, STS, lines

Write = Callable[[str, list[dict[str, Any]]], Path]


def content(records: Records) -> dict[str, list[tuple[Any, ...]]]:
    """Examples with their texts, whatever the row numbers are."""
    texts = list(records.texts)
    out = {}
    for name, t in records.tasks().items():
        rows = []
        for i in range(len(t)):
            p = t.positive[slice(*t.positive_offsets[i : i + 2].astype(int).tolist())]
            n = t.negative[slice(*t.negative_offsets[i : i + 2].astype(int).tolist())]
            label = t.labels[t.label[i]] if t.label[i] >= 0 else None
            score = None if np.isnan(t.score[i]) else float(t.score[i])
            rows.append(
                (texts[t.query[i]], [texts[j] for j in p], [texts[j] for j in n], score, label)
            )
        out[name] = rows
    return out


def files(directory: Path) -> dict[str, bytes]:
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def test_a_data_folder_gives_one_task_per_file(folder: Path, tmp_path: Path) -> None:
    records = data.read(folder).save(tmp_path / "records")
    found = content(records)
    assert sorted(found) == ["facts", "pairs", "reviews"]
    assert found["facts"][3] == (
        "largest ocean",
        ["The Pacific Ocean is the largest ocean on Earth."],
        ["The Arctic Ocean is the smallest of the five oceans."],
        None,
        None,
    )
    assert [row[3] for row in found["pairs"]] == [4.5, 0.0, 4.0]
    assert [row[4] for row in found["reviews"]] == ["bad", "good", "bad"]
    texts = list(records.texts)
    assert len(texts) == len(set(texts))  # distinct
    assert records.report["read"] == records.report["kept"] == 10


def test_every_form_reads_the_same(tmp_path: Path) -> None:
    from datasets import Dataset

    raw = lines(RETRIEVAL[:3])
    flat = [{"query": r["query"], "positive": r["positive"]} for r in RETRIEVAL[:3]]
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    pq.write_table(pa.Table.from_pylist(flat), tmp_path / "a.parquet")
    dataset = Dataset.from_list(flat)
    dataset.save_to_disk(str(tmp_path / "saved"))
    inputs: list[Any] = [
        tmp_path / "a.jsonl",
        str(tmp_path / "*.jsonl.gz"),
        [tmp_path / "a.jsonl.zst"],
        tmp_path / "a.parquet",
        tmp_path / "saved",
        dataset,
        dataset.to_iterable_dataset(),
    ]
    found = [
        content(data.read(item, task="t").save(tmp_path / f"out{i}"))
        for i, item in enumerate(inputs)
    ]
    assert all(f == found[0] for f in found[1:])
    assert len(found[0]["t"]) == 3


def test_class_label_features_become_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    records = data.read(dataset, task="t").save(tmp_path / "r")
    assert [row[4] for row in content(records)["t"]] == ["yes", "no"]


def test_a_beir_folder_becomes_pairs(write: Write, tmp_path: Path) -> None:
    write("b/corpus.jsonl", [{"_id": "d1", "title": "T", "text": "x"}, {"_id": "d2", "text": "y"}])
    write("b/queries.jsonl", [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}])
    judged = [
        {"query_id": "q1", "corpus_id": "d1", "score": 1},
        {"query_id": "q1", "corpus_id": "d2", "score": 2},
        {"query_id": "q2", "corpus_id": "d2", "score": 0},
    ]
    write("b/qrels.jsonl", judged)
    records = data.read(tmp_path / "b").save(tmp_path / "out")
    assert content(records) == {"b": [("one", ["T x", "y"], [], None, None)]}


def test_saving_twice_is_free_and_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    first = data.read(folder).save(tmp_path / "a")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")}
    data.read(folder).save(tmp_path / "a")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*")} == stamps
    data.read(folder).save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert content(Records.open(tmp_path / "a")) == content(first)
    assert data.read(tmp_path / "a").manifest["digest"] == first.manifest["digest"]


def test_datasets_in_memory_have_an_identity(tmp_path: Path) -> None:
    from datasets import Dataset

    one = Dataset.from_list(CLASSES)
    a = data.read(one, task="t").save(tmp_path / "a")
    same = data.read(Dataset.from_list(CLASSES), task="t").save(tmp_path / "b")
    other = data.read(Dataset.from_list(CLASSES[:2]), task="t").save(tmp_path / "c")
    assert a.manifest["digest"] == same.manifest["digest"] != other.manifest["digest"]


def test_round_trip_through_datasets(folder: Path, tmp_path: Path) -> None:
    records = data.read(folder).save(tmp_path / "records")
    exported = data.to_datasets(records)
    assert sorted(exported) == ["facts", "pairs", "reviews"]
    again = [
        data.read(exported[name], task=name).save(tmp_path / name) for name in sorted(exported)
    ]
    joined = {name: rows for r in again for name, rows in content(r).items()}
    assert joined == content(records)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "part.jsonl").write_bytes(lines(CLASSES[:2]))
    records = data.read([tmp_path / "x", tmp_path / "y"]).save(tmp_path / "out")
    assert [s["name"] for s in records.manifest["sources"]] == ["part.jsonl", "part.jsonl#2"]
    table = records.tasks()["part"]
    assert table.provenance.tolist() == [0, 0, 1, 1]


# ---------------------------------------------------------------- bad input


def test_bad_rows_are_counted_and_sampled(tmp_path: Path) -> None:
    good = [{"text": f"text number {i}", "label": "x"} for i in range(400)]
    raw = lines(good) + b'{"text": "   ", "label": "x"}\n' + b'{"text": "\xff", "label": "x"}\n'
    (tmp_path / "t.jsonl").write_bytes(raw)
    report = data.read(tmp_path / "t.jsonl").save(tmp_path / "out").report
    assert (report["read"], report["kept"], report["rejected"]) == (402, 400, 2)
    source = report["sources"][0]
    assert sum(source["reasons"].values()) == 2
    assert [s["line"] for s in source["samples"]] == [401, 402]


def test_too_many_bad_rows_are_refused_with_reasons(tmp_path: Path) -> None:
    raw = lines(CLASSES) + b'{"text": "  ", "label": "x"}\n'
    (tmp_path / "t.jsonl").write_bytes(raw)
    with pytest.raises(
        CorruptError, match=r"1 of 4 rows are rejected, the limit is 1\.0%"
    ) as caught:
        data.read(tmp_path / "t.jsonl").save(tmp_path / "out")
    assert "line 4" in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert len(data.read(tmp_path / "t.jsonl", max_rejected=0.5).save(tmp_path / "out").texts) == 3


def test_bad_utf8_in_parquet_is_a_row_fault(tmp_path: Path) -> None:
    texts = [b"good text %d" % i for i in range(150)] + [b"bad \xff text"]
    column = pa.Array.from_buffers(pa.string(), len(texts), pa.array(texts, pa.binary()).buffers())
    table = pa.table({"text": column, "label": ["x"] * len(texts)})
    pq.write_table(table, tmp_path / "t.parquet")
    report = data.read(tmp_path / "t.parquet").save(tmp_path / "out").report
    assert (report["kept"], report["rejected"]) == (150, 1)


def test_missing_file_and_pattern_without_match(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        data.read(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match="No file matches"):
        data.read(str(tmp_path / "*.jsonl"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    pack = {".jsonl": bytes, ".jsonl.zst": zstandard.compress, ".jsonl.gz": gzip.compress}[suffix]
    (tmp_path / f"t{suffix}").write_bytes(pack(b""))
    with pytest.raises(CorruptError):
        data.read(tmp_path / f"t{suffix}").save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    with pytest.raises(CorruptError, match="no rows"):
        data.read(Dataset.from_dict({"text": [], "label": []})).save(tmp_path / "out")


def test_wrong_columns_name_the_right_ones(write: Write, tmp_path: Path) -> None:
    path = write("t.jsonl", [{"question_body": "a", "reply": "b"}] * 5)
    with pytest.raises(CorruptError) as caught:
        data.read(path).save(tmp_path / "out")
    assert "query" in str(caught.value) and "sentence1" in str(caught.value)


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    packed = zstandard.compress(lines(STS * 500))
    (tmp_path / "t.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(CorruptError):
        data.read(tmp_path / "t.jsonl.zst").save(tmp_path / "out")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(CorruptError, match="Parquet"):
        data.read(tmp_path / "t.parquet").save(tmp_path / "out")


def test_remote_addresses_are_refused_with_a_way_out() -> None:
    with pytest.raises(UsageError, match="load_dataset") as caught:
        data.read("s3://bucket/x.parquet")
    assert caught.value.exit_code == 2


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n")
    with pytest.raises(UsageError, match=r"\.parquet"):
        data.read(tmp_path / "t.csv")
    with pytest.raises(UsageError, match="did you mean 'retrieval'"):
        data.read(tmp_path / "t.csv", kind="retreival")
    with pytest.raises(UsageError, match="no file that can be read"):
        data.read(tmp_path)
    with pytest.raises(UsageError, match="share"):
        data.read(tmp_path, max_rejected=2)
    with pytest.raises(UsageError, match="list of inputs is empty"):
        data.read([])
    with pytest.raises(UsageError, match="Cannot read a int"):
        data.read(3)


def test_damage_in_a_records_directory_is_found(folder: Path, tmp_path: Path) -> None:
    data.read(folder).save(tmp_path / "out")
    path = tmp_path / "out" / "raw-00000-of-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[4100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError):
        list(Records.open(tmp_path / "out").texts)
    path.write_bytes(raw[:-10])
    with pytest.raises(CorruptError):
        list(Records.open(tmp_path / "out").texts)
    # A next run does not trust it: it reads again.
    assert len(data.read(folder).save(tmp_path / "out").texts) == len(
        data.read(folder).save(tmp_path / "other").texts
    )


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "embkit.store"}))
    with pytest.raises(CorruptError):
        Records.open(tmp_path)
