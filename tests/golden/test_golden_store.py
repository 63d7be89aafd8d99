"""A whole store of each released version: read with today's code, refused when it is newer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from embkit import _rust, container, data
from embkit.errors import FormatError

STORES = sorted(Path(__file__).parent.glob("store-v*"))
FILES = sorted(p.name for p in STORES[0].glob("*.safetensors"))


@pytest.mark.parametrize("golden", STORES, ids=lambda p: p.name)
def test_old_stores_stay_readable(golden: Path) -> None:
    store = data.Store(golden, verify="open")
    rows = np.arange(6, dtype=np.uint64)
    assert (len(store), store.tokens, store.manifest["counts"]["truncated"]) == (6, 13, 1)
    texts = ["plain words", "plain words", "naïve café", "你好", "other words", "café"]
    assert list(store.texts()) == texts == [store.text(row) for row in range(6)]
    tokens, ends = np.zeros(13, np.int64), np.zeros(7, np.int32)
    store.gather(rows, tokens, ends)
    want = [[5, 6, 1], [1, 2], [4, 3], [0], [7, 2], [5, 6, 3]]
    assert [tokens[a:b].tolist() for a, b in zip(ends[:-1], ends[1:], strict=True)] == want
    assert store.role(rows).tolist() == [0, 2, 1, 1, 2, 0]
    assert store.prompt_len(rows).tolist() == [2, 0, 0, 0, 0, 2]
    assert store.text_id(rows).tolist() == store.cluster(rows).tolist()
    assert store.text_id(rows)[2] == 5463492418451782337
    tasks = store.tasks()
    assert tasks["pairs"].query.tolist() == [0, 5]
    assert tasks["pairs"].positive_offsets.tolist() == [0, 2, 3]
    assert tasks["pairs"].positive.tolist() == [2, 3, 2]
    assert tasks["pairs"].negative.tolist() == [4]
    assert tasks["classes"].label.tolist() == [0, 1]
    assert tasks["classes"].labels == ("a", "b")
    assert store.prompts == {"query": "q: ", "passage": ""}
    assert store.max_length == {"query": 3, "passage": 4}


def newer(path: Path) -> None:
    """Raise the version of a container, and of the embkit that it needs, and seal it again."""
    content = bytearray(path.read_bytes())
    for old, new in ((b'"version":"1"', b'"version":"2"'), (b'"0.1.0"', b'"7.8.9"')):
        assert content.count(old) == 1
        content[content.index(old) : content.index(old) + len(old)] = new
    at, start = 42, 8 + int.from_bytes(content[:8], "little")
    content[at : at + 8] = b"00000000"
    content[at : at + 8] = f"{_rust.crc32c(bytes(content[:start])):08x}".encode()
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_store_with_a_newer_file_names_the_embkit_it_needs(tmp_path: Path, name: str) -> None:
    """P11: whichever file is newer; also when the manifest, as it would, says so."""
    store = tmp_path / "store"
    shutil.copytree(STORES[-1], store)
    manifest = container.read_manifest(store)
    if name == "manifest.json":
        container.write_manifest(store, {**manifest, "version": 2, "embkit": "7.8.9"})
    else:
        newer(store / name)
        start = 8 + int.from_bytes((store / name).read_bytes()[:8], "little")
        record = manifest["files"][name]
        record["header_crc"] = _rust.crc32c((store / name).read_bytes()[:start])
        container.write_manifest(store, manifest)
    with pytest.raises(FormatError, match=re.escape("needs embkit 7.8.9")):
        data.Store(store)


@pytest.mark.parametrize("kind", ["records", "store", "run", "negatives", "soup", "evaluate"])
def test_directories_of_a_newer_version(tmp_path: Path, kind: str) -> None:
    """P11: every kind of directory."""
    content = {"format": f"embkit.{kind}", "version": 2, "embkit": "7.8.9", "files": {}}
    container.write_manifest(tmp_path, content)
    with pytest.raises(FormatError, match=re.escape("needs embkit 7.8.9")):
        container.read_manifest(tmp_path, kind=f"embkit.{kind}")
