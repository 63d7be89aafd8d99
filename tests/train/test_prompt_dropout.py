"""Prompts that are left out at random: which rows, the same on every resume, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from naive_draws import draws, key_of

from embkit import data, recipe
from embkit.data import Batches, Store
from embkit.errors import UsageError
from embkit.model import Encoder
from embkit.model.tokens import load_tokenizer
from embkit.pipeline import tokenizer_options
from embkit.train.batches import Steps
from embkit.train.parallel import Ranks
from embkit.train.teachers import Teachers

PROMPTS = {"query": "search query : ", "passage": "text : "}
SETTINGS: dict[str, Any] = {"batch_size": 8, "seed": 5, "hard_negatives": 1, "token_budget": 200}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(40)]

    def text(n: int) -> str:
        return " ".join(rng.choice(words, n))

    folder = tmp_path_factory.mktemp("prompts")
    rows = [
        {"query": text(3), "positive": text(9), "negative": [text(7), text(6)]} for _ in range(50)
    ]
    rows[7]["query"] = rows[8]["positive"]  # a text in both roles
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines)
    return folder


def store_of(records: Path, out: Path, **options: Any) -> Store:
    sizes: dict[str, Any] = {"vocab_size": 200, "max_length_query": 12, "max_length_passage": 20}
    return data.tokenize(data.read(records), out=out, **{"prompts": PROMPTS, **sizes, **options})


def test_rows_without_prompts_lie_beside_their_own(records: Path, tmp_path: Path) -> None:
    plain, both = (
        store_of(records, tmp_path / str(i), prompt_dropout=i == 1, tokenizer=None) for i in (0, 1)
    )
    rows = np.arange(both.rows, dtype=np.uint64)
    with_prompt = both.prompt_len(rows) > 0
    assert with_prompt.sum() == plain.rows
    bare = {(t, n) for t, n in zip(both.text_id(rows).tolist(), both.lengths(rows), strict=True)}
    assert len({t for t, _ in bare}) == (~with_prompt).sum()  # one row without prompt for each text
    assert "prompt_dropout" not in json.dumps(plain.manifest["params"])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_which_prompts_go(records: Path, tmp_path: Path, share: float) -> None:
    """Every row against a reference: a draw per example and side, anew each epoch."""
    store = store_of(records, tmp_path / "store", prompt_dropout=True)
    whole = Batches(store, **SETTINGS)
    dropped = Batches(store, prompt_dropout=share, **SETTINGS)
    rows = np.arange(store.rows, dtype=np.uint64)
    text, prompt = store.text_id(rows), store.prompt_len(rows)
    bare = {t: r for t, r, p in zip(text.tolist(), rows.tolist(), prompt, strict=True) if p == 0}
    gone = []
    for step in range(20):
        one, two = whole.batch(step), dropped.batch(step)
        assert np.array_equal(one.examples, two.examples)
        key = key_of(5, "prompt", "pairs", one.epoch)
        for side, names in enumerate((("query",), ("positive", "hard"))):
            counter = one.examples * np.uint64(2) + np.uint64(side)
            drop = draws(key, counter) <= np.uint64(min(share * 2.0**64, 2.0**64 - 2048))
            drop |= share == 1.0
            gone.append(drop)
            for name in names:
                before, after = (b.rows[b[name].reshape(8, -1)] for b in (one, two))
                want = np.array([[bare[t] for t in text[row].tolist()] for row in before])
                assert np.array_equal(after, np.where(drop[:, None], want, before))
        # Who is a negative of whom does not change with the prompt.
        names = ("query_key", "positive_key", "hard_key", "hard_mask", "weight")
        assert all(np.array_equal(one[name], two[name]) for name in names)
        assert np.array_equal(two["prompt_len"], prompt[two.rows])
    rates = np.mean(gone)
    assert rates == 1.0 if share == 1.0 else 0.2 < rates < 0.4
    # Of the same example in two epochs, and of its two sides, each is a draw of its own.
    assert share == 1.0 or len({tuple(drop) for drop in gone}) > 30


def test_a_resumed_run_drops_the_same(records: Path, tmp_path: Path) -> None:
    store = store_of(records, tmp_path / "store", prompt_dropout=True)
    batches = Batches(store, prompt_dropout=0.5, **SETTINGS)
    rows = [b.rows.copy() for b in batches.stream(0, 9)]
    again = Batches(store, prompt_dropout=0.5, **SETTINGS)
    assert all(
        np.array_equal(a, b.rows)
        for a, b in zip(rows[4:], again.stream(4, 9, threads=2), strict=True)
    )
    ranks = [
        Batches(store, prompt_dropout=0.5, rank=r, world_size=2, **SETTINGS).batch(3)
        for r in range(2)
    ]
    assert {*np.concatenate([b.rows for b in ranks]).tolist()} == {*rows[3].tolist()}


def test_a_store_without_such_rows(records: Path, tmp_path: Path) -> None:
    store = store_of(records, tmp_path / "store")
    with pytest.raises(UsageError, match="no rows without prompts") as caught:
        Batches(store, prompt_dropout=1.0, **SETTINGS)
    assert "prompt_dropout" in str(caught.value.fix)
    store.manifest["plain_rows"] = True  # a wrong word of the manifest is found in the rows
    with pytest.raises(UsageError, match="no form without its prompt"):
        Batches(store, prompt_dropout=1.0, **SETTINGS).batch(0)
    whole = store_of(records, tmp_path / "whole", prompt_dropout=True)
    assert whole.has_plain_rows and not data.subset(whole, out=tmp_path / "part").has_plain_rows
    without = store_of(records, tmp_path / "without", prompts={})
    Batches(without, prompt_dropout=1.0, **SETTINGS).batch(0)  # nothing to leave out


def test_merged_stores_keep_both_forms(records: Path, tmp_path: Path) -> None:
    store = store_of(records, tmp_path / "store", prompt_dropout=True)
    other = tmp_path / "more"
    other.mkdir()
    (other / "more.jsonl").write_text('{"query": "word1 word2", "positive": "word3 word4 word5"}\n')
    second = store_of(other, tmp_path / "second", prompt_dropout=True, tokenizer=store.tokenizer)
    merged = data.merge([store, second], out=tmp_path / "merged")
    assert merged.rows == store.rows + second.rows
    task = {"more": 1.0}
    batch = Batches(merged, batch_size=1, weights=task, prompt_dropout=1.0).batch(0)
    assert batch["prompt_len"].tolist() == [0, 0]
    assert sorted(merged.text(int(r)) for r in batch.rows) == ["word1 word2", "word3 word4 word5"]


def test_tasks_have_prompts_of_their_own(records: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    (more / "pairs.jsonl").write_text((records / "pairs.jsonl").read_text())
    answers = [
        {"query": f"word{i} word{i + 1}", "positive": f"word{i + 2} word3 word4"} for i in range(30)
    ]
    answers[0]["query"] = json.loads((records / "pairs.jsonl").read_text().splitlines()[0])["query"]
    (more / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    own = {"answers": {"query": "question : ", "passage": "answer : "}}
    store = store_of(more, tmp_path / "store", task_prompts=own, prompt_dropout=True)
    assert store.task_prompts == own
    tokenizer = load_tokenizer(store.tokenizer)
    for name, query, passage in (
        ("pairs", PROMPTS["query"], PROMPTS["passage"]), ("answers", *own["answers"].values())
    ):  # fmt: skip
        table = store.examples(name)
        for rows, prompt, limit in ((table.query, query, 12), (table.positive, passage, 20)):
            for row in rows[:5].tolist():
                at = np.array([row], np.uint64)
                out = np.empty(int(store.lengths(at)[0]), np.int64)
                store.gather(at, out, np.empty(2, np.int32))
                want, _ = tokenizer.ids([prompt + store.text(row)], max_length=limit)
                assert out.tolist() == want[: len(out)].tolist() and len(out) in (len(want), limit)
                assert int(store.prompt_len(at)[0]) == tokenizer.prompt_length(prompt)
    # One text with two prompts, and the form without either, which both tasks find.
    shared = [int(store.examples(n).query[0]) for n in ("pairs", "answers")]
    ids = store.text_id(np.array(shared, np.uint64))
    assert shared[0] != shared[1] and ids[0] == ids[1]
    for name in ("pairs", "answers"):
        batches = Batches(store, batch_size=30, weights={name: 1.0}, prompt_dropout=1.0)
        assert not batches.batch(0)["prompt_len"].any()
    encoder = Encoder.from_config(
        recipe.Model(hidden=32, layers=1, heads=2, intermediate=48, dims=(16,)), store.tokenizer,
        max_length=store.max_length,
    )  # fmt: skip
    encoder.adopt_prompts(store.prompts, store.task_prompts)
    named = {"answers": "question : ", "answers passage": "answer : "}
    assert encoder.prompts == {**PROMPTS, **named}
    out = encoder.export(tmp_path / "model")
    assert Encoder.from_pretrained(out).prompts == encoder.prompts
    said = json.loads((out / "config_sentence_transformers.json").read_text())["prompts"]
    assert said == {"query": PROMPTS["query"], "document": PROMPTS["passage"], **named}
    other = store_of(records, tmp_path / "other", tokenizer=store.tokenizer, prompt_dropout=True)
    assert data.merge([store, other], out=tmp_path / "merged").task_prompts == own
    for wrong, says in (
        ({"answer": {"query": "q"}}, "did you mean 'answers'"),
        ({"answers": {"text": "q"}}, "'text'"),
    ):
        with pytest.raises(UsageError, match=says):
            store_of(more, tmp_path / "wrong", task_prompts=wrong)


def test_the_recipe_makes_the_rows_that_its_runs_need() -> None:
    def asked(**table: Any) -> bool:
        return bool(tokenizer_options(recipe.from_table(table), {})["prompt_dropout"])

    assert not asked() and asked(prefinetune={"prompt_dropout": 0.1})
    assert asked(runs=[{"seed": 0}, {"prompt_dropout": 0.5}])
    table = {"tokenizer": {"task_prompts": {"nq": {"query": "question answering : "}}}}
    options = tokenizer_options(recipe.from_table(table), {})
    assert options["task_prompts"] == {"nq": {"query": "question answering : "}}
    with pytest.raises(UsageError, match="no share"):
        recipe.from_table({"finetune": {"prompt_dropout": 1.5}})


def test_a_teacher_knows_texts_without_their_prompts(records: Path, tmp_path: Path) -> None:
    """Scores and vectors of rows whose prompt is left out are those of their texts."""
    rows = [json.loads(line) for line in (records / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["pos_scores"], row["neg_scores"] = [len(row["positive"])], [1.0, 2.0]
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in" / "pairs.jsonl").write_text(lines)
    store = store_of(tmp_path / "in", tmp_path / "store", prompt_dropout=True)
    teacher = data.teach(
        store, lambda texts, roles: [[len(t), 1.0] for t in texts], tmp_path / "t", name="len"
    )
    loss = recipe.Loss(distill_scores=1.0, distill=1.0)
    config = recipe.Train(
        batch_size=8, hard_negatives=2, prompt_dropout=0.5, loss=loss, teacher=str(teacher)
    )
    teachers, bare = Teachers(config, store, [["pairs"]]), 0
    assert teachers.scored == {"pairs"}
    steps = Steps(store, config, Ranks(), layout="padded")
    for batch in steps.stream(0, 6, threads=1, device=torch.device("cpu")):
        filled, sides = batch.filled, teachers.sides(batch)
        text = [store.text(int(row)) for row in filled.rows]
        bare += int((store.prompt_len(filled.rows) == 0).sum())
        assert sides.score.tolist() == [len(text[p]) for p in batch.positive]
        assert sides.hard_score is not None and set(sides.hard_score.reshape(-1).tolist()) == {1, 2}
        vectors = teachers.vectors(batch, torch.device("cpu"))
        assert vectors is not None and vectors[:, 0].tolist() == [len(t) for t in text]
    assert bare > 20
