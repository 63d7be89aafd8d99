"""The row `synth.write`: how many of a small model's queries can be used, and find their passage.

Twenty real passages, one query each. A query counts when its answer was of the form that was asked
for and BM25 over 500 passages of the same sets has its own among the first ten: the form alone is
no use when the query is about something else.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.bench import Case, Reported, Sample
from embkit.bench.llm import real_model
from embkit.bench.synth_chain import Size, real_passages
from embkit.bench.synth_real import folder, real_data
from embkit.errors import CorruptError
from embkit.evaluate.bm25 import bm25_rank
from embkit.synth import Write, write_queries
from embkit.synth.prompts import load

_VERSION = 1
_WAYS = (("gecko-lines", 0.0), ("gecko-lines", 0.7), ("gecko", 0.0))  # prompt and temperature
_FIRST = 10


def written(quick: bool) -> Case:
    """The row."""
    data = real_data()
    asked = real_passages(data, Size(passages=3 if quick else 20))
    pool = list(dict.fromkeys([*asked, *real_passages(data, Size())]))
    llm = real_model(token_budget=4096, chat=False)
    found = {f"{prompt}, {t:g}": _one(llm, asked, pool, prompt, t) for prompt, t in _WAYS}
    (ours, mine), *_, (rival, theirs) = found.items()
    return Case(
        name="synth.write", unit="share", work=1.0, rounds=1, goal="> 0.5", two_threads=False,
        ours=lambda: Reported(mine["share"], Sample(mine["cpu"], mine["cpu"], 0)),
        rivals={rival: lambda: Reported(theirs["share"], Sample(theirs["cpu"], theirs["cpu"], 0))},
        score=float,
        facts={"passages": len(asked), "pool": len(pool), "way": ours, "ways": found,
               "llm": llm.name},
    )  # fmt: skip


def _one(llm: Any, asked: list[str], pool: list[str], prompt: str, temperature: float) -> Any:
    """Counts of one prompt and temperature; kept in the cache."""
    about = [_VERSION, llm.params(), load(prompt).digest, temperature, asked, len(pool)]
    home = folder() / f"write-{_rust.blake3(json.dumps(about).encode())[:16]}"
    kept = home.with_suffix(".json")
    if not kept.is_file():
        begun = time.process_time()
        how = Write(prompt=prompt, temperature=temperature, shard=len(asked), max_rejected=1.0)
        ranks: list[int] = []
        dropped: Any = "all"
        with suppress(CorruptError):  # no query can be used
            dropped = write_queries(asked, llm=llm, out=home, how=how).report["dropped"]
            ranks = _ranks(home, asked, pool)
        spent = time.process_time() - begun
        row = {
            "share": sum(rank <= _FIRST for rank in ranks) / len(asked), "kept": len(ranks),
            "dropped": dropped, "cpu": round(spent, 1),
            "mrr_of_kept": round(sum(1 / rank for rank in ranks) / max(len(ranks), 1), 3),
        }  # fmt: skip
        _rust.publish_file(str(kept), json.dumps(row).encode())
    return json.loads(kept.read_text())


def _ranks(home: Path, asked: list[str], pool: list[str]) -> list[int]:
    """Rank by BM25 of the own passage of each query that was kept, from 1."""
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    rows = [row for row in rows if not row["reason"]]
    order = bm25_rank([row["query"] for row in rows], pool, k=len(pool))
    return [
        1 + list(of).index(pool.index(asked[row["passage"]]))
        for of, row in zip(order, rows, strict=True)
    ]


CASES = (written,)
