"""Rivals of the near-duplicate rows: each from raw text to the texts that it calls duplicates.

They shingle by words in lower case and propose with 16 bands of 8 hashes (or what they choose).
Only gaoya and rensa check what they propose, and by an estimate.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from embkit.bench import Reported, Sample
from embkit.bench.rivals import NotInstalled, interpreter

Flags = set[int]  # texts that have a duplicate elsewhere
SCRIPT = Path(__file__).resolve().parents[3] / "benches" / "rivals" / "near.py"


def rivals(
    items: tuple[str, ...], threshold: float, wanted: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Ways to find the near-duplicates of ``items``, and why the others cannot run."""
    ways: dict[str, Callable[[], Any]] = {}
    skipped = {"semhash": "it compares vectors of a model, not the texts"}
    for name in wanted:
        try:
            if name == "datatrove":
                ways[name] = partial(_datatrove, items, _with_datatrove())
            else:
                module = importlib.import_module("gaoya.minhash" if name == "gaoya" else name)
                ways[name] = partial(_IN_PROCESS[name], items, threshold, module)
        except ImportError as error:
            skipped[name] = str(error)
    return ways, skipped


def _with_datatrove() -> Path:
    python = interpreter()
    seen = subprocess.run([python, "-c", "import datatrove, spacy"], capture_output=True)
    if seen.returncode:
        raise NotInstalled("not installed: run `make rivals`")
    return python


def _shingles(text: str) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))]


def _rensa(items: tuple[str, ...], threshold: float, rensa: Any) -> Flags:
    index = rensa.RMinHashLSH(threshold=threshold, num_perm=128, num_bands=16)
    signatures = rensa.RMinHash.from_token_sets([_shingles(t) for t in items], 128, 42)
    index.insert_many(signatures)
    found: Flags = set()
    for i, near in enumerate(index.query_all(signatures)):
        for j in near:
            if j > i and signatures[i].jaccard(signatures[j]) >= threshold:
                found |= {i, j}
    return found


def _gaoya(items: tuple[str, ...], threshold: float, gaoya: Any) -> Flags:
    index = gaoya.MinHashStringIndex(32, threshold, 16, 8, None, "word", True, (3, 3), "vec")
    documents = list(items)
    index.par_bulk_insert_docs(list(range(len(items))), documents)
    return {i for i, near in enumerate(index.par_bulk_query(documents)) if len(near) > 1}


def _datasketch(items: tuple[str, ...], threshold: float, datasketch: Any) -> Flags:
    index = datasketch.MinHashLSH(threshold=threshold, num_perm=128)
    found: Flags = set()
    for i, text in enumerate(items):
        m = datasketch.MinHash(num_perm=128)
        m.update_batch([s.encode() for s in _shingles(text)])
        near = index.query(m)
        if near:
            found |= {i, *near}
        index.insert(i, m)
    return found


def _datatrove(items: tuple[str, ...], python: Path) -> Reported:
    """In a process of its own, which measures itself; it says only which texts it keeps."""
    with tempfile.TemporaryDirectory(prefix="embkit-bench-") as home:
        folder = Path(home) / "in"
        folder.mkdir()
        with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
            for i, text in enumerate(items):
                file.write(json.dumps({"text": text, "id": str(i)}) + "\n")
        quiet: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(python), str(SCRIPT), home], capture_output=True, text=True, check=True, env=quiet
        )
    said = json.loads(done.stdout.splitlines()[-1])
    gone = set(range(len(items))) - set(said["kept"])
    return Reported(gone, Sample(said["cpu"], said["wall"], said["peak"]))


_IN_PROCESS: dict[str, Callable[..., Flags]] = {
    "rensa": _rensa, "gaoya": _gaoya, "datasketch": _datasketch
}  # fmt: skip
RIVALS = (*_IN_PROCESS, "datatrove")
