"""The row synth.gecko on the demo's data, with answers that are functions of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake import Fake

from embkit.bench.recipes_rows import world_of
from embkit.bench.synth_chain import ARMS, Chain, Size


def write(prompt: str, seed: int) -> str:
    """A query of the passage's middle words."""
    words = prompt.rsplit("Passage:", 1)[1].split("\n")[0].split()
    return f" {' '.join(words[3:8])}\nTask: find a passage like this"


def score(prompt: str, continuation: str) -> float:
    """Shared words; that the query is likelier after a passage that has them."""
    passage = prompt.rsplit("Passage:", 1)[1]
    if not passage.rstrip().endswith("Answer:"):
        return float(len(set(continuation.split()) & set(passage.split())))
    query = passage.rsplit("Query:", 1)[1]
    near = len(set(query.split()) & set(passage.split("Query:")[0].split()))
    return near - 3.0 if continuation == " Yes" else 0.0


@pytest.mark.slow
def test_the_row_is_made_of_kept_parts(tmp_path: Path) -> None:
    world, _ = world_of(True)
    try:
        size = Size(passages=24, candidates=5, shard=12, seeds=(0, 1), steps=2, batch=8,
                    sets=("retrieval.jsonl.zst",))  # fmt: skip
        case = Chain(tmp_path, world, Fake(write, score), size).case()
        facts: dict[str, Any] = dict(case.facts)
        assert facts["queries"] == 24 and set(facts["arms"]) == set(ARMS)
        assert 0 <= facts["share_best_is_not_seed"] < 0.5 and facts["seed_mrr"] > 0.5
        assert facts["judge"]["after"] <= facts["judge"]["before"] == 24
        before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
        again = Chain(tmp_path, world, Fake(None, None), size).case()  # asks for nothing
        assert again.ours().value == case.ours().value and dict(again.facts) == facts
        assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before
    finally:
        world.close()
