"""Jagged columns and example tables against lists of lists."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embkit.data import tables
from embkit.data.tables import Examples, Texts
from embkit.errors import CorruptError, UsageError

jagged = st.lists(st.lists(st.integers(0, 50), max_size=5), min_size=1, max_size=12)


def pack(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = tables.offsets_of(np.array([len(r) for r in rows], np.int64))
    return offsets, np.array([x for r in rows for x in r], np.uint64)


def unpack(offsets: np.ndarray, values: np.ndarray) -> list[list[int]]:
    ends = offsets.astype(int).tolist()
    return [values[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)]


@given(jagged, st.data())
def test_take_is_list_indexing(rows: list[list[int]], data: st.DataObject) -> None:
    at = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
    offsets, values = pack(rows)
    got = tables.take_jagged(offsets, np.array(at, np.int64), values)
    assert unpack(*got) == [rows[i] for i in at]


@given(jagged)
def test_keep_and_any_are_list_filters(rows: list[list[int]]) -> None:
    offsets, values = pack(rows)
    got = tables.keep_jagged(offsets, values % 3 != 0, values)
    assert unpack(*got) == [[x for x in r if x % 3] for r in rows]
    assert tables.any_jagged(offsets, values % 3 == 0).tolist() == [
        any(x % 3 == 0 for x in r) for r in rows
    ]
    assert tables.owners(offsets).tolist() == [i for i, r in enumerate(rows) for _ in r]


def make(m: int = 7, seed: int = 0, name: str = "t", kind: str = "retrieval") -> Examples:
    rng = np.random.default_rng(seed)
    p_off, p = pack([rng.integers(0, 30, rng.integers(1, 4)).tolist() for _ in range(m)])
    n_off, n = pack([rng.integers(0, 30, rng.integers(0, 3)).tolist() for _ in range(m)])
    return Examples(
        name=name,
        kind=kind,
        query=rng.integers(0, 30, m).astype(np.uint64),
        positive_offsets=p_off,
        positive=p,
        negative_offsets=n_off,
        negative=n,
        negative_score=rng.random(len(n)).astype(np.float32),
        score=np.full(m, np.nan, np.float32),
        label=np.full(m, -1, np.int32),
        weight=np.ones(m, np.float32),
        provenance=np.zeros(m, np.uint32),
    )


@pytest.mark.parametrize("m", [1, 2, 127])
def test_examples_survive_their_file(tmp_path: Path, m: int) -> None:
    table = make(m)
    table.save(tmp_path, index=3)
    back = Examples.load(tmp_path, {"name": "t", "kind": "retrieval"}, rows=30)
    for name in tables._COLUMNS:
        np.testing.assert_array_equal(getattr(back, name), getattr(table, name))


def test_a_row_beyond_the_texts_is_refused(tmp_path: Path) -> None:
    make().save(tmp_path, index=0)
    with pytest.raises(CorruptError, match="row 2[0-9] is named, there are 20 texts"):
        Examples.load(tmp_path, {"name": "t", "kind": "retrieval"}, rows=20)


def test_bad_offsets_are_refused(tmp_path: Path) -> None:
    table = make()
    broken = table.positive_offsets.copy()
    broken[2] = broken[1] - 1 if broken[1] else 99
    replace(table, positive_offsets=broken).save(tmp_path, index=0)
    with pytest.raises(CorruptError, match="offsets"):
        Examples.load(tmp_path, {"name": "t", "kind": "retrieval"})


def test_concatenate_keeps_order_and_refuses_mixed_kinds() -> None:
    a, b = make(3, seed=1), make(4, seed=2)
    joined = tables.concatenate([a, b])
    assert joined.query.tolist() == [*a.query.tolist(), *b.query.tolist()]
    assert unpack(joined.positive_offsets, joined.positive) == [
        *unpack(a.positive_offsets, a.positive),
        *unpack(b.positive_offsets, b.positive),
    ]
    with pytest.raises(UsageError, match="different kinds: retrieval, sts"):
        tables.concatenate([a, replace(b, kind="sts")])


@given(st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=20), st.data())
def test_texts_keep_is_a_list_filter(texts: list[str], data: st.DataObject) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    shards = []
    for part in (texts[:cut], texts[cut:]):
        raw = [t.encode() for t in part]
        offsets = tables.offsets_of(np.array([len(b) for b in raw], np.int64))
        shards.append((np.frombuffer(b"".join(raw), np.uint8), offsets))
    ids = np.arange(len(texts), dtype=np.uint64)
    both = Texts(shards=shards, text_id=ids, cluster=ids)
    assert list(both) == texts
    assert [both.get(i) for i in range(len(texts))] == texts
    kept = both.keep(mask)
    assert list(kept) == [t for t, k in zip(texts, mask, strict=True) if k]
    assert kept.text_id.tolist() == np.flatnonzero(mask).tolist()


def test_raw_shards_are_cut_at_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_SHARD_BYTES", 10)
    words = ["aaaa", "bbbbbb", "c", "d" * 25, "ee", "f"]
    raw = [w.encode() for w in words]
    offsets = tables.offsets_of(np.array([len(b) for b in raw], np.int64))
    ids = np.arange(6, dtype=np.uint64)
    texts = Texts(
        shards=[(np.frombuffer(b"".join(raw), np.uint8), offsets)], text_id=ids, cluster=ids
    )
    names = texts.save(tmp_path)
    assert len(names) == 4  # aaaa bbbbbb | c | d... | ee f
    back = Texts.load(tmp_path)
    assert list(back) == words
    assert back.text_id.tolist() == ids.tolist()
    (tmp_path / names[1]).unlink()
    with pytest.raises(CorruptError, match="missing: raw-00001-of-00004"):
        Texts.load(tmp_path)


def test_a_corpus_is_filtered_one_shard_at_a_time(tmp_path: Path) -> None:
    rows, size = 500, 2000
    one = np.full(rows * size, 97, np.uint8), np.arange(rows + 1, dtype=np.uint64) * np.uint64(size)
    ids = np.arange(16 * rows, dtype=np.uint64)
    mask = ids % 3 > 0
    tracemalloc.start()
    try:
        Texts(shards=[one] * 16, text_id=ids, cluster=ids).keep(mask).save(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * rows * size  # 16 would be the whole corpus
    assert Texts.load(tmp_path).text_id.tolist() == ids[mask].tolist()


@pytest.mark.parametrize(("given", "name"), [("a b/c", "a_b_c"), ("ok-1.x", "ok-1.x")])
def test_task_names_are_safe_in_files(given: str, name: str) -> None:
    assert tables.task_name(given) == name


def test_a_task_name_of_only_symbols_is_refused() -> None:
    with pytest.raises(UsageError, match="no usable task name"):
        tables.task_name("///")
