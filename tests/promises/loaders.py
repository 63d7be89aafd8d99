"""Read a store from the workers of torch's DataLoader, after the extension's threads have run.

    python loaders.py STORE fork|spawn

Prints how many rows the workers read; they are compared with what this process reads itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from embkit import _rust
from embkit.data import Store


class Rows(Dataset):
    """Tokens of each row. A forked worker uses its parent's store, a spawned one opens its own."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return self.store.rows

    def __getitem__(self, row: int) -> torch.Tensor:
        rows = np.array([row], np.uint64)
        tokens = np.zeros(int(self.store.lengths(rows)[0]), np.int64)
        self.store.gather(rows, tokens, np.zeros(2, np.int32))
        # Threads of the extension in the worker, too.
        _rust.topk(np.ones((64, 8), np.float32), np.ones((64, 8), np.float32), 3, threads=2)
        return torch.from_numpy(tokens)


def main(path: Path, method: str) -> None:
    store = Store(path)
    texts = [t.encode() for t in store.texts()]
    ends = np.cumsum([0, *map(len, texts)]).astype(np.uint64)
    _rust.near_duplicates([(np.frombuffer(b"".join(texts), np.uint8), ends)], threads=2)
    rows = Rows(store)
    want = [tokens.tolist() for tokens in map(rows.__getitem__, range(store.rows))]
    loader = DataLoader(
        rows,
        batch_size=None,
        num_workers=1 if method == "spawn" else 2,
        multiprocessing_context=method,
    )
    got = [tokens.tolist() for tokens in loader]
    assert got == want
    print(len(got))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
