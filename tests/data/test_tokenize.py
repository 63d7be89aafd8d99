"""Stores: rows and forms against a naive plan, tokens against the tokenizer, damage found."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from embkit import data
from embkit.data import Store, vocabulary
from embkit.data.tokenize import plan_rows
from embkit.errors import CorruptError, UsageError

from .test_records import files

SIZES: dict[str, Any] = {"vocab_size": 400, "max_length_query": 7, "max_length_passage": 12}
PROMPTS = {"query": "query: ", "passage": "passage: "}


@pytest.fixture
def records(folder: Path, tmp_path: Path) -> data.Records:
    return data.read(folder).save(tmp_path / "records")


def ids_of(store: Store, row: int) -> list[int]:
    rows = np.array([row], np.uint64)
    width = int(store.lengths(rows)[0])
    ids, mask = np.zeros(width, np.int64), np.zeros(width, np.int64)
    assert store.gather_padded(rows, ids, mask, 0) == width
    assert mask.all()
    return ids.tolist()


@pytest.mark.parametrize("prompts", [{}, PROMPTS], ids=["plain", "prompts"])
def test_every_row_is_what_the_tokenizer_says(
    records: data.Records, tmp_path: Path, prompts: dict[str, str]
) -> None:
    store = data.tokenize(records, out=tmp_path / "store", prompts=prompts, **SIZES)
    tokenizer = Tokenizer.from_file(str(store.tokenizer / "tokenizer.json"))
    limit = {"query": 7, "passage": 12, "either": 12}

    def expect(text: str, use: str) -> list[int]:
        tokenizer.enable_truncation(limit[use])
        ids: list[int] = tokenizer.encode(prompts.get(use, "") + text).ids
        return ids

    tables = store.tasks()
    for name, table in records.tasks().items():
        here = tables[name]
        uses = ("query", "passage") if table.kind == "retrieval" else ("either", "either")
        texts = list(records.texts)
        for old, new, use in (
            (table.query, here.query, uses[0]),
            (table.positive, here.positive, uses[1]),
            (table.negative, here.negative, uses[1]),
        ):
            for a, b in zip(old.tolist(), new.tolist(), strict=True):
                assert store.text(b) == texts[a]
                if prompts or use != "query":  # without prompts a row may serve a longer use
                    assert ids_of(store, b) == expect(texts[a], use)
                ids = store.text_id(np.array([b], np.uint64))
                assert ids.tolist() == [records.texts.text_id[a]]
    assert list(store.texts()) == [store.text(i) for i in range(len(store))]


def test_without_prompts_every_text_is_one_row(records: data.Records, tmp_path: Path) -> None:
    store = data.tokenize(records, out=tmp_path / "store", **SIZES)
    assert store.rows == len(records.texts)
    assert sorted(store.texts()) == sorted(records.texts)


def test_rows_equal_a_naive_plan(records: data.Records) -> None:
    tables = records.tasks()
    n = len(records.texts)
    some = {"query": "task : ", "text": "task : "}
    named = {name: some for name in list(tables)[::2]}
    for prompts, plain, own in itertools.product(
        ({"query": "", "passage": ""}, PROMPTS, {"query": "q ", "passage": ""}),
        (False, True),
        ({}, named),
    ):
        got = plan_rows(tables, n, prompts, task_prompts=own, plain=plain)
        uses: dict[tuple[int, str], set[str]] = {}
        for table in tables.values():
            pair = table.kind != "retrieval"
            task = own.get(table.name, {})
            for row in table.query.tolist():
                text = task.get("text", "") if pair else task.get("query", prompts["query"])
                uses.setdefault((row, text), set()).update("qp" if pair else "q")
            for row in [*table.positive.tolist(), *table.negative.tolist()]:
                text = task.get("text", "") if pair else prompts["passage"]
                uses.setdefault((row, text), set()).update("qp" if pair else "p")
        for (row, text), use in list(uses.items()) if plain else ():
            if text:
                uses.setdefault((row, ""), set()).update(use)
        want = {key: {"q": 0, "p": 1}.get("".join(sorted(u)), 2) for key, u in uses.items()}
        rows = zip(got.text.tolist(), got.prompt.tolist(), got.role.tolist(), strict=True)
        assert {(t, got.prompts[p]): r for t, p, r in rows} == want
        assert len(got.text) == len(want)
        assert got.text.tolist() == sorted(got.text.tolist())


def test_a_given_tokenizer_is_used_and_recorded(records: data.Records, tmp_path: Path) -> None:
    text = vocabulary.train_wordpiece(["the cat sat on a mat"], vocab_size=60)
    vocabulary.write(tmp_path / "tok", text, {})
    store = data.tokenize(records, out=tmp_path / "store", tokenizer=tmp_path / "tok")
    assert (store.tokenizer / "tokenizer.json").read_text() == text
    other = data.tokenize(records, out=tmp_path / "other", **SIZES)
    assert other.fingerprint != store.fingerprint


def test_the_fingerprint_is_the_encoders(records: data.Records, tmp_path: Path) -> None:
    from embkit.model import TextTokenizer

    store = data.tokenize(records, out=tmp_path / "store", **SIZES)
    loaded = TextTokenizer(Tokenizer.from_file(str(store.tokenizer / "tokenizer.json")))
    assert loaded.fingerprint == store.fingerprint


@pytest.mark.promise
def test_the_same_bytes_with_any_number_of_threads(
    records: data.Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = []
    for threads in ("1", "2"):
        monkeypatch.setenv("EMBKIT_THREADS", threads)
        out.append(files(data.tokenize(records, out=tmp_path / threads, **SIZES).path))
    assert out[0] == out[1]


def test_a_second_run_is_free(records: data.Records, tmp_path: Path) -> None:
    first = data.tokenize(records, out=tmp_path / "store", **SIZES)
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    data.tokenize(records, out=tmp_path / "store", **SIZES)
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp


def test_clusters_reach_the_store(folder: Path, tmp_path: Path) -> None:
    clean = data.dedup(folder, out=tmp_path / "clean", action="mark")
    store = data.tokenize(clean, out=tmp_path / "store", **SIZES)
    everything = np.arange(store.rows, dtype=np.uint64)
    by_text = dict(zip(clean.texts, clean.texts.cluster.tolist(), strict=True))
    got = store.cluster(everything).tolist()
    assert got == [by_text[t] for t in store.texts()]


# ---------------------------------------------------------------- bad input


def test_wrong_arguments(records: data.Records, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Unknown prompt"):
        data.tokenize(records, out=tmp_path / "x", prompts={"document": "d"})
    with pytest.raises(UsageError, match="room for 3 tokens"):
        data.tokenize(records, out=tmp_path / "x", max_length_query=2)
    with pytest.raises(UsageError, match="Unknown tokenizer"):
        data.tokenize(records, out=tmp_path / "x", tokenizer=str(tmp_path / "no tokenizer"))
    assert not (tmp_path / "x").exists()


def store_copy(records: data.Records, tmp_path: Path, name: str) -> Path:
    if not (tmp_path / "store").exists():
        data.tokenize(records, out=tmp_path / "store", **SIZES)
    shutil.copytree(tmp_path / "store", tmp_path / name)
    return tmp_path / name


def test_damage_is_found_at_open_or_first_touch(records: data.Records, tmp_path: Path) -> None:
    shard = "texts-00000-of-00001.safetensors"

    missing = store_copy(records, tmp_path, "missing")
    (missing / shard).unlink()
    with pytest.raises(CorruptError, match="missing"):
        Store(missing)

    short = store_copy(records, tmp_path, "short")
    whole = (short / shard).read_bytes()
    (short / shard).write_bytes(whole[:-1])
    with pytest.raises(CorruptError):
        Store(short)

    flipped = store_copy(records, tmp_path, "flipped")
    raw = bytearray(whole)
    raw[4100] ^= 4
    (flipped / shard).write_bytes(raw)
    with pytest.raises(CorruptError):
        broken = Store(flipped)
        for row in range(broken.rows):
            ids_of(broken, row)
            broken.text_id(np.array([row], np.uint64))
            broken.cluster(np.array([row], np.uint64))
    with pytest.raises(CorruptError):
        Store(flipped, verify="open")

    swapped = store_copy(records, tmp_path, "swapped")
    path = swapped / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("[UNK]", "[UNK ]"))
    with pytest.raises(CorruptError):
        Store(swapped)

    with pytest.raises(CorruptError, match="not a finished embkit output"):
        Store(tmp_path)


def test_a_store_is_not_records(records: data.Records, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"embkit\.records, not embkit\.store"):
        Store(records.dir)
    store = data.tokenize(records, out=tmp_path / "store", **SIZES)
    with pytest.raises(KeyError, match="there are facts, pairs, reviews"):
        store.examples("nope")
