"""A store's rows are what serving will send: sentence-transformers reads the exported model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import data, recipe
from embkit.model import Encoder, export

from .conftest import lines

PROMPTS = {"query": "Search for: ", "passage": "[SEP] título: "}
TEXTS = [
    "capital of France", "Île-de-France, 1871", "  two  spaces ", "中文 mixed 漢字",
    "e\u0301 and é", "tab\tand\nline", "a [MASK] inside", "[CLS] first", "naïve café 👍🏽",
    "x" * 150, "!?",
    "the quick brown fox jumps over the lazy dog and then some more words follow it",
    "one two three four five six seven eight nine ten eleven twelve", "\u200b", "zero\u200dwidth",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"query": f"{t} ?", "positive": t} for t in TEXTS]
    pairs = [{"sentence1": t, "sentence2": f"{t} again", "score": 1.0} for t in TEXTS]
    train = tmp_path / "raw" / "train"
    train.mkdir(parents=True)
    (train / "facts.jsonl").write_bytes(lines(rows))
    (train / "pairs.jsonl").write_bytes(lines(pairs))
    return tmp_path / "raw"


@pytest.mark.parametrize(
    ("prompts", "length"), [(PROMPTS, 14), (PROMPTS, 12), ({}, 10)], ids=["both", "cut", "plain"]
)
def test_rows_and_prompt_lengths_are_those_of_sentence_transformers(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompts: dict[str, str],
    length: int,
) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    store = data.tokenize(
        source,
        out=tmp_path / "store",
        vocab_size=500,
        max_length_query=length,
        max_length_passage=length,
        prompts=prompts,
    )
    small = recipe.Model(hidden=32, layers=1, heads=2, intermediate=32, dims=(16,))
    encoder = Encoder.from_config(
        small, store.tokenizer, max_length={"query": length, "passage": length}, prompts=prompts
    )
    served = SentenceTransformer(str(export(encoder, tmp_path / "model")), device="cpu")

    def serve(text: str, prompt: str) -> tuple[list[int], int]:
        got: dict[str, Any] = served.preprocess([text], prompt=prompt or None)
        keep = got["attention_mask"][0].bool()
        return got["input_ids"][0][keep].tolist(), int(got.get("prompt_length", 0))

    sides = {"query": prompts.get("query", ""), "passage": prompts.get("passage", ""), "either": ""}
    named = {"query": served.prompts.get("query"), "passage": served.prompts.get("document")}
    assert prompts == {} or named == PROMPTS
    checked = cut = 0
    for table in store.tasks().values():
        query, passage = ("query", "passage") if table.kind == "retrieval" else ("either", "either")
        for rows, use in ((table.query, query), (table.positive, passage)):
            for row in rows:
                one = np.array([row], np.uint64)
                ids = np.zeros(int(store.lengths(one)[0]), np.int64)
                store.gather(one, ids, np.zeros(2, np.int32))
                want, prompt_length = serve(store.text(int(row)), sides[use])
                assert ids.tolist() == want, (use, store.text(int(row)))
                assert int(store.prompt_len(one)[0]) == min(prompt_length, len(want))
                checked += 1
                cut += len(want) == length
    assert checked == 4 * len(TEXTS)
    assert cut > len(TEXTS) // 2  # else the limit is not tight
