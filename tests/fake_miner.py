"""A miner that needs no torch: ranked lists that follow from the weights alone.

python fake_miner.py STORE MODEL OUT [SECONDS [BY]]

Each example gets 12 rows of the store, drawn with the weights' hash as the seed, or by the step of
the weights when BY is "step": other ranks have other last bits.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np

from embkit import container
from embkit.stage import stage

LONG = 12


def main(store_path: str, model: str, out: str, seconds: str = "0", by: str = "weights") -> None:
    time.sleep(float(seconds))
    # Not embkit.data: a process starts in a fifth of the time without it.
    store = json.loads((Path(store_path) / "manifest.json").read_text())
    drawn_by = (Path(model) / "model.safetensors").read_bytes()
    if by == "step":
        drawn_by = Path(out).name.encode()
    seed = int.from_bytes(hashlib.sha256(drawn_by).digest()[:8], "little")
    with stage(out, name="mine", params={"seed": str(seed)}, kind="embkit.negatives") as work:
        if work.done:
            return
        m = next(t["examples"] for t in store["tasks"] if t["name"] == "retrieval")
        rng = np.random.default_rng(seed)
        row = np.concatenate([rng.permutation(store["counts"]["rows"])[:LONG] for _ in range(m)])
        container.save(
            work.dir / "negatives-retrieval.safetensors",
            {
                "offsets": np.arange(0, LONG * m + 1, LONG, dtype=np.uint64),
                "row": row.astype(np.uint64),
                "score": np.zeros(LONG * m, np.float32),
                "rank": np.tile(np.arange(LONG, dtype=np.uint32), m),
            },
            kind="embkit.negatives",
            metadata={"task": "retrieval"},
        )
        work.publish(
            {
                "tasks": [{"name": "retrieval", "examples": m, "negatives": LONG * m}],
                "store": store["digest"],
            }
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
