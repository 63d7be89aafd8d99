"""`embkit run` with a language model: synth, judge and relabel as stages of a whole run."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from killing import attempt
from loopback import Loopback
from small import TINY, full_count, make_small_data, write_jsonl

from embkit import data, pipeline, recipe
from embkit.data import Store
from embkit.errors import UsageError
from embkit.mine import load_negatives
from embkit.pipeline.llm import asking
from embkit.recipe import JudgeStage, LabelledTask, RelabelStage, Synth
from embkit.synth import BackendError, Judge, Labelled, Relabel, Write

PROMPTS = {
    "short": """
name = "short"
[[steps]]
instructions = "Write."
item = "<passage>\\n{passage}\\n</passage>"
[steps.fields.query]
""",
    "moods": """
name = "moods"
kind = "classification"
[labels.good]
[labels.bad]
[[lists]]
calls = 2
items = 4
tail = 0.5
instructions = "List."
item = "{items} people:"
[lists.fields.persona]
[[steps]]
items = 2
instructions = "Write texts."
item = "{label} by {persona}:"
[steps.fields.text]
min_words = 2
[judge]
instructions = "Judge."
item = "{text} is"
[judge.labels]
good = 1
bad = 0
""",
    "likely": """
name = "likely"
[[steps]]
one_line = true
instructions = "Ask."
item = "{passage} Q:"
answer = "{query}"
""",
    "grade": """
name = "grade"
[[steps]]
one_line = true
instructions = "Grade."
item = "{query} P: {passage} G:"
[steps.labels]
No = 0
Yes = 1
""",
}


def answer(prompt: str) -> str:
    """A query of a passage's own words; a list; texts for a label."""
    if passage := re.findall(r"<passage>\n(.*?)\n</passage>", prompt, re.S):
        return json.dumps({"query": "what is " + " ".join(passage[-1].split()[:4])})
    last = prompt.rsplit("\n", 1)[-1]
    if last == "4 people:":
        return json.dumps({"persona": ["a cook", "a smith", "a clerk", "a judge"]})
    number = int(hashlib.sha256(prompt.encode()).hexdigest()[:4], 16)
    return json.dumps({"text": [f"{last[:-1]} number {number}", f"{last[:-1]} {number} again"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, passages and prompts."""
    base = tmp_path_factory.mktemp("llm")
    make_small_data(base / "data", rows=60)
    rows = [json.loads(x) for x in (base / "data/train/retrieval.jsonl").read_text().splitlines()]
    write_jsonl(base / "passages.jsonl", [{"text": row["positive"]} for row in rows[:20]])
    for name, text in PROMPTS.items():
        (base / f"{name}.toml").write_text(text)
    return base


def settings(base: Path, url: str, *more: str) -> Any:
    """A tiny run: 20 queries, 16 texts, three passages a query; retrieval is mined beside it."""
    given = {
        "data.path": str(base / "data"), "llm.model": url, "llm.name": "tiny",
        "synth.passages": str(base / "passages.jsonl"), "synth.prompt": str(base / "short.toml"),
        "judge.prompts": [str(base / "grade.toml")], "relabel.tasks": ["synthetic"],
        "relabel.likelihood": str(base / "likely.toml"),
        "relabel.relevance": str(base / "grade.toml"), "judge.tasks": ["synthetic"],
    }  # fmt: skip
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    moods = {"prompt": str(base / "moods.toml"), "examples": 16, "min_fit": 0.0, "shard": 3}
    labelled = ", ".join(f"{key} = {json.dumps(value)}" for key, value in moods.items())
    return recipe.load(
        "quickstart",
        overrides=[
            *TINY, *words, "tokenizer.end_token=[SEP]",
            f"synth.labelled={{moods = {{{labelled}}}}}", "synth.shard=6",
            "relabel.on=true", "relabel.candidates=3", "relabel.shard=5", "judge.on=true",
            "judge.min_positive=0.0", "judge.shard=8", "llm.concurrency=2", "llm.timeout=9.0",
            "llm.retries=1", "prefinetune.tasks={retrieval = 0.5, synthetic = 0.5}",
            "prefinetune.steps=6", "finetune.steps=5", "finetune.batch_size=8",
            "prefinetune.batch_size=16", "runs=[{seed = 0}]",
            "finetune.tasks={retrieval = 1, synthetic = 1, moods = 1}", *more,
        ],
    )  # fmt: skip


class Done:
    """A finished run and the server that wrote its data, switched off."""

    def __init__(self, base: Path, lm: Any, out: Path) -> None:
        self.base, self.out = base, out
        with Loopback(*lm, answer=answer) as loop:
            self.url = loop.url
            self.recipe = settings(base, loop.url)
            self.result = pipeline.run(self.recipe, out=out)
            self.asked = sum(loop.seen.values())


@pytest.fixture(scope="module")
def done(folder: Path, lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    yield Done(folder, lm, tmp_path_factory.mktemp("done") / "run")


def kept(out: Path) -> dict[str, bytes]:
    """What must be the same bit for bit: no timings, no page, no address."""
    return {
        name: content
        for name, content in tiny.tree(out).items()
        if "/checkpoints/" not in f"/{name}"
        and name.endswith((".safetensors", ".jsonl", "manifest.json", "result.json"))
        and not name.endswith("log.jsonl")
    }


def test_the_stages_come_in_their_order_and_a_recipe_without_them_has_none() -> None:
    full = recipe.load("quickstart", overrides=[
        "llm.model=x", "synth.passages=y", "judge.on=true", "relabel.on=true",
        "filter.preset=default"])  # fmt: skip
    assert pipeline.stages_of(full) == (
        "synth", "read", "dedup", *(["filter"] if full.filter.enabled else []), "judge", "tokenize",
        "prefinetune", "mine", "relabel", "finetune", "soup", "evaluate", "export",
    )  # fmt: skip
    for name in recipe.builtin():
        assert not asking(recipe.load(name))
    with pytest.raises(UsageError, match="has relabel, and no language model"):
        recipe.load("quickstart", overrides=["relabel.on=true"])


def test_defaults_of_the_recipe_are_those_of_the_stages() -> None:
    for section, stage in ((Synth(), Write()), (LabelledTask(), Labelled()),
                           (RelabelStage(), Relabel()), (JudgeStage(), Judge())):  # fmt: skip
        for name, value in vars(section).items():
            if name in vars(stage):
                assert (value or None) == (getattr(stage, name) or None), (section, name)
        missing = set(vars(stage)) - set(vars(section)) - {"token_budget"}
        assert not missing, (section, missing)


def test_a_run_trains_on_what_the_model_wrote_judged_and_chose(done: Done) -> None:
    out = done.out
    sources = {s["name"]: s["task"] for s in data.Records.open(out / "clean").manifest["sources"]}
    wrote = {task: name for name, task in sources.items() if name.startswith("tiny ")}
    assert set(wrote) == {"synthetic", "moods"} and wrote["moods"].startswith("tiny moods ")
    before, after = data.Records.open(out / "judged"), data.Records.open(out / "relabelled")
    assert before.tasks()["moods"].kind == "classification" and len(before.tasks()["moods"]) > 4
    said = done.result["relabel"]["tasks"]
    assert set(said) == {"synthetic"} and said["synthetic"]["judged"] > 10
    table = after.tasks()["synthetic"]
    assert len(table.negative) == said["synthetic"]["negatives"] > 10
    # The fine-tuned model has seen the new store, and the other task's mined negatives in it.
    inputs = json.loads((out / "ft-0" / "manifest.json").read_text())["inputs"]
    assert any("store-relabelled" in name for name in inputs)
    old, new = Store(out / "store"), Store(out / "store-relabelled")
    for column in (0, 2, 3):
        was = load_negatives(out / "mined", "retrieval")[column]
        assert np.array_equal(was, load_negatives(out / "mined-relabelled", "retrieval")[column],
                              equal_nan=column == 2)  # fmt: skip
    rows, mapped = (load_negatives(out / f, "retrieval")[1] for f in ("mined", "mined-relabelled"))
    assert len(rows) and (old.text_id(rows) == new.text_id(mapped)).all()
    assert (old.rows, old.fingerprint) != (new.rows, "") and old.fingerprint == new.fingerprint
    assert not any("negatives-synthetic" in name for name in kept(out))
    assert done.result["synth"]["moods"]["labels"]["good"]["kept"] > 0
    assert done.result["judge"]["tasks"]["synthetic"]["before"] > 10
    assert "synth" in json.loads((out / "seconds.json").read_text())


def test_a_run_goes_on_without_the_server_that_wrote_its_data(done: Done) -> None:
    was = kept(done.out)
    pipeline.run(done.recipe, out=done.out, from_stage="finetune")
    assert kept(done.out) == was
    with pytest.raises(BackendError, match="does not answer"):
        pipeline.run(done.recipe, out=done.out, from_stage="synth")
    assert kept(done.out) == was  # nothing goes before the model has answered


def test_kills_in_stages_that_ask_change_no_byte(
    done: Done, lm: Any, folder: Path, tmp_path: Path
) -> None:
    rng, landed, out = random.Random(7), [], tmp_path / "run"

    def slowly(path: str, body: Any) -> str:  # so that an aimed kill does not come late
        time.sleep(0.004)
        return rng.choice(["down", "html", "json"]) if rng.random() < 0.01 else ""

    def due(pattern: str, more: int) -> Callable[[], bool]:
        count = lambda: len(list(out.glob(f".partial-{pattern}-*/**/shard-*.jsonl")))  # noqa: E731
        return partial(lambda aim: count() >= aim, count() + more)

    with Loopback(*lm, answer=answer, fault=slowly) as loop:
        chosen = settings(folder, loop.url)
        run = partial(pipeline.run, chosen, out=out)
        aims = [("synth-synthetic", 2), ("synth-moods", 1), ("judged", 1), ("relabelled", 2)]
        for pattern, more in aims * full_count(4, 1):
            landed.append(attempt(run, due(pattern, more), rng, jitter=0.01))
        run()
    assert sum(landed) >= 3
    mine, want = kept(out), kept(done.out)
    assert mine.keys() == want.keys()
    assert [name for name in want if mine[name] != want[name]] == []


def test_a_dry_run_tells_what_will_be_asked(done: Done, tmp_path: Path) -> None:
    told = pipeline.describe(done.recipe, out=tmp_path / "new")
    found = {
        line.split(":")[0]: [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", line)]
        for line in told.splitlines()
        if "at most" in line and "requests" in line
    }
    # 20 passages; 16 texts by 2 lists, 8 answers, 2 labels each; the queries alone are judged
    # (2 labels), and ranked with 3 passages (a likelihood and 2 labels).
    assert found["synth, synthetic"][:2] == [20, 20]
    assert found["synth, moods"][:2] == [16, 2 + 8 + 16 * 2]
    assert found["judge"][:2] == [20, 40] and found["relabel"][:3] == [20, 3, 20 * 3 * 3]
    assert all(numbers[-2] > 0 for numbers in found.values())
    after = pipeline.describe(done.recipe, out=done.out)  # counts what is there
    clean = data.Records.open(done.out / "clean").tasks()["synthetic"]
    assert f"relabel: {len(clean)} queries" in after
    # Generous enough to hold for what was really asked, and no more than a few times that.
    most = sum(numbers[2 if name == "relabel" else 1] for name, numbers in found.items())
    assert most / 4 < done.asked <= most + 4  # and one each time that the server is looked at


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("synth.passages=/no/such", "/no/such"),
        ("synth.prompt=gekko", "did you mean 'gecko'"),
        ("relabel.relevance=likelihood", "gives no grades"),
        ('judge.prompts=["gecko"]', "gives no grades"),
        ('synth.labelled={moods = {prompt = "reviews", shares = {x = 1.0}}}', "no label 'x'"),
        ("synth.task=moods", "also one of synth.labelled"),
        ('llm.gguf="x.gguf"', "GGUF"),
    ],
)
def test_what_would_stop_a_run_later_stops_it_before_anything_is_done(
    override: str, says: str, folder: Path, lm: Any, tmp_path: Path
) -> None:
    with Loopback(*lm, answer=answer) as loop, pytest.raises((UsageError, OSError), match=says):
        pipeline.run(settings(folder, loop.url, override), out=tmp_path / "run")
    assert not list(tmp_path.glob("run/[!.]*/"))


def test_relabelling_needs_likelihoods_and_says_so_before_training(
    folder: Path, lm: Any, tmp_path: Path
) -> None:
    with (
        Loopback(*lm, answer=answer, likelihood="first") as loop,
        pytest.raises(UsageError, match="which relabelling needs"),
    ):
        pipeline.run(settings(folder, loop.url), out=tmp_path / "run")


def test_another_model_at_the_address_is_found_out(done: Done, lm: Any, tmp_path: Path) -> None:
    from embkit.recipe import Llm
    from embkit.synth.deferred import Deferred

    path = tmp_path / "llm.json"
    with Loopback(*lm) as loop:
        of = Llm(model=loop.url)
        assert Deferred(of, path).params()["likelihood"] == "echo"
        loop.likelihood = "first"
        later = Deferred(of, path)
        assert later.name == "tiny" and later.params()["likelihood"] == "echo"
        with pytest.raises(UsageError, match="likelihood is 'first', was 'echo'"):
            later.generate(["a"])
