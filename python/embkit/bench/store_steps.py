"""Rows `store.steps` and `store.vs_st`: training steps from a store, as the trainer takes them.

A step is a batch of examples (query, positive, two hard negatives): drawn, cut into micro-batches
and filled, with keys and masks. sentence-transformers has the texts instead: its collator tokenises
and pads them every epoch.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case, Reported, Sample
from embkit.bench.corpus import text_shard, texts
from embkit.bench.store_data import LENGTH, QUERY_LENGTH, corpus_store
from embkit.data import Batches
from embkit.data.tables import Array

_SEED = 3


def _batches(quick: bool, size: int, layout: str) -> Batches:
    return Batches(
        corpus_store(quick), batch_size=size, seed=_SEED, hard_negatives=2, layout=layout
    )


def _steps(quick: bool, size: int, layout: str) -> Case:
    made = _batches(quick, size, layout)
    steps = max((20_000 if quick else 160_000) // size, 1)
    per_epoch = made.plan.batches_per_epoch(0)
    steps = min(steps, per_epoch)
    tokens = padded = 0
    for batch in made.stream(0, steps):
        tokens += batch.tokens
        padded += batch.padded

    def ours() -> None:
        for batch in made.stream(0, steps):
            batch["tokens"]  # what a training step takes first

    def rust() -> Reported:
        """The calls into Rust that a step needs, without what Python does around them."""
        buffer = np.empty(1 << 26, np.uint8)
        cpu = wall = 0.0
        for step in range(steps):
            c, w = time.process_time(), time.perf_counter()
            one = made.loader.batch(step)
            one.fill(buffer, True)
            cpu, wall = cpu + time.process_time() - c, wall + time.perf_counter() - w
        return Reported(None, Sample(cpu, wall, 0))

    def derive(found: Any) -> dict[str, float]:
        step = found["embkit"].cpu / steps
        return {
            "ms_per_step": 1e3 * step,
            "share_outside_rust": 1 - found["its calls into Rust"].cpu / found["embkit"].cpu,
        }

    return Case(
        name=f"store.steps.{size}.{layout}",
        unit="tokens/s",
        work=float(tokens),
        ours=ours,
        rivals={"its calls into Rust": rust},
        goal="250 Mtokens/s",
        facts={"n": len(made.store), "batch": size, "hard": 2, "padding": padded / tokens},
        derive=derive,
    )


def steps_packed(quick: bool) -> Case:
    """256 examples, packed."""
    return _steps(quick, 256, "packed")


def steps_padded(quick: bool) -> Case:
    """256 examples, padded."""
    return _steps(quick, 256, "padded")


def large_steps_packed(quick: bool) -> Case:
    """2,048 examples, packed."""
    return _steps(quick, 2048, "packed")


def large_steps_padded(quick: bool) -> Case:
    """2,048 examples, padded."""
    return _steps(quick, 2048, "padded")


def vs_st(quick: bool) -> Case:
    """An epoch of padded batches against sentence-transformers' collator on the same texts."""
    return _against(quick, tokenised=True)


def vs_st_once(quick: bool) -> Case:
    """As vs_st for a single epoch: our tokenization counts too."""
    return _against(quick, tokenised=False)


def _against(quick: bool, *, tokenised: bool) -> Case:
    size, steps = 256, 2 if quick else 8
    made = _batches(quick, size, "padded")
    items = texts(quick)
    n = len(items)
    queries = [" ".join(text.split()[:8]) for text in items]
    table = made.store.examples("pairs")

    def text_of(row: int) -> str:
        return queries[row] if row < n else items[row - n]

    rows: list[Array] = []
    tokens = 0
    for step in range(steps):
        batch = made.batch(step)
        sides = np.column_stack([batch["query"], batch["positive"], batch["hard"]])
        rows.append(batch.rows[sides])
        tokens += int(made.store.lengths(rows[-1].reshape(-1)).sum())
    assert len(table) == n
    names = ("anchor", "positive", "negative_1", "negative_2")
    features = [
        [dict(zip(names, (text_of(int(r)) for r in one), strict=True)) for one in step]
        for step in rows
    ]
    distinct = np.unique(np.concatenate(rows))
    shard = text_shard(tuple(text_of(int(r)) for r in distinct))
    tokenizer = (made.store.tokenizer / "tokenizer.json").read_text()

    def ours() -> None:
        if not tokenised:
            m = len(distinct)
            zeros, number = np.zeros(m, np.uint16), np.arange(m, dtype=np.uint64)
            role = (distinct >= n).astype(np.uint8)
            limits = [QUERY_LENGTH, LENGTH, LENGTH]
            with tempfile.TemporaryDirectory() as out:
                _rust.tokenize(
                    out, [shard], number, zeros, [""], role, zeros, number, number, tokenizer,
                    limits,
                )  # fmt: skip
        for batch in made.stream(0, steps):
            batch["tokens"]

    collate = _collator(made)
    found = collate(features[0])
    _same_passages(made, found["positive_input_ids"], found["positive_attention_mask"], rows[0])
    return Case(
        name="store.vs_st" if tokenised else "store.vs_st.one_epoch",
        unit="tokens/s",
        work=float(tokens),
        ours=ours,
        rivals={"sentence-transformers": partial(_consume, collate, features)},
        floor="200x" if tokenised else None,
        goal="200x" if tokenised else "the tokenizer's speed-up",
        facts={"batch": size, "n": steps * size, "counts_tokenization": not tokenised},
    )


def _collator(made: Batches) -> Any:
    """The collator of sentence-transformers' Trainer over a model with the store's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import data_collator, modules
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(made.store.tokenizer))
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = modules.Transformer(folder, max_seq_length=LENGTH)
        model = SentenceTransformer(modules=[encoder, modules.Pooling(8)], device="cpu")
    return data_collator.SentenceTransformerDataCollator(preprocess_fn=model.preprocess)


def _consume(collate: Any, features: list[Any]) -> None:
    for step in features:
        collate(step)


def _same_passages(made: Batches, ids: Any, mask: Any, rows: Array) -> None:
    width = int(mask.shape[1])
    ours = np.empty(mask.numel(), np.int64)
    ours_mask = np.empty_like(ours)
    assert made.store.gather_padded(rows[:, 1], ours, ours_mask, 0) == width
    np.testing.assert_array_equal(ours.reshape(-1, width), (ids * mask).numpy())
