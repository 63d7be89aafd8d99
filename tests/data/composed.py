"""Small stores to compose, and all that is in one, by name and not by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from embkit import data
from embkit.data import Store

from .conftest import lines

WORDS = [
    "red",
    "blue",
    "green",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "runs",
    "sits",
    "café",
    "über",
]
LENGTHS: dict[str, Any] = {"max_length_query": 5, "max_length_passage": 9}
PROMPTS = {"query": "query: ", "passage": "passage: "}
SAME = {"query": "text: ", "passage": "text: "}


def rows(store: Store) -> list[dict[str, Any]]:
    """Every row with all that belongs to it, by name and not by number."""
    everything = np.arange(store.rows, dtype=np.uint64)
    lengths = store.lengths(everything)
    flat = np.zeros(int(lengths.sum()), np.int32)
    bounds = np.zeros(store.rows + 1, np.int32)
    store.gather(everything, flat, bounds)
    source = store.rows_store.source(everything)
    return [
        {
            "text": text,
            "ids": flat[a:b].tolist(),
            "text_id": int(i),
            "cluster": int(c),
            "role": int(r),
            "prompt_len": int(p),
            "source": store.manifest["sources"][int(s)]["name"],
        }
        for text, a, b, i, c, r, p, s in zip(
            store.texts(), bounds[:-1], bounds[1:], store.text_id(everything),
            store.cluster(everything), store.role(everything), store.prompt_len(everything),
            source, strict=True,
        )
    ]  # fmt: skip


def examples(store: Store) -> dict[str, Any]:
    """Every task with texts and ids in place of rows, names in place of labels and sources."""
    row = [(r["text"], tuple(r["ids"])) for r in rows(store)]
    out = {}
    for task in store.manifest["tasks"]:
        t = store.examples(task["name"])
        p, n = t.positive_offsets.astype(int), t.negative_offsets.astype(int)
        out[task["name"]] = {
            "kind": task["kind"],
            "sources": task["sources"],
            "examples": [
                (
                    row[int(t.query[i])],
                    [row[int(r)] for r in t.positive[p[i] : p[i + 1]]],
                    [row[int(r)] for r in t.negative[n[i] : n[i + 1]]],
                    [None if np.isnan(x) else x for x in t.negative_score[n[i] : n[i + 1]]],
                    None if np.isnan(t.score[i]) else float(t.score[i]),
                    t.labels[t.label[i]] if t.label[i] >= 0 else None,
                    float(t.weight[i]),
                    store.manifest["sources"][int(t.provenance[i])]["name"],
                )
                for i in range(len(t))
            ],
        }
    return out


def as_set(found: list[dict[str, Any]], *without: str) -> set[str]:
    got = [json.dumps({k: v for k, v in r.items() if k not in without}) for r in found]
    assert len(got) == len(set(got))
    return set(got)


def make(
    folder: Path, tables: dict[str, list[dict[str, Any]]], tokenizer: Path, **how: Any
) -> Store:
    (folder / "in").mkdir(parents=True)
    for name, table in tables.items():
        (folder / "in" / f"{name}.jsonl").write_bytes(lines(table))
    return data.tokenize(
        data.read(folder / "in"), out=folder / "store", tokenizer=tokenizer, **LENGTHS, **how
    )


def shards(store: Store) -> list[Path]:
    return sorted(store.path.glob("texts-*"))
