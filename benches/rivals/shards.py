"""The shard formats that embkit's store is measured beside, each in a long-lived process.

    python shards.py PEER FOLDER    peers: mds, mds-items, litdata, webdataset, datasets

FOLDER holds the work (made by embkit.bench.rivals): `flat.npy` uint16 [tokens], `offsets.npy` int64
[n + 1] and `job.json` with the size of a batch. The peer writes its shards there once and says
`ready`. Then each line on stdin is one round, answered by one line of JSON with its CPU seconds,
wall seconds, peak bytes and tokens:

    batches     one epoch of shuffled, padded int64 batches with masks, as torch tensors
    check       the same with a checksum over the rows
    write       the shards once more
    resume      epoch until the middle, state saved, a new loader from it: seconds until its first
                batch, and the rows that were lost and repeated

Every peer reads in its own best way in one process, and gets the fastest collate that we know.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import shutil
import sys
import time
import types
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BUFFER = 10_000  # rows of a shuffle buffer, where that is the peer's way
SHARD_BYTES = 64 << 20


def collate(flat: Any, sizes: Any) -> tuple[Any, Any]:
    """Rows behind each other to int64 ids and mask [n, longest]: one scatter through the mask."""
    import torch

    keep = np.arange(int(sizes.max())) < sizes[:, None]
    ids, mask = np.zeros(keep.shape, np.int64), keep.astype(np.int64)
    ids[keep] = flat
    return torch.from_numpy(ids), torch.from_numpy(mask)


def collate_rows(rows: list[Any]) -> tuple[Any, Any]:
    """As collate, from a list of arrays."""
    return collate(np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows)))


class Peer:
    """A way to keep token rows on disk and to read them shuffled.

    Attributes:
        home: its shards. batch: rows of a batch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.flat = np.load(folder / "flat.npy", mmap_mode="r")
        self.offsets = np.load(folder / "offsets.npy")
        self.batch = int(json.loads((folder / "job.json").read_text())["batch"])
        self.home = folder / "shards"
        self.epoch = 0

    def rows(self) -> Iterator[Any]:
        flat = np.asarray(self.flat)
        ends = self.offsets.tolist()
        for a, b in zip(ends[:-1], ends[1:], strict=True):
            yield flat[a:b]

    def write(self, out: Path) -> None:
        raise NotImplementedError

    def loader(self) -> Any:
        """What a training loop iterates for one more epoch."""
        raise NotImplementedError

    def resume(self) -> tuple[Any, Any, Any]:
        """A loader, how to save its state, and how to make a loader from that."""
        raise NotImplementedError


class Mds(Peer):
    """mosaicml-streaming through its own loader."""

    def __init__(self, folder: Path) -> None:
        stub("torchvision")  # it asks for that even where there are no images
        super().__init__(folder)

    def write(self, out: Path) -> None:
        from streaming import MDSWriter

        columns = {"t": "ndarray:uint16"}
        with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES) as writer:
            for row in self.rows():
                writer.write({"t": row})

    def dataset(self) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        return StreamingDataset(
            local=str(self.home), shuffle=True, batch_size=self.batch, num_canonical_nodes=1,
            shuffle_seed=self.epoch,
        )  # fmt: skip

    def loader(self) -> Any:
        from streaming import StreamingDataLoader

        return StreamingDataLoader(
            self.dataset(), batch_size=self.batch, num_workers=0,
            collate_fn=lambda rows: collate_rows([r["t"] for r in rows]),
        )  # fmt: skip

    def resume(self) -> tuple[Any, Any, Any]:
        made = self.loader()

        def again(state: Any) -> Any:
            loader = self.loader()
            loader.load_state_dict(state)
            return loader

        return made, lambda: json.loads(json.dumps(made.state_dict())), again


class MdsItems(Mds):
    """mosaicml-streaming by item number in an order of our own: without its loader."""

    def loader(self) -> Any:
        made = self.dataset()
        order = np.random.default_rng(self.epoch).permutation(len(self.offsets) - 1).tolist()
        for i in range(0, len(order), self.batch):
            yield collate_rows([made[j]["t"] for j in order[i : i + self.batch]])


class Litdata(Peer):
    """litdata through its own loader."""

    def write(self, out: Path) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(out), chunk_bytes=SHARD_BYTES)
        for i, row in enumerate(self.rows()):
            writer[i] = {"t": row}
        writer.done()
        writer.merge(1)

    def loader(self) -> Any:
        from litdata import StreamingDataLoader, StreamingDataset

        return StreamingDataLoader(
            StreamingDataset(str(self.home), shuffle=True, seed=self.epoch), num_workers=0,
            batch_size=self.batch, collate_fn=lambda rows: collate_rows([r["t"] for r in rows]),
        )  # fmt: skip

    def resume(self) -> tuple[Any, Any, Any]:
        made = self.loader()

        def again(state: Any) -> Any:
            loader = self.loader()
            loader.load_state_dict(state)
            return loader

        return made, made.state_dict, again


class WebDataset(Peer):
    """webdataset: tar files of .npy, shuffled in a buffer."""

    def write(self, out: Path) -> None:
        import webdataset

        pattern = str(out / "s-%05d.tar")
        with webdataset.ShardWriter(pattern, maxcount=25_000, verbose=0) as writer:
            for i, row in enumerate(self.rows()):
                writer.write({"__key__": f"{i:09d}", "t.npy": row})

    def loader(self) -> Any:
        import webdataset

        urls = [str(p) for p in sorted(self.home.glob("*.tar"))]
        made = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=self.epoch)
        rows = made.shuffle(BUFFER).decode().to_tuple("t.npy")
        return rows.batched(
            self.batch, collation_fn=lambda rows: collate_rows([r for (r,) in rows]), partial=True
        )


class Datasets(Peer):
    """Hugging Face datasets: an Arrow table, shuffled by an index, rows taken from its buffers."""

    def write(self, out: Path) -> None:
        from datasets import Dataset, Features, List, Value

        features = Features({"t": List(Value("uint16"))})
        made = Dataset.from_generator(
            lambda: ({"t": row} for row in self.rows()), features=features,
            cache_dir=str(out / "cache"),
        )  # fmt: skip
        made.save_to_disk(str(out / "ds"))

    def loader(self) -> Any:
        from datasets import disable_progress_bars, load_from_disk

        disable_progress_bars()
        made = load_from_disk(str(self.home / "ds")).with_format("arrow")
        for table in made.shuffle(seed=self.epoch).iter(self.batch):
            column = table.column("t").combine_chunks()
            sizes = np.diff(column.offsets.to_numpy())
            yield collate(column.flatten().to_numpy(), sizes.astype(np.int64))

    def resume(self) -> tuple[Any, Any, Any]:
        from datasets import load_from_disk

        made = load_from_disk(str(self.home / "ds")).with_format("numpy")

        def stream() -> Any:
            shuffled = made.to_iterable_dataset(num_shards=16)
            return shuffled.shuffle(seed=self.epoch, buffer_size=BUFFER)

        def batches(rows: Any) -> Iterator[Any]:
            for found in rows.iter(self.batch):
                yield collate_rows(list(found["t"]))

        now = stream()

        def again(state: Any) -> Any:
            rows = stream()
            rows.load_state_dict(state)
            return batches(rows)

        return batches(now), lambda: json.loads(json.dumps(now.state_dict())), again


PEERS = {
    "mds": Mds, "mds-items": MdsItems, "litdata": Litdata, "webdataset": WebDataset,
    "datasets": Datasets,
}  # fmt: skip


def row_sums(ids: Any, mask: Any) -> list[int]:
    """A checksum of each row of a padded batch: of its real ids, as uint16."""
    sizes = mask.sum(1).tolist()
    return [zlib.crc32(r[:n].astype(np.uint16).tobytes()) for r, n in zip(ids, sizes, strict=True)]


def one_round(peer: Peer, word: str) -> dict[str, Any]:
    """Do one round; its result."""
    if word == "write":
        out = peer.folder / "again"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        peer.write(out)
        return {"tokens": int(peer.offsets[-1])}
    if word == "resume":
        return resume(peer)
    peer.epoch += 1
    tokens = checksum = rows = 0
    for ids, mask in peer.loader():
        rows += len(ids)
        if word == "check":
            sums = row_sums(ids.numpy(), mask.numpy())
            checksum += sum(sums)
            tokens += int(mask.sum())
    return {"rows": rows, "tokens": tokens, "checksum": checksum}


def tell(peer: Peer, word: str, found: dict[str, Any]) -> None:
    """Do one round; its result goes to `found`."""
    found.update(one_round(peer, word))


def resume(peer: Peer) -> dict[str, Any]:
    """Stop in the middle of an epoch and go on from the saved state."""
    peer.epoch += 1
    loader, save, again = peer.resume()
    rows = len(peer.offsets) - 1
    seen: list[int] = []
    batches = iter(loader)
    for _ in range(rows // peer.batch // 2):
        ids, mask = next(batches)
        seen += row_sums(ids.numpy(), mask.numpy())
    state = save()
    del batches, loader
    started = time.perf_counter()
    rest = iter(again(state))
    ids, mask = next(rest)
    seconds = time.perf_counter() - started
    seen += row_sums(ids.numpy(), mask.numpy())
    for ids, mask in rest:
        seen += row_sums(ids.numpy(), mask.numpy())
    ends = peer.offsets
    flat = np.asarray(peer.flat)
    want = [zlib.crc32(flat[ends[i] : ends[i + 1]].tobytes()) for i in range(rows)]
    lost, repeated = multiset_difference(want, seen), multiset_difference(seen, want)
    return {"seconds": seconds, "lost": lost, "repeated": repeated}


def multiset_difference(a: list[int], b: list[int]) -> int:
    """Members of `a` that `b` has fewer of."""
    from collections import Counter

    return sum((Counter(a) - Counter(b)).values())


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != self.package:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub(package: str) -> None:
    """Let `import package` work although it is not installed."""
    sys.meta_path.append(_Finder(package))


def main() -> None:
    # Packages print: what they print goes to stderr, the answers to the real stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from embkit.bench import measure

    name, folder = sys.argv[1], Path(sys.argv[2])
    import torch

    torch.set_num_threads(1)
    peer = PEERS[name](folder)
    peer.home.mkdir(exist_ok=True)
    peer.write(peer.home)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        found: dict[str, Any] = {}
        sample = measure(partial(tell, peer, line.strip(), found))
        answer = {"cpu": sample.cpu, "wall": sample.wall, "peak": sample.peak, **found}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
