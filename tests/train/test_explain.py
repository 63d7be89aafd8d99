"""What `embkit explain` says of candidates, and what the loss does on converted tasks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import write_jsonl

from embkit import data, pipeline
from embkit import recipe as recipes
from embkit.data import Store
from embkit.losses import Candidates, compute, explain
from embkit.recipe import Train
from embkit.recipe.loss import FORMS
from embkit.train.batches import Batch, Steps
from embkit.train.parallel import Ranks

ROWS: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": f"text {i}", "label": i % 3} for i in range(24)],
    "names": [{"text": f"line {i}", "label": "abc"[i % 3]} for i in range(24)],
    "nli": [
        {"premise": f"premise {i // 3}", "hypothesis": f"claim {i % 9}", "label": i % 3}
        for i in range(48)
    ],
    "bitext": [{"source": f"word {i}", "target": f"wort {i}"} for i in range(10)],
    "plain": [{"query": f"query {i // 2}", "positive": f"passage {i % 7}"} for i in range(24)],
    "topics": [{"text": f"topic {i}", "label": i % 4} for i in range(24)],
    "graded": [
        {"sentence1": f"one {i}", "sentence2": f"two {i}", "score": i % 3} for i in range(24)
    ],
}
RULES = {"classes": "classes", "names": "label-names", "nli": "nli", "bitext": "bitext"}
SIZES = {name: 6 + i for i, name in enumerate(ROWS)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[recipes.Recipe, Store]:
    out = tmp_path_factory.mktemp("explain")
    for split in ("dev", "test"):
        (out / "in" / split).mkdir(parents=True)
    for name, rows in ROWS.items():
        write_jsonl(out / "in" / "train" / f"{name}.jsonl", rows)
    tasks = {name: {"convert": {"rule": rule}} for name, rule in RULES.items()}
    loaded = recipes.from_table({"data": {"path": str(out / "in")}, "tasks": tasks})
    files = pipeline.training_files(out / "in")
    records = data.read(files, **pipeline.read_options(loaded)).save(out / "records")
    return loaded, data.tokenize(records, out=out / "store", vocab_size=300)


def first_batches(store: Store, config: Train) -> dict[str, Batch]:
    """The first batch of each task that is contrasted, with its buffers its own."""
    steps, found = Steps(store, config, Ranks(), layout="padded"), {}
    for batch in steps.stream(0, 60, threads=1, device=torch.device("cpu")):
        if batch.sides.kind != "sts" and batch.filled.task not in found:
            sides = {
                f.name: x.clone() if isinstance(x, torch.Tensor) else x
                for f in dataclasses.fields(batch.sides)
                for x in [getattr(batch.sides, f.name)]
            }
            places = {n: getattr(batch, n).clone() for n in ("query", "positive", "hard")}
            found[batch.filled.task] = dataclasses.replace(
                batch, sides=type(batch.sides)(**sides), **places
            )
    assert len(found) == 6
    return found


def terms_of_the_loss(batch: Batch, config: Train) -> list[float]:
    """Of each row the sum that stands in its denominator, temperature 1.

    Every distinct text has an axis of its own, so that a candidate adds 1 to the denominator, e
    where it is the query's own text, and the loss is the logarithm.
    """
    e = torch.eye(len(batch.filled.rows), dtype=torch.float64)
    out = []
    for i in range(len(batch.query)):
        one = torch.zeros(len(batch.query), dtype=torch.float64)
        one[i] = 1
        sides = dataclasses.replace(batch.sides, weight=one)
        args = (e, batch.query, batch.positive, batch.hard, sides)
        found = compute(*args, dims=(len(e),), config=config, loss=batch.loss)
        out.append(math.exp(found.loss.item()))
    return out


def terms_that_are_told(batch: Batch, store: Store, config: Train, lines: str) -> list[float]:
    """The same by the words of explain: a number of candidates, less what it calls masked."""
    total = int(re.search(r"candidates of a query: (\d+)", lines).group(1))  # type: ignore[union-attr]
    text = [store.text(int(row)) for row in batch.filled.rows]
    label = {row["text"]: row["label"] for row in ROWS["topics"]}
    q, p = ([text[i] for i in places.tolist()] for places in (batch.query, batch.positive))
    terms, rows = batch.loss.terms(), range(len(batch.query))
    limit = math.inf if terms["margin"] is None else terms["margin"]
    out = []
    for i in rows:
        drop: Counter[str] = Counter()
        for j in rows:
            if i == j:
                continue
            if "texts of its own class" in lines.partition("masked:")[2]:
                masked = label[q[i]] == label[q[j]]
            else:
                masked = "whose positive is in" in lines and p[i] == p[j]
                masked |= "whose query is in" in lines and q[i] == q[j]
            for there, a, b in (
                (terms["in_batch"], q[i], p[j]),
                (terms["same_tower"], q[i], q[j]),
                (terms["doc_doc"], p[i], p[j]),
            ):
                cosine = float(a == b)
                if there:
                    drop["gone"] += masked or cosine > limit
                    drop["same"] += not masked and cosine == 1 and cosine <= limit
        for k, place in enumerate(batch.hard[i].tolist()):
            gone = not batch.sides.hard_mask[i, k] or text[place] == p[i]
            drop["gone"] += gone
        out.append(total - drop["gone"] + drop["same"] * (math.e - 1))
    return out


@pytest.mark.parametrize("form", FORMS)
def test_candidates_are_those_of_the_loss(form: str, made: tuple[recipes.Recipe, Store]) -> None:
    """Converted and plain tasks, with batches of their own sizes, in every form."""
    loaded, store = made
    own = {"topics": {"form": "gemini-v2"}} if form == "conan" else {}
    config = Train(
        batch_sizes=SIZES, hard_negatives=2, temperature=1.0, loss=recipes.Loss(form=form),
        losses=own, tasks=dict.fromkeys(ROWS, 1.0), token_budget=400,
    )  # fmt: skip
    tasks, complete = pipeline.known_tasks(loaded)
    assert complete and tasks.keys() == ROWS.keys()
    told = {
        re.split("[: ]", block)[0]: block
        for block in re.split(r"\n(?! )", explain(config, tasks, complete=True))
    }
    assert told.keys() == ROWS.keys()
    less = 0.0
    for name, batch in first_batches(store, config).items():
        rows, lines = len(batch.query), " ".join(told[name].split())
        assert f"{SIZES[name]} rows of one task" in lines and rows == SIZES[name]
        hard = 2 if batch.sides.kind == "retrieval" else 0
        counted = Candidates.of(batch.loss, rows=rows, hard=hard)
        assert f"candidates of a query: {counted.total}," in lines
        want = terms_that_are_told(batch, store, config, lines)
        got = terms_of_the_loss(batch, config)
        less += sum(counted.total - x for x in want)
        # A row whose candidates are all masked has no denominator, and loss 0.
        want = [x if x > 0 else 1.0 for x in want]
        np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=name)
    assert less > 10  # there is something to mask


def test_what_is_told_of_converted_tasks(made: tuple[recipes.Recipe, Store]) -> None:
    tasks, _ = pipeline.known_tasks(made[0])
    assert {name: about.kind for name, about in tasks.items()} == {
        **dict.fromkeys(ROWS, "retrieval"), "topics": "classification", "graded": "sts",
    }  # fmt: skip
    config = Train(hard_negatives=1, batch_sizes={"nli": 10})
    told = " ".join(explain(config, tasks, complete=True, ranks=4).split())
    for words in (
        "nli (retrieval, made by nli): InfoNCE as gemini-v2, temperature 0.02, 10 rows",
        "positive of a query: a text that it entails.",
        "from those that come with it (texts that contradict it)",
        "on 4 ranks: 3 or 2 rows on each; a query meets the rows of all ranks.",
        "not masked: other texts of its class in other rows.",
        "not masked: the other side of its pair, where both are in one batch",
        "its own hard negative, drawn anew each epoch from those mined for it",  # plain, bitext
    ):
        assert words in told
    apart = explain(dataclasses.replace(config, no_duplicates=True), tasks, complete=True)
    assert "other side" not in apart


def test_without_data_a_recipe_is_told_by_kind(tmp_path: Path) -> None:
    table = {"data": {"path": str(tmp_path)}, "tasks": {"faq": {"convert": {"rule": "pairs"}}}}
    tasks, complete = pipeline.known_tasks(recipes.from_table(table))
    assert list(tasks) == ["faq"] and not complete
    heads = re.findall(r"^(\w+)", explain(Train(), tasks), re.MULTILINE)
    assert heads == ["retrieval", "classification", "sts", "faq"]
