"""Queries behind a task of their own: what each row says takes the place of ``{task_text}``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from embkit import data, pipeline, recipe
from embkit.data.sources import find, task_texts_of
from embkit.errors import UsageError
from embkit.model import Encoder

FORM = "task: {task_text} | query: "
TASKS = ("find the answer", "check whether it is true", "find the answer")
ROWS = [
    {"query": f"how warm is caf\u00e9 {i}", "positive": f"caf\u00e9 {i} is kept at {i} degrees",
     "task_text": f" {TASKS[i]} "}
    for i in range(3)
]  # fmt: skip
LONG = {"query": "what is long", "positive": "a rope is", "task_text": "very " * 90}
NONE = {"query": "who says nothing", "positive": "the dead say nothing"}
PLAIN = {"prompts": {"query": "q: ", "passage": ""}, "vocab_size": 400, "max_length_query": 160}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(store: data.Store) -> dict[str, tuple[list[int], int]]:
    """Tokens and the length of the prompt, by query."""
    found = {}
    for row in store.examples("asked").query.tolist():
        ids = np.zeros(int(store.lengths(np.array([row]))[0]), np.int64)
        store.gather(np.array([row]), ids, np.zeros(2, np.int32))
        found[store.text(row)] = ids.tolist(), int(store.prompt_len(np.array([row]))[0])
    return found


def test_a_query_is_tokenized_behind_its_own_task_and_keeps_its_identity(tmp_path: Path) -> None:
    path = write(tmp_path, [*ROWS, LONG, NONE, {**ROWS[0], "task_text": "another, later"}])
    records = data.read(path).save(tmp_path / "records")
    said = task_texts_of(find(path, task=None, kind="auto")[0])
    tell = {"task_prompts": {"asked": {"query": FORM, "passage": ""}}, "task_texts": said}
    plain = data.tokenize(records, out=tmp_path / "plain", **PLAIN)
    store = data.tokenize(records, out=tmp_path / "store", **PLAIN, **tell)
    assert store.manifest["counts"]["task_texts"] == {"own": 3, "missing": 1, "long": 1}
    same = Tokenizer.from_file(str(store.tokenizer / "tokenizer.json"))
    found = rows_of(store)
    want = {row["query"]: FORM.replace("{task_text}", TASKS[i]) for i, row in enumerate(ROWS)}
    want |= {row["query"]: "q: " for row in (LONG, NONE)}
    assert found.keys() == want.keys()
    for query, prompt in want.items():
        ids, length = found[query]
        assert ids == same.encode(prompt + query).ids, query
        assert ids[:length] == same.encode(prompt.rstrip(), add_special_tokens=True).ids[:length]
        assert length > 2
    ids_of = [s.text_id(s.examples("asked").query).tolist() for s in (plain, store)]
    assert ids_of[0] == ids_of[1]
    positives = [s.text(r) for s in (plain, store) for r in s.examples("asked").positive.tolist()]
    assert positives[: len(positives) // 2] == positives[len(positives) // 2 :]
    # Other words are another store; the same are not made again.
    at = (store.path / "manifest.json").stat().st_mtime_ns
    data.tokenize(records, out=store.path, **PLAIN, **tell)
    assert (store.path / "manifest.json").stat().st_mtime_ns == at
    tell["task_texts"] = {**said, ROWS[1]["query"]: "prove it"}
    again = data.tokenize(records, out=store.path, **PLAIN, **tell)
    assert rows_of(again)[ROWS[1]["query"]][0] != found[ROWS[1]["query"]][0]
    # A subset keeps the rows; what joins stores cannot tell prompts of rows apart.
    part = data.subset(again.path, out=tmp_path / "part", max_examples=2)
    assert rows_of(part).items() <= rows_of(again).items() and len(rows_of(part)) == 2
    with pytest.raises(UsageError, match="prompts of their own"):
        data.merge([again.path, part.path], out=tmp_path / "both")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompts": {"query": FORM}}, "this prompt is that of all"),
        ({"task_prompts": {"asked": {"query": "", "passage": FORM}}}, "said of queries"),
        ({"task_prompts": {"asked": {"query": FORM}}}, "No query has a task_text that fits"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(
    given: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, ROWS)
    with pytest.raises(UsageError, match=says):
        data.tokenize(path, out=tmp_path / "store", vocab_size=400, **given)


@pytest.fixture
def asked() -> recipe.Recipe:
    return recipe.from_table(
        {
            "tokenizer": {"vocab_size": 400, "max_length_query": 160, "format": "gecko"},
            "model": {"hidden": 32, "heads": 2, "layers": 1, "intermediate": 32, "dims": [32]},
            "tasks": {"asked": {"description": "{task_text}"}},
        }
    )


def test_a_recipe_takes_the_column_from_files_and_from_what_a_model_has_written(
    asked: recipe.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embkit.synth import Completion, Write, write_queries
    from embkit.synth.llm import Usage

    class Writer:
        name, capabilities, usage = "w", frozenset({"generate"}), Usage()
        params: Callable[[], dict[str, Any]] = staticmethod(lambda: {"backend": "w"})

        def generate(self, prompts: Any, **more: Any) -> list[Completion]:
            said = {"task": "find what it is good for", "query": "what is {} good for"}
            return [
                Completion(text=json.dumps(said).replace("{}", f"number {len(p)}")) for p in prompts
            ]

    for part in ("dev", "test"):
        (tmp_path / "in" / part).mkdir(parents=True)
    write(tmp_path / "in" / "train", ROWS)
    monkeypatch.setattr(pipeline.options, "data_folder", lambda recipe: tmp_path / "in")
    texts = [f"A thing {'x' * i} of some use." for i in range(3)]
    made = write_queries(texts, llm=Writer(), out=tmp_path / "q", how=Write(), task="asked")  # type: ignore[arg-type]
    line = json.loads((tmp_path / "q" / "examples.jsonl").read_text().splitlines()[0])
    assert line["task_text"] == "find what it is good for"
    from embkit.data.sources import written_in

    records = data.read([tmp_path / "in", *written_in(made.dir)], tasks=asked.tasks)
    records = records.save(tmp_path / "records")
    options = pipeline.tokenizer_options(asked, pipeline.kinds_of(records), written_in(made.dir))
    store = data.tokenize(records, out=tmp_path / "store", **options)
    assert store.manifest["counts"]["task_texts"] == {"own": 6, "missing": 0, "long": 0}
    same = Tokenizer.from_file(str(store.tokenizer / "tokenizer.json"))
    for query, (ids, _) in rows_of(store).items():
        task = line["task_text"] if "good for" in query else TASKS[int(query[-1])]
        assert ids == same.encode(f"task: {task} | query: {query}").ids
    encoder = pipeline.start_encoder(asked, store)
    encoder.adopt_prompts(store.prompts, store.task_prompts)
    assert isinstance(encoder, Encoder) and not any("{" in p for p in encoder.prompts.values())
    assert encoder.prompts["asked passage"] == "title: none | text: "
