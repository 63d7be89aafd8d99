"""Mined negatives of texts that have classes: none of the query's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import write_jsonl

from embkit import data, pipeline, recipe
from embkit.data import Store
from embkit.errors import UsageError
from embkit.mine import candidates_of, load_negatives, mine

CLASSES = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[recipe.Recipe, Store, Path]:
    """A converted set, and vectors in which texts of a class lie together."""
    out = tmp_path_factory.mktemp("classes")
    rows = [{"text": f" text {i} of topic {i % CLASSES}", "label": i % CLASSES} for i in range(80)]
    rows.append({"text": "alone in its class", "label": 99})
    write_jsonl(out / "in" / "train" / "topics.jsonl", rows)
    for split in ("dev", "test"):
        (out / "in" / split).mkdir()
    tasks = {"topics": {"convert": {"rule": "classes"}, "negatives": "mined"}}
    loaded = recipe.from_table({"data": {"path": str(out / "in")}, "tasks": tasks})
    files = pipeline.training_files(out / "in")
    records = data.read(files, **pipeline.read_options(loaded)).save(out / "records")
    store = data.tokenize(records, out=out / "store", vocab_size=300)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, 8))
    vectors = [
        (centres[int(text.split()[-1])] if "topic" in text else 0) + rng.standard_normal(8) / 9
        for text in store.texts()
    ]
    unit = np.array(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.save(out / "vectors.npy", unit.astype(np.float32))
    return loaded, store, out


def topic(store: Store, row: int) -> str:
    return store.text(row).split()[-1]


def same_class(store: Store, folder: Path) -> tuple[int, int]:
    """Negatives of the query's class, and all of them."""
    table = store.examples("topics")
    offsets, row, _, _ = load_negatives(folder, "topics")
    counts = np.diff(offsets.astype(int))
    pairs = zip(np.repeat(table.query, counts).tolist(), row.tolist(), strict=True)
    return sum(topic(store, q) == topic(store, n) for q, n in pairs), len(row)


@pytest.mark.parametrize(
    "rules", [{}, {"sample": "random", "seed": 3}, {"percent_of_positive": 0.5, "refill": "relax"}]
)
def test_no_negative_is_of_the_querys_class(
    rules: dict[str, Any], made: tuple[recipe.Recipe, Store, Path], tmp_path: Path
) -> None:
    loaded, store, out = made
    options: dict[str, Any] = {
        "k": 3, "candidates": 12, "percent_of_positive": None, "near_duplicate": None,
        "embeddings": out / "vectors.npy",
        **rules,
    }  # fmt: skip
    classes = pipeline.mined_classes(loaded, ["topics"])
    assert len(classes["topics"]) == 81
    mine(None, store, out=tmp_path / "with", classes=classes, **options)
    mine(None, store, out=tmp_path / "without", **options)
    assert same_class(store, tmp_path / "with") == (0, 80 * 3)
    wrong, total = same_class(store, tmp_path / "without")
    assert wrong > total // 2 or rules.get("refill")
    # The same ranks as in a corpus that has the others alone.
    table = store.examples("topics")
    unit = np.load(out / "vectors.npy")
    passages = np.unique(np.concatenate([table.positive, table.negative])).astype(int)
    if not rules:
        offsets, row, _, _ = load_negatives(tmp_path / "with", "topics")
        for i, query in enumerate(table.query.tolist()):
            others = [p for p in passages if topic(store, p) != topic(store, query)]
            score = unit[others] @ unit[query]
            want = {others[j] for j in np.argsort(-score)[:3]}
            assert set(row[int(offsets[i]) : int(offsets[i + 1])].tolist()) == want
    found, _ = candidates_of(
        tmp_path / "with", 5, task="topics", store=store, embeddings=out / "vectors.npy"
    )
    own = topic(store, int(table.query[5]))
    assert {c.rule for c in found if topic(store, c.row) == own} == {"positive"}
    assert all(c.rule != "positive" for c in found if topic(store, c.row) != own)


def test_what_cannot_know_classes_is_refused(made: tuple[recipe.Recipe, Store, Path]) -> None:
    loaded, store, out = made
    classes = pipeline.mined_classes(loaded, ["topics"])
    options: dict[str, Any] = {"classes": classes, "embeddings": out / "vectors.npy"}
    with pytest.raises(UsageError, match="whatever their class"):
        mine(None, store, out=out / "no", refill="random", **options)
    convert = {"rule": "classes", "unique_id": True}
    with pytest.raises(UsageError, match="unique_id tells"):
        recipe.from_table({"tasks": {"a": {"convert": convert, "negatives": "mined"}}})
    words = pipeline.miner(loaded, store.path).command(out, out)
    sets = [word for before, word in zip(words, words[1:], strict=False) if before == "--set"]
    again = recipe.load("quickstart", overrides=sets)
    assert pipeline.mined_classes(again, pipeline.mined_tasks(again, store)) == classes
