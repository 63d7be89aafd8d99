"""Tasks of a recipe: prompts by format, from the recipe to tokens, evaluation and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import write_jsonl

from embkit import data, pipeline, recipe
from embkit.errors import UsageError
from embkit.evaluate import evaluate
from embkit.model import Encoder

GECKO = "task: question answering | query: "
TITLE = "title: none | text: "


@pytest.mark.parametrize(
    ("form", "query", "passage", "sts"),
    [
        ("plain", "", "", ""),
        ("gecko", "task: search result | query: ", TITLE, "task: semantic similarity | query: "),
        (
            "embedding-gemma",
            "task: search result | query: ",
            TITLE,
            "task: sentence similarity | query: ",
        ),
        ("gemini", "search result: ", "", "sentence similarity: "),
        ("e5", "query: ", "passage: ", "query: "),
        ("jina", "Query: ", "Document: ", "Query: "),
    ],
)
def test_each_format_has_its_published_strings(
    form: str, query: str, passage: str, sts: str
) -> None:
    loaded = recipe.from_table({"tokenizer": {"format": form}})
    assert loaded.tokenizer.prompts("retrieval") == {"query": query, "passage": passage}
    assert loaded.tokenizer.prompts("sts") == {"text": sts}
    want = {"query": query, "passage": passage}
    if sts:
        want |= {"sts": sts, "classification": loaded.tokenizer.prompts("classification")["text"]}
    assert loaded.encoder_prompts() == want


def test_instructions_are_a_line_and_the_query() -> None:
    task = recipe.Task(format="instruct", description="Find the law")
    assert task.prompts("retrieval", recipe.Tokenizer()) == {
        "query": "Instruct: Find the law\nQuery:",
        "passage": "",
    }


def test_what_a_task_says_goes_before_what_the_recipe_says() -> None:
    table: dict[str, Any] = {
        "tokenizer": {"format": "gecko", "prompt_passage": "doc: "},
        "tasks": {
            "qa": {"description": "question answering"},
            "same": {"description": "duplicates", "symmetric": True},
            "own": {"prompt_query": "q: ", "format": "e5"},
            "pairs": {"prompt_query": "p: "},
            "converted": {"convert": {"rule": "bitext"}},
        },
    }
    loaded = recipe.from_table(table)
    kinds = dict.fromkeys(["qa", "same", "own", "converted", "other"], "retrieval")
    found = loaded.task_prompts({**kinds, "pairs": "sts", "graded": "sts"})
    assert found == {
        "qa": {"query": GECKO, "passage": TITLE},
        "same": {
            "query": "task: duplicates | query: ",
            "passage": "task: duplicates | query: ",
        },
        "own": {"query": "q: ", "passage": "passage: "},
        "pairs": {"text": "p: "},
        "graded": {"text": "task: semantic similarity | query: "},
    }
    # A recipe without any of this asks for nothing, so its stores stay what they were.
    assert recipe.from_table({}).task_prompts(kinds | {"pairs": "sts"}) == {}
    given = recipe.from_table({"tokenizer": {"task_prompts": {"qa": {"query": "x"}}}})
    assert given.task_prompts(kinds) == {"qa": {"query": "x"}}


def test_wrong_words_name_the_nearest() -> None:
    for table, says in (
        ({"tokenizer": {"format": "geko"}}, "did you mean 'gecko'"),
        ({"tasks": {"a": {"format": "instruction"}}}, "did you mean 'instruct'"),
        ({"tasks": {"a": {"knd": "sts"}}}, "did you mean 'kind'"),
        ({"tasks": {"a": {"convert": {"rule": "nil"}}}}, "did you mean 'nli'"),
        ({"tasks": {"a": {"kind": "pair"}}}, "kind"),
        ({"tasks": {"a": {"convert": {"rule": "classes", "unique_id": True}}}}, "unique ids"),
    ):
        with pytest.raises(UsageError, match=says):
            recipe.from_table(table)


@pytest.fixture
def trained(tmp_path: Path, encoder_of: Callable[..., Encoder]) -> tuple[Any, Encoder, Path]:
    """A store of converted tasks with prompts, and an encoder for it, by way of a recipe."""
    rows = [{"text": f"text number {i}", "label": i % 2} for i in range(12)]
    write_jsonl(tmp_path / "in" / "train" / "classes.jsonl", rows)
    pairs = [{"query": f"query {i}", "positive": f"passage {i}"} for i in range(12)]
    write_jsonl(tmp_path / "in" / "train" / "qa.jsonl", pairs)
    loaded = recipe.from_table(
        {
            "tokenizer": {"format": "gecko", "vocab_size": 300, "max_length_query": 40},
            "model": {"hidden": 32, "heads": 2, "layers": 1, "intermediate": 32, "dims": [32]},
            "tasks": {
                "qa": {"description": "question answering"},
                "classes": {
                    "description": "classification",
                    "symmetric": True,
                    "convert": {"rule": "classes"},
                },
            },
        }
    )
    records = data.read(tmp_path / "in", **pipeline.read_options(loaded)).save(tmp_path / "rec")
    kinds = pipeline.kinds_of(records)
    assert kinds == {"classes": "retrieval", "qa": "retrieval"}
    store = data.tokenize(
        records, out=tmp_path / "store", **pipeline.tokenizer_options(loaded, kinds)
    )
    return store, encoder_of(loaded, store), tmp_path


@pytest.fixture
def encoder_of() -> Callable[..., Encoder]:
    return pipeline.start_encoder


def test_rows_have_the_prompts_of_their_tasks(trained: tuple[Any, Encoder, Path]) -> None:
    store, encoder, _ = trained
    tokens = lambda text: encoder.tokenizer.ids([text], max_length=96)[0].tolist()  # noqa: E731
    for task, side, before in (
        ("qa", "query", GECKO),
        ("qa", "positive", TITLE),
        ("classes", "query", "task: classification | query: "),
        ("classes", "positive", "task: classification | query: "),
        ("classes", "negative", "task: classification | query: "),
    ):
        rows = getattr(store.examples(task), side)[:4]
        for row in rows.tolist():
            out, bounds = np.zeros(96, np.int64), np.zeros(2, np.int32)
            store.gather(np.array([row]), out[: store.lengths([row])[0]], bounds)
            assert out[: bounds[1]].tolist() == tokens(before + store.text(row)), (task, side)


def test_a_prompt_without_room_for_a_text_is_refused(
    trained: tuple[Any, Encoder, Path], tmp_path: Path
) -> None:
    records = tmp_path / "rec"
    for options, says in (
        ({"prompts": {"query": GECKO}, "max_length_query": 6}, "max_length is 6"),
        ({"task_prompts": {"qa": {"passage": TITLE}}, "max_length_passage": 5}, "role passage"),
    ):
        with pytest.raises(UsageError, match=f"(?s)takes .*{says}"):
            data.tokenize(records, out=tmp_path / "no", vocab_size=300, **options)
        assert not (tmp_path / "no").exists()


def test_training_evaluation_and_export_take_the_prompts_along(
    trained: tuple[Any, Encoder, Path],
) -> None:
    from embkit.train import prefinetune

    store, encoder, folder = trained
    done = prefinetune(encoder, store, out=folder / "pre", steps=1, batch_size=4)
    settings = folder / "pre" / "model" / "config_sentence_transformers.json"
    prompts = json.loads(settings.read_text())["prompts"]
    assert prompts == {
        "query": "task: search result | query: ",
        "document": TITLE,
        "STS": "task: semantic similarity | query: ",
        "Classification": "task: classification | query: ",
        "qa": GECKO,
        "qa passage": TITLE,
        "classes": "task: classification | query: ",
        "classes passage": "task: classification | query: ",
    }
    loaded = Encoder.from_pretrained(folder / "pre" / "model")
    assert loaded.prompts == done.prompts and loaded.prompts["sts"] == prompts["STS"]

    # Sentence pairs are judged behind the prompt of their kind: the same numbers as by hand.
    rng = np.random.default_rng(0)
    graded = [
        {"sentence1": f"text {a}", "sentence2": f"passage {b}", "score": float(abs(a - b))}
        for a, b in rng.integers(0, 30, (25, 2)).tolist()
    ]
    write_jsonl(folder / "dev" / "sts" / "x.jsonl", graded)
    score = evaluate(loaded, folder / "dev")["tasks"]["sts/x"]["widths"]["32"]["spearman"]
    from scipy.stats import spearmanr

    def by_hand(prompt: str) -> float:
        sides = ("sentence1", "sentence2")
        a, b = (loaded.encode([row[s] for row in graded], prompt=prompt) for s in sides)
        found = spearmanr((a * b).sum(1), [row["score"] for row in graded])
        return 100 * float(found.statistic)

    assert score == pytest.approx(by_hand(prompts["STS"]), abs=1e-4)
    assert score != pytest.approx(by_hand(""), abs=1e-2)
