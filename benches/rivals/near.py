"""datatrove's MinHash pipeline as a rival of `dedup.near`, in the environment of `make rivals`.

    python near.py FOLDER    # FOLDER/in/texts.jsonl: {"text", "id"} per line

Its last line of output is JSON: CPU and wall seconds, bytes at the peak, and the ids that it keeps.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig


def main(home: Path) -> None:
    config = MinhashConfig(
        n_grams=3, num_buckets=16, hashes_per_bucket=8, hash_config=HashConfig(precision=64)
    )
    at = {name: str(home / name) for name in ("in", "signatures", "buckets", "remove", "out")}
    pipelines = [
        ([JsonlReader(at["in"]), MinhashDedupSignature(at["signatures"], config=config)], 1),
        ([MinhashDedupBuckets(at["signatures"], at["buckets"], config=config)], 16),
        ([MinhashDedupCluster(at["buckets"], at["remove"], config=config)], 1),
        (
            [
                JsonlReader(at["in"]),
                MinhashDedupFilter(at["remove"]),
                JsonlWriter(at["out"], compression=None),
            ],
            1,
        ),
    ]
    cpu, wall = time.process_time(), time.perf_counter()
    for i, (pipeline, tasks) in enumerate(pipelines):
        logs = str(home / f"log-{i}")
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=logs).run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    lines = [x for p in Path(at["out"]).rglob("*.jsonl") for x in p.read_text().splitlines()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    kept = [int(json.loads(line)["id"]) for line in lines]
    print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "kept": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
