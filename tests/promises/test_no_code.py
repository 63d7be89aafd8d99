"""P8: no file that embkit reads can run code. (The static half: tests/meta/test_imports.py.)"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container, data
from embkit.data import vocabulary
from embkit.data.vectors import load_vectors
from embkit.errors import EmbkitError

pytestmark = pytest.mark.promise
HERE = Path(__file__).parent


def test_no_pickle(built: Path, source: Path, tmp_path: Path) -> None:
    """P8: 0 audit events of unpickling, executing or starting programs in every load path."""
    shutil.copytree(built, tmp_path / "built")
    done = subprocess.run(
        [sys.executable, HERE / "load_everything.py", tmp_path / "built", source],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "EMBKIT_PROGRESS": "off"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    events = json.loads(done.stdout.splitlines()[-1])
    *found, compiled, executed = events  # the last two are the probe's own
    assert compiled.startswith("compile") and executed.startswith("exec")
    assert not found


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def pickled(mark: Path) -> bytes:
    import pickle

    return pickle.dumps(Bomb(mark))


def torch_file(mark: Path) -> bytes:
    """What ``torch.save`` writes: a zip with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(mark))
        archive.writestr("archive/version", "3\n")
    return out.getvalue()


def numpy_file(mark: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Bomb(mark)], object), allow_pickle=True)
    return out.getvalue()


POISON: dict[str, Callable[[Path], bytes]] = {
    "poison.pt": torch_file, "poison.npy": numpy_file, ".metadata": pickled, "poison.pkl": pickled,
}  # fmt: skip


@pytest.mark.parametrize("name", POISON)
def test_poison_is_refused_by_name(built: Path, tmp_path: Path, name: str) -> None:
    """P8: pickles in the place of every kind of input: an error that names the file, and no
    mark."""
    mark = tmp_path / "mark"
    poison = POISON[name](mark)
    path = tmp_path / name
    path.write_bytes(poison)
    # The poison works where it is let in.
    import pickle

    pickle.loads(pickled(tmp_path / "proof"))
    assert (tmp_path / "proof").is_dir()

    def refused(load: Callable[[Path], object], path: Path) -> None:
        with pytest.raises((EmbkitError, ValueError)) as error:
            load(path)
        assert path.name in f"{error.value} {getattr(error.value, 'where', '')}", error.value
        assert not mark.exists(), f"{load} ran it"

    refused(lambda p: data.read(p).save(tmp_path / "records"), path)
    refused(container.load, path)
    refused(vocabulary.load_tokenizer, path)
    refused(load_vectors, path)
    renamed = tmp_path / "rows.jsonl"
    renamed.write_bytes(poison)
    refused(lambda p: data.read(p).save(tmp_path / "records"), renamed)
    parquet = tmp_path / "rows.parquet"
    parquet.write_bytes(poison)
    for vectors in ("vectors.npy", "vectors.safetensors"):
        (tmp_path / vectors).write_bytes(poison)
        refused(load_vectors, tmp_path / vectors)
    refused(lambda p: data.read(p).save(tmp_path / "records"), parquet)

    store = tmp_path / "store"
    shutil.copytree(built / "store", store)
    (store / name).write_bytes(poison)  # beside the others: nobody reads it
    data.Store(store, verify="open").tasks()
    for victim in ("examples-pairs.safetensors", "tokenizer/tokenizer.json", "manifest.json"):
        whole = (store / victim).read_bytes()
        (store / victim).write_bytes(poison)
        refused(lambda p: data.Store(store).tasks(), store / victim)
        (store / victim).write_bytes(whole)
