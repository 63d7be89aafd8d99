"""Load every kind of file that embkit reads, under an audit hook; print what else was run.

    python load_everything.py BUILT SOURCE

Everything is loaded once so that all modules are there, then again with the hook on.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import zstandard

WATCHED = ("pickle.find_class", "marshal.load", "marshal.loads", "exec", "compile", "os.system",
           "subprocess.Popen", "os.exec", "os.posix_spawn", "import")  # fmt: skip


def sources(source: Path, folder: Path) -> list[Path]:
    """One set of rows in every packing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = (source / "pairs.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(plain)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(plain))
    rows = [json.loads(line) for line in plain.splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return sorted(folder.iterdir())


def load_everything(built: Path, files: list[Path]) -> None:
    from embkit import container, data
    from embkit.data import vocabulary
    from embkit.data.vectors import load_vectors, vectors_origin
    from embkit.train import checkpoint

    for folder in ("records", "clean"):
        records = data.Records.open(built / folder)
        assert list(records.texts) and records.tasks() and records.report
    container.load(built / "clean" / "clusters.safetensors", kind="embkit.clusters")
    store = data.Store(built / "store", verify="open")
    rows = np.arange(store.rows, dtype=np.uint64)
    store.gather(rows, np.zeros(store.tokens, np.int64), np.zeros(len(rows) + 1, np.int32))
    assert store.tasks() and list(store.texts()) and store.cluster(rows).any()
    vocabulary.load_tokenizer(store.tokenizer)
    container.load_torch(built / "model.safetensors")
    for name in ("vectors.npy", "vectors.safetensors"):
        load_vectors(built / name)
        vectors_origin(built / name)
    assert checkpoint.load_latest(built / "checkpoints") is not None
    with tempfile.TemporaryDirectory() as folder:
        data.read(files).save(Path(folder) / "records")


def main(built: Path, source: Path) -> None:
    import torch

    from embkit import container
    from embkit.train import checkpoint

    container.save(built / "model.safetensors", {"w": torch.ones(3)}, kind="embkit.test")
    vectors = np.ones((3, 2), np.float32)
    np.save(built / "vectors.npy", vectors)
    container.save(built / "vectors.safetensors", {"embedding": vectors}, kind="embkit.embeddings")
    checkpoint.save(
        built / "checkpoints", step=1, model={"w": torch.ones(2)}, optimizer={}, state={"seed": 1}
    )
    events: list[str] = []
    armed = False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event in WATCHED:
            events.append(f"{event} {arguments!r:.200}")

    with tempfile.TemporaryDirectory() as folder:
        files = sources(source, Path(folder))
        load_everything(built, files)
        sys.addaudithook(hook)
        armed = True
        load_everything(built, files)
        armed = False
    # The test itself: the hook sees what it is there for.
    armed = True
    exec(compile("pass", "probe", "exec"))
    armed = False
    print(json.dumps(events))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
