"""`embkit run` with a language model: synth, judge and relabel as stages of a whole run."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks_driver
import tiny
from killing import attempt
from loopback import Loopback
from small import TINY, full_count, make_small_data, write_jsonl

from embkit import data, pipeline, recipe
from embkit.data import Store
from embkit.errors import EmbkitError, UsageError
from embkit.mine import explain, load_negatives
from embkit.pipeline.llm import asking
from embkit.recipe import JudgeStage, LabelledTask, RelabelStage, Synth
from embkit.synth import BackendError, Judge, Labelled, Relabel, Write
from embkit.synth.transport import BudgetError

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


def test_the_page_of_a_run_tells_what_was_asked(done: Done) -> None:
    page = (done.out / "report.html").read_text("utf-8")
    spent = json.loads((done.out / "llm-usage.json").read_text())
    # All but the few requests that find out what the server can do.
    assert list(spent) == ["judge", "relabel", "synth"]
    assert done.asked - 5 <= sum(of["requests"] for of in spent.values()) <= done.asked
    for name in ("synthetic", "moods"):
        report = done.result["synth"][name]
        assert f"<h3>synth: {name}</h3>" in page
        assert f"{report['items']:,} items, {report['kept']:,} kept" in page
        assert report["prompt_tokens"] > 0 and f"{report['prompt_tokens']:,} tokens read" in page
    ranked = done.result["relabel"]["tasks"]["synthetic"]
    assert f"<td>{ranked['share_best_is_not_seed']:.1%}</td>" in page
    assert f"<td>{spent['relabel']['requests']:,}</td>" in page


def test_carried_and_relabelled_tables_are_explained(done: Done) -> None:
    carried, mined = done.out / "mined-relabelled", done.out / "mined"
    assert explain(carried, 3, task="retrieval") == explain(mined, 3, task="retrieval")
    assert explain(carried, 3) == explain(mined, 3)
    records = data.Records.open(done.out / "relabelled")
    table, short = records.tasks()["synthetic"], lambda row: records.texts.get(int(row))[:40]
    for place in (carried, done.out / "relabelled"):
        told = explain(place, 2, task="synthetic")
        lines = told.splitlines()
        assert short(table.query[2]) in lines[1] and "ranked by a language model" in lines[0]
        ranked = [line.strip()[:40] for line in lines[4::2]]
        fused = [float(line.split()[1]) for line in lines[3::2]]
        assert len(ranked) == 3 and fused == sorted(fused, reverse=True)
        assert ranked[0] == short(table.positive[2]).strip()
        assert ranked[-1] == short(table.negative[2]).strip()
    with pytest.raises(UsageError, match="has no example 9999"):
        explain(carried, 9999, task="synthetic")
    with pytest.raises(UsageError, match="no task|No negatives of task"):
        explain(carried, 0, task="moods")


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


def test_the_budget_holds_for_the_stages_of_a_run(folder: Path, lm: Any, tmp_path: Path) -> None:
    with Loopback(*lm, answer=answer) as loop:
        chosen = settings(folder, loop.url, "llm.token_budget=100")
        with pytest.raises(BudgetError, match="100 is used up"):
            pipeline.run(chosen, out=tmp_path / "run")
        # Of 20 queries at 10 tokens each; the first requests find out what the server can do.
        assert 6 <= sum(loop.seen.values()) <= 15


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


RANK_TIMEOUT = 6.0


def on_two(chosen: Any, out: Path, told: Path, die: str = "") -> list[int]:
    """Exit codes of two ranks that run a recipe; what each ended with is in ``told``.

    Args:
        die: the first rank kills itself once it has this many shards of a stage, "NAME COUNT".
    """
    port = ranks_driver.free_port()
    for path in told.glob("error-*.txt"):
        path.unlink()

    def work(rank: int) -> None:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        if die and rank == 0:
            dies_at(*die.split())
        try:
            pipeline.run(chosen, out=out)
        except EmbkitError as error:
            (told / f"error-{rank}.txt").write_text(str(error))
            os._exit(error.exit_code)

    return ranks_driver.fork(2, work)


def dies_at(stage: str, count: str) -> None:
    """This process ends with its shard of that number."""
    from embkit.synth import shards

    real, written = shards._write, [0]

    def write(path: Path, rows: Any) -> None:
        real(path, rows)
        written[0] += f"-{stage}-" in str(path)
        if written[0] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    shards._write = write


@pytest.mark.timeout(240)
def test_two_ranks_ask_once_wait_for_hours_and_end_together(
    done: Done, lm: Any, folder: Path, tmp_path: Path
) -> None:
    """The first rank asks. The other one waits longer than a collective may take, ends with an
    error when the first one fails or is killed, and the same command goes on from there."""
    out, dead, pause = tmp_path / "run", [True], [0.0]

    def fault(path: str, body: Any) -> str:
        if pause[0]:
            seconds, pause[0] = pause[0], 0.0
            time.sleep(seconds)
        return "down" if dead[0] and sum(loop.seen.values()) > 9 else ""

    limits = (f"prefinetune.rank_timeout={RANK_TIMEOUT}", f"finetune.rank_timeout={RANK_TIMEOUT}",
              "llm.timeout=30.0", "evaluate.bm25=false")  # fmt: skip
    with Loopback(*lm, answer=answer, fault=fault) as loop:
        chosen = settings(folder, loop.url, *limits)
        assert on_two(chosen, out, tmp_path) == [4, 1]
        first, second = ((tmp_path / f"error-{i}.txt").read_text() for i in range(2))
        assert first.startswith("The server does not answer")
        assert second.startswith("The first rank stopped: BackendError")
        assert not list(out.glob("[!.]*/")) and list(out.glob(".partial-synth-synthetic-*"))
        dead[0], pause[0] = False, RANK_TIMEOUT + 2
        began = time.monotonic()
        assert on_two(chosen, out, tmp_path, die="relabelled 2") == [-9, 1]
        assert time.monotonic() - began > RANK_TIMEOUT and pause == [0.0]
        assert "Another rank did not answer" in (tmp_path / "error-1.txt").read_text()
        assert (out / "pre" / "manifest.json").is_file() and not (out / "relabelled").exists()
        assert on_two(chosen, out, tmp_path) == [0, 0]
        asked = sum(loop.seen.values())
        if full_count(1, 0):
            assert on_two(chosen, tmp_path / "whole", tmp_path) == [0, 0]
            mine, want = kept(out), kept(tmp_path / "whole")
            assert [name for name in want if mine.get(name) != want[name]] == []
    # What does not depend on a trained model is what one process makes.
    mine, want = kept(out), kept(done.out)
    same = [name for name in want if name.startswith(("synth-", "records/", "clean/", "judged/"))]
    assert len(same) > 15 and [name for name in same if mine.get(name) != want[name]] == []
    result = json.loads((out / "result.json").read_text())
    assert result["relabel"]["tasks"]["synthetic"]["judged"] > 10
    # Nobody asks for what is there: some requests were lost with the server, one shard by the kill.
    assert done.asked <= asked <= done.asked + 30
    spent = json.loads((out / "llm-usage.json").read_text())
    assert set(spent) == {"synth", "judge", "relabel"} and spent["synth"]["retries"]["connection"]
