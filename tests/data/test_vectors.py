"""Embeddings from files of other programs: mapped when they are sound, refused when not."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container
from embkit.data.vectors import Origin, load_vectors, vectors_origin
from embkit.errors import CorruptError, UsageError

RNG = np.random.default_rng(1)
X = RNG.standard_normal((7, 4)).astype(np.float32)


def npy(path: Path, array: Any, **options: Any) -> Path:
    np.save(path, array, **options)
    return path


def mapped(array: np.ndarray) -> bool:
    """Whether the bytes are a file's: nothing of it was copied."""
    at = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = [*line.split(maxsplit=5), ""][:7]
        low, high = (int(x, 16) for x in span.split("-"))
        if low <= at < high:
            return "vectors" in line or "part" in line
    raise AssertionError(name)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["npy", "ours", "theirs"])
def test_files_are_mapped(tmp_path: Path, dtype: Any, kind: str) -> None:
    from safetensors.numpy import save_file

    x = X.astype(dtype)
    path = tmp_path / ("vectors.npy" if kind == "npy" else "vectors.safetensors")
    if kind == "npy":
        npy(path, x)
    elif kind == "ours":
        container.save(path, {"row": np.arange(7), "embedding": x}, kind="embkit.embeddings")
    else:
        save_file({"sentence": x}, path)
    (found,) = load_vectors(path)
    assert found.dtype == dtype and not found.flags.writeable and mapped(found)
    np.testing.assert_array_equal(found, x)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        npy(tmp_path / f"part-{i:02d}.npy", X[i * 2 : i * 2 + 2])
    (tmp_path / "notes.txt").write_text("not a shard")
    found = load_vectors(tmp_path)
    np.testing.assert_array_equal(np.concatenate(found), X[:6])


def test_versions_and_odd_headers_of_npy(tmp_path: Path) -> None:
    for version in ((1, 0), (2, 0), (3, 0)):
        out = io.BytesIO()
        np.lib.format.write_array(out, X, version=version)
        (tmp_path / "vectors.npy").write_bytes(out.getvalue())
        np.testing.assert_array_equal(load_vectors(tmp_path / "vectors.npy")[0], X)
    header = b'{"shape":(7,4),"descr":"<f4","fortran_order":False}\n'
    raw = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + X.tobytes()
    (tmp_path / "vectors.npy").write_bytes(raw)
    np.testing.assert_array_equal(load_vectors(tmp_path / "vectors.npy")[0], X)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize(
    ("array", "error", "says"),
    [
        (X[0], UsageError, r"\[4\]"),
        (X[None], UsageError, r"\[1, 7, 4\]"),
        (X[:0], UsageError, r"\[0, 4\]"),
        (X[:, :0], UsageError, r"\[7, 0\]"),
        (X.astype(np.float64), UsageError, "<f8"),
        (X.astype(">f4"), UsageError, ">f4"),
        (X.astype(np.int32), UsageError, "<i4"),
        (np.asfortranarray(X), UsageError, "Fortran"),
        (np.zeros(3, [("a", "f4")]), UsageError, "a structure"),
    ],
)
def test_arrays_that_are_no_embeddings(
    tmp_path: Path, array: Any, error: type[Exception], says: str
) -> None:
    path = npy(tmp_path / "vectors.npy", array)
    with pytest.raises(error, match=says) as raised:
        load_vectors(path)
    assert path.name in str(raised.value)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "mark")], object)
    path = npy(tmp_path / "vectors.npy", bomb, allow_pickle=True)
    with pytest.raises(CorruptError, match="pickle"):
        load_vectors(path)
    # A header that hides the object type, and a bare pickle in the place of the file.
    raw = path.read_bytes()
    for bad in (raw.replace(b"'|O'", b"[] "), raw[128:], raw[:20], b"", b"PK\x03\x04" + raw):
        path.write_bytes(bad)
        with pytest.raises((CorruptError, UsageError)):
            load_vectors(path)
    assert not (tmp_path / "mark").exists()
    np.load(npy(path, bomb, allow_pickle=True), allow_pickle=True)
    assert (tmp_path / "mark").exists()  # the bomb works where it is let in


def test_damaged_files(tmp_path: Path) -> None:
    path = npy(tmp_path / "vectors.npy", X)
    raw = path.read_bytes()
    huge = raw.replace(b"(7, 4)", b"(7000000000000, 4)")
    for bad in (raw[:-1], raw + b"x", huge, raw[:6] + b"\x09" + raw[7:]):
        path.write_bytes(bad)
        with pytest.raises(CorruptError, match=r"vectors\.npy"):
            load_vectors(path)
    ours = tmp_path / "vectors.safetensors"
    container.save(ours, {"embedding": X}, kind="embkit.embeddings")
    whole = bytearray(ours.read_bytes())
    whole[4096] ^= 1
    ours.write_bytes(whole)
    with pytest.raises(CorruptError):
        load_vectors(ours)


def test_safetensors_without_a_clear_tensor(tmp_path: Path) -> None:
    import torch
    from safetensors.numpy import save_file
    from safetensors.torch import save_file as save_torch

    path = tmp_path / "v.safetensors"
    for tensors, says in (
        ({"a": X, "b": X}, "2 float tensors"),
        ({"ids": np.arange(4)}, "0 float tensors"),
        ({"embedding": X.astype(np.float64)}, "F64"),
        ({"embedding": X[0]}, r"\[4\]"),
    ):
        save_file(tensors, path)
        with pytest.raises(UsageError, match=says):
            load_vectors(path)
    save_torch({"embedding": torch.from_numpy(X).bfloat16()}, path)
    with pytest.raises(UsageError, match="bfloat16") as raised:
        load_vectors(path)
    # The advice works as it stands.
    torch_vectors = torch.from_numpy(X).bfloat16()
    fix = str(raised.value).split("fix:")[1].strip().splitlines()
    code = "\n".join(line.strip() for line in fix).replace("vectors.npy", str(tmp_path / "v.npy"))
    exec(code, {"torch_vectors": torch_vectors})
    np.testing.assert_array_equal(load_vectors(tmp_path / "v.npy")[0], torch_vectors.float())


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such"):
        load_vectors(tmp_path / "none")
    with pytest.raises(UsageError, match="no .npy"):
        load_vectors(tmp_path)
    npy(tmp_path / "part-0.npy", X)
    npy(tmp_path / "part-1.npy", X[:, :3])
    with pytest.raises(UsageError, match="Shards differ") as raised:
        load_vectors(tmp_path)
    assert "part-1.npy" in str(raised.value)
    npy(tmp_path / "part-1.npy", X)
    npy(tmp_path / "part-10.npy", X)
    npy(tmp_path / "part-2.npy", X)
    with pytest.raises(UsageError, match="different orders"):
        load_vectors(tmp_path)
    (tmp_path / "part-2.npy").rename(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="both"):
        load_vectors(tmp_path)
    other = tmp_path / "vectors.csv"
    other.write_text("1,2")
    with pytest.raises(UsageError, match=r"\.csv"):
        load_vectors(other)


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    for i in (0, 2):
        npy(tmp_path / f"v-{i:05d}-of-00003.npy", X)
    with pytest.raises(CorruptError, match="2 shards are here, their names say 3"):
        load_vectors(tmp_path)


def test_origin(tmp_path: Path) -> None:
    said = {"model": "m", "pooling": "mean", "width": "4", "normalised": "true"}
    prompts = {"query": "q: "}
    for i in range(2):
        container.save(
            tmp_path / f"v-{i}.safetensors", {"embedding": X}, kind="embkit.embeddings",
            metadata={**said, "prompts": json.dumps(prompts)},
        )  # fmt: skip
    whole = Origin(model="m", pooling="mean", prompts=prompts, width=4, normalised=True)
    assert vectors_origin(tmp_path) == whole
    container.save(
        tmp_path / "v-1.safetensors", {"embedding": X}, kind="e", metadata={**said, "model": "n"}
    )
    with pytest.raises(UsageError, match="different origin"):
        vectors_origin(tmp_path)
    container.save(
        tmp_path / "one.safetensors", {"embedding": X}, kind="e", metadata={"width": "w"}
    )
    with pytest.raises(CorruptError, match="metadata"):
        vectors_origin(tmp_path / "one.safetensors")
    assert vectors_origin(npy(tmp_path / "v.npy", X)) is None
