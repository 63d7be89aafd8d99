"""A store opens only as its manifest has it: each shard there, listed, and the one it lists."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import build, make_source, make_tokenizer

from embkit import container
from embkit.data import Store
from embkit.errors import CorruptError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of many shards."""
    home = tmp_path_factory.mktemp("open")
    tokenizer = make_tokenizer(home / "tokenizer")
    return build(make_source(home / "source"), tokenizer, home / "out")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


def change(store: Path, edit: Any) -> None:
    """Rewrite the manifest with a valid checksum."""
    manifest = container.read_manifest(store)
    manifest.pop("crc32c", None)
    edit(manifest["files"])
    container.write_manifest(store, manifest)


def test_opens(copy: Path) -> None:
    shards = [n for n in container.read_manifest(copy)["files"] if n.startswith("texts-")]
    assert len(shards) > 3 and Store(copy).rows_store.shards == len(shards)


@pytest.mark.parametrize("stem", ["texts", "raw"])
def test_a_shard_that_the_manifest_lacks(copy: Path, stem: str) -> None:
    name = sorted(p.name for p in copy.glob(f"{stem}-*"))[1]
    change(copy, lambda files: files.pop(name))
    with pytest.raises(CorruptError, match=f"not in the store's manifest(?s:.*){name}"):
        Store(copy)


@pytest.mark.parametrize("stem", ["texts", "raw"])
def test_a_shard_that_is_missing(copy: Path, stem: str) -> None:
    """Also all raw files at once: a store may be made without them, this one was not."""
    for path in copy.glob(f"{stem}-*"):
        path.unlink()
    with pytest.raises(CorruptError, match="lists is missing"):
        Store(copy)


def test_a_shard_of_another_store(copy: Path, tmp_path: Path) -> None:
    """With the right name, rows and checksums, but other tokens."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    other = build(make_source(tmp_path / "source", seed=1), tokenizer, tmp_path / "out")
    name = min(p.name for p in copy.glob("texts-*"))
    theirs = min(other.glob("texts-*"))
    shutil.copy(theirs, copy / name)
    with pytest.raises(CorruptError, match="not the file that its manifest describes"):
        Store(copy)


def test_a_shard_that_is_a_link(copy: Path, tmp_path: Path) -> None:
    path = min(copy.glob("texts-*"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="outside its directory"):
        Store(copy)


@pytest.mark.parametrize("record", [None, 7, {}, {"length": "x", "header_crc": 1, "crc_crc": 1}])
def test_a_record_that_is_none(copy: Path, record: Any) -> None:
    name = min(p.name for p in copy.glob("texts-*"))
    change(copy, lambda files: files.update({name: record}))
    with pytest.raises(CorruptError, match="no usable record"):
        Store(copy)
