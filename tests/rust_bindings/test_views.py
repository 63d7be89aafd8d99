"""Arrays on mapped files: read-only, alive as long as they are needed, and no leak."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from embkit import _rust
from embkit.errors import CorruptError

META = {"format": "embkit.test", "version": "1"}


def write(path: Path, *, values: np.ndarray) -> None:
    _rust.write_tensors(path, [("v", "U64", [len(values)], values)], META)


def maps(path: Path) -> int:
    return sum(str(path) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_the_view_is_the_file_and_keeps_it_mapped(tmp_path: Path) -> None:
    path, values = tmp_path / "a", np.arange(100_000, dtype=np.uint64)
    write(path, values=values)
    tensors, _ = _rust.open_tensors(path)
    dtype, view = tensors.pop("v")
    assert dtype == "U64"
    assert not view.flags.owndata
    assert maps(path) > 0
    write(path, values=values[::-1].copy())  # replaced by rename: the old map stays what it was
    part = view[10:20]
    del view, tensors
    gc.collect()
    np.testing.assert_array_equal(part, np.arange(10, 20))
    del part
    gc.collect()
    assert maps(path) == 0
    np.testing.assert_array_equal(_rust.open_tensors(path)[0]["v"][1], values[::-1])


def test_nobody_can_write_into_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", values=np.arange(10, dtype=np.uint64))
    view = _rust.open_tensors(tmp_path / "a")[0]["v"][1]
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        view.flags.writeable = True


def test_every_type_and_shape_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = {
        "BOOL": (np.bool_, ()), "U8": (np.uint8, (3,)), "I8": (np.int8, (1, 1, 2)),
        "U16": (np.uint16, (0,)), "I16": (np.int16, (5,)), "F16": (np.float16, (2, 2)),
        "U32": (np.uint32, (3, 0)), "I32": (np.int32, (7,)), "F32": (np.float32, (2, 3, 1)),
        "U64": (np.uint64, (1,)), "I64": (np.int64, (2,)), "F64": (np.float64, ()),
    }  # fmt: skip
    arrays = {
        k: np.frombuffer(rng.bytes(np.dtype(t).itemsize * int(np.prod(s))), np.uint8)
        .__and__(1 if k == "BOOL" else 255)
        .view(t)
        .reshape(s)
        for k, (t, s) in cases.items()
    }
    _rust.write_tensors(tmp_path / "a", [(k, k, list(a.shape), a) for k, a in arrays.items()], META)
    tensors, _ = _rust.open_tensors(tmp_path / "a", "open")
    assert set(tensors) == set(cases)
    for k, a in arrays.items():
        dtype, got = tensors[k]
        assert dtype == k
        assert got.shape == a.shape
        assert got.tobytes() == a.tobytes()
        assert got.dtype == (np.uint16 if k == "F16" else a.dtype)


def test_a_strided_array_is_written_as_its_values(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.uint64)[::2]
    write(tmp_path / "a", values=values)
    np.testing.assert_array_equal(_rust.open_tensors(tmp_path / "a")[0]["v"][1], values)


def test_unaligned_tensors_of_foreign_files_are_copied(tmp_path: Path) -> None:
    header = (
        b'{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"w":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    want = np.array([1.5, -2.0], np.float32)
    data = len(header).to_bytes(8, "little") + header + b"\x07" + want.tobytes()
    (tmp_path / "f").write_bytes(data)
    tensors, metadata = _rust.open_tensors(tmp_path / "f", "foreign")
    assert metadata == {}
    assert tensors["w"][1].flags.aligned
    np.testing.assert_array_equal(tensors["w"][1], want)
    with pytest.raises(CorruptError, match="foreign"):
        _rust.open_tensors(tmp_path / "f")


def test_opening_and_closing_leaks_neither_memory_nor_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, values=np.arange(50_000, dtype=np.uint64))

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def once() -> None:
        assert int(_rust.open_tensors(path)[0]["v"][1][-1]) == 49_999

    for _ in range(50):
        once()
    gc.collect()
    before, files = rss(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(1000):
        once()
    gc.collect()
    assert rss() - before < 2 << 20
    assert len(os.listdir("/proc/self/fd")) == files  # noqa: PTH208


def test_threads_share_a_reader(tmp_path: Path) -> None:
    n = 5000
    ids = np.arange(n, dtype=np.uint64)
    text = np.frombuffer(b"x" * n, np.uint8)
    offsets = np.arange(n + 1, dtype=np.uint64)
    zeros = np.zeros(n, np.uint16)
    tokenizer = (
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
        '"pre_tokenizer":null,"post_processor":null,"decoder":null,'
        '"model":{"type":"WordLevel","vocab":{"x":0,"u":1},"unk_token":"u"}}'
    )
    _rust.tokenize(
        tmp_path / "s", [(text, offsets)], ids, zeros, [""], zeros.astype(np.uint8), zeros, ids,
        ids, tokenizer, [4, 4, 4],
    )  # fmt: skip
    store = _rust.Store(tmp_path / "s")
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(2500):
            rows = rng.integers(0, n, 5).astype(np.uint64)
            if not np.array_equal(store.text_id(rows), rows):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    assert not wrong
