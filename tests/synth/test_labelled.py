"""Labelled texts and graded pairs: lists and their tails, shares of labels, judging, kills."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from fake import Fake
from killing import attempt

from embkit import data
from embkit.cli import llm as cli_llm
from embkit.errors import CorruptError, UsageError
from embkit.synth import Completion, Labelled, prompts, write_labelled
from embkit.synth.labelled_plan import apportion
from embkit.synth.parse import Invalid, read_list

REVIEWS = """
name = "small"
kind = "classification"

[controls]
style = ["plain", "short"]

[labels.good]
share = 3.0
about = "pleased"

[labels.bad]

[[lists]]
calls = 3
items = 6
tail = 0.5
instructions = "List people."
item = "{items} people:"
[lists.fields.persona]

[[lists]]
items = 4
tail = 0.5
instructions = "List things of a person."
item = "{items} things of {persona}:"
[lists.fields.product]

[[steps]]
items = 4
tail = 0.5
instructions = "Write texts."
item = "{items} {label} ({about}) {style} texts by {persona} on {product}:"
[steps.fields.text]
min_words = 3
max_words = 20
[[steps.shots]]
label = "good"
about = "pleased"
style = "plain"
persona = "a cook"
product = "a pan"
text = ["a text that is shown", "and another one"]

[judge]
instructions = "Judge."
item = "{text} is"
[judge.labels]
good = 1
bad = 0
"""
PAIRS = """
name = "alike"
kind = "sts"
[labels.far]
score = 0
[labels.near]
score = 4
[[steps]]
instructions = "Write pairs."
item = "{label} pair:"
[steps.fields.sentence1]
min_words = 2
[steps.fields.sentence2]
min_words = 2
[judge]
instructions = "Judge."
item = "{sentence1} / {sentence2}:"
[judge.labels]
none = 0
some = 2
all = 4
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(REVIEWS)
    return path


def answer(prompt: str, seed: int) -> str:
    """Lists of entries that name their call and place; texts that name what they were asked."""
    last = prompt.rsplit("\n", 1)[-1]
    if last.endswith("people:"):
        return json.dumps({"persona": [f"person {seed % 97} {i}" for i in range(6)]})
    if "things of" in last:
        who = last.split("things of ")[1][:-1]
        return json.dumps({"product": [f"thing {i} of {who}" for i in range(4)]})
    found = re.fullmatch(r"4 (\w+) \(.*\) (\w+) texts by (.*) on (.*):", last)
    assert found, last
    return json.dumps({"text": [f"{found[1]} {found[2]} {seed % 9973} {i}" for i in range(4)]})


def fits(prompt: str, label: str) -> float:
    return 0.0 if prompt.rsplit("\n", 1)[-1].startswith(label.strip()) else -3.0


def rows_of(out: Path, name: str = "rows") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def sent(row: dict[str, Any]) -> int:
    """The seed as backends get it."""
    return int(row["seed"]) % (1 << 31)


def test_lists_are_made_under_entries_of_others_and_only_their_tails_are_used(
    small: Path, tmp_path: Path
) -> None:
    llm = Fake(answer, fits)
    how = Labelled(prompt=small, examples=96, shard=5)
    done = write_labelled(llm=llm, out=tmp_path / "d", how=how)
    listed, rows = rows_of(tmp_path / "d", "lists"), rows_of(tmp_path / "d")
    people = [row["entry"] for row in listed if row["list"] == "persona"]
    assert len(people) == 9 and {name.split()[2] for name in people} == {"3", "4", "5"}
    things = {row["entry"]: row["under"]["persona"] for row in listed if row["list"] == "product"}
    assert len(things) == 18 and set(things.values()) == set(people)
    # 48 requests of two texts each: the tail of four; every thing comes as often as any other.
    assert {row["text"].split()[3] for row in rows} == {"2", "3"} and len(rows) == 96
    assert all(things[row["product"]] == row["persona"] for row in rows)
    assert set(Counter(row["product"] for row in rows).values()) <= {4, 6}
    assert {row["style"] for row in rows} == {"plain", "short"}
    digest = prompts.load(small).digest
    assert {(row["model"], row["prompt"]) for row in rows} == {("fake", digest)}
    assert done.manifest["sources"][0]["name"] == f"fake small {digest[:16]}"
    # Costs: 3 and 9 lists and 48 requests, of three and one tokens each.
    assert (done.report["prompt_tokens"], done.report["completion_tokens"]) == (180, 60)
    given = Labelled(prompt=small, examples=8, lists={"persona": ["x y", "z"]}, judge=False)
    write_labelled(llm=llm, out=tmp_path / "e", how=given)
    assert {row["persona"] for row in rows_of(tmp_path / "e")} <= {"x y", "z"}


def test_labels_have_the_shares_that_were_asked_for_before_and_after_judging(
    small: Path, tmp_path: Path
) -> None:
    def picky(prompt: str, label: str) -> float:
        """Finds every third good text bad."""
        text = prompt.rsplit("\n", 1)[-1].split()
        told = "bad" if text[0] == "good" and int(text[2]) % 3 == 0 else text[0]
        return 0.0 if told == label.strip() else -3.0

    run = partial(write_labelled, llm=Fake(answer, picky))
    loose = run(out=tmp_path / "loose", how=Labelled(prompt=small, examples=160, balance=False))
    rows = rows_of(tmp_path / "loose")
    assert Counter(row["label"] for row in rows) == {"good": 120, "bad": 40}
    wrong = [row for row in rows if row["label"] == "good" and int(row["text"].split()[2]) % 3 == 0]
    assert len(wrong) > 20 and {row["reason"] for row in wrong} == {"label"}
    assert {row["judged"] for row in wrong} == {"bad"} and all(r["fit"] < 0.1 for r in wrong)
    assert loose.report["dropped"] == {"label": len(wrong)}
    even = run(out=tmp_path / "even", how=Labelled(prompt=small, examples=160))
    table = even.tasks()["small"]
    kept = Counter(table.labels[i] for i in table.label.tolist())
    assert kept["good"] == 120 - len(wrong) and abs(kept["bad"] - kept["good"] / 3) <= 1
    assert even.report["labels"]["good"]["share"] == pytest.approx(0.75, abs=0.01)
    other = Labelled(prompt=small, examples=40, shares={"bad": 9.0}, judge=False)
    assert run(out=tmp_path / "o", how=other).report["labels"]["bad"]["kept"] == 30
    exported = data.to_datasets(even)["small"]
    assert exported[0] == {"text": even.texts.get(int(table.query[0])),
                           "label": table.labels[int(table.label[0])]}  # fmt: skip
    assert len(exported) == even.report["kept"]
    again = data.read(tmp_path / "even" / "examples.jsonl", task="small").save(tmp_path / "again")
    assert [again.texts.get(int(r)) for r in again.tasks()["small"].query] == exported["text"]


def test_apportion_gives_whole_numbers_that_sum_up() -> None:
    rng = random.Random(1)
    for _ in range(50):
        shares, total = [rng.random() + 0.01 for _ in range(rng.randint(1, 9))], rng.randint(0, 99)
        got = apportion(shares, total)
        assert sum(got) == total
        assert all(abs(n - s * total / sum(shares)) < 1 for n, s in zip(got, shares, strict=True))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"text": ["a b c", "d e f"]}', (["a b c", "d e f"], False)),
        ('["a b c", "d e f"]', (["a b c", "d e f"], True)),
        ('Sure!\n{"texts": ["1. a b c", "2) d e f"]}', (["a b c", "d e f"], True)),
        ('{"text": ["a b c", "d e f", "g h', (["a b c", "d e f"], True)),
        ('{"text": ["a b c", "d\ne f",]}', (["a b c", "d e f"], True)),
        ('{"text": "a b c"}', "schema"), ('{"text": [{"a": "b c"}]}', "schema"),
        ('{"text": [["a b c"]]}', "schema"), ('{"text": ["a b', "not_json"),
        ("1. a b c\n2. d e f", "not_json"), ("", "not_json"), ('{"text": []}', "not_json"),
    ],
)  # fmt: skip
def test_lists_are_mended_only_where_that_is_certain(text: str, want: Any, small: Path) -> None:
    step = prompts.load(small).steps[0]
    whole = step.__class__(**{**step.__dict__, "tail": 1.0})
    if isinstance(want, str):
        with pytest.raises(Invalid, match=want):
            read_list(text, whole)
    else:
        found, mended = read_list(text, whole)
        assert ([t for t, _ in found], mended) == want and not any(why for _, why in found)


def test_texts_of_the_wrong_form_are_dropped_one_by_one_and_counted(
    small: Path, tmp_path: Path
) -> None:
    def odd(prompt: str, seed: int) -> Any:
        good = answer(prompt, seed)
        if "texts by" not in prompt.rsplit("\n", 1)[-1]:
            return good
        return [
            good, good[:-1].replace(']', ', "cut in the mid'), "no list at all",
            json.dumps({"text": ["a b c", "d e f", "a text that is shown", "too short"]}),
            json.dumps({"text": ["1 2 3", "4 5 6", "one and the same", "one and the same"]}),
            json.dumps({"text": ["a b c", "d e f", "say <|im_start|> now", "JSON: obey the text"]}),
            Completion(reason="refused"),
        ][seed % 7]  # fmt: skip

    run = partial(write_labelled, llm=Fake(odd, fits), out=tmp_path / "d")
    how = {"prompt": small, "examples": 120, "judge": False, "balance": False}
    with pytest.raises(CorruptError, match=r"items were not answered.*refused"):
        run(how=Labelled(**how, max_rejected=0.01))
    done = run(how=Labelled(**how, max_rejected=0.5))
    rows = rows_of(tmp_path / "d")
    by_seed: dict[int, set[str]] = {}
    for row in rows:
        by_seed.setdefault(sent(row) % 7, set()).add(row["reason"])
    assert by_seed[0] == by_seed[1] == {""} and by_seed[2] == {"not_json"}
    assert by_seed[3] == {"example", "length"} and by_seed[5] == {"prompt"}
    assert by_seed[4] <= {"", "repeat"} and by_seed[6] == {"refused"}
    assert sum(row["reason"] == "" and sent(row) % 7 == 4 for row in rows) == 1
    assert sum(done.report["dropped"].values()) + done.report["kept"] == len(rows)
    assert done.report["mended"] == sum(row["mended"] and not row["reason"] for row in rows) > 0


def test_pairs_carry_their_score_and_must_be_as_alike_as_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "pairs.toml"
    path.write_text(PAIRS)

    def pair(prompt: str, seed: int) -> str:
        label = prompt.rsplit("\n", 1)[-1].split()[0]
        if seed % 5 == 1:
            return json.dumps({"sentence1": "the very same", "sentence2": "The very same"})
        return json.dumps({"sentence1": f"{label} one {seed}", "sentence2": f"two {seed % 4}"})

    def alike(prompt: str, label: str) -> float:
        """Far pairs are none or, where the second is "two 3", all alike; near pairs some to all."""
        last = prompt.rsplit("\n", 1)[-1]
        if last.startswith("near"):
            return {"none": -9.0, "some": -1.0, "all": 0.0}[label.strip()]
        return {"none": 0.0, "some": -9.0, "all": 9.0 if "two 3" in last else -9.0}[label.strip()]

    done = write_labelled(
        llm=Fake(pair, alike), out=tmp_path / "d",
        how=Labelled(prompt=path, examples=60, balance=False),
    )  # fmt: skip
    table, rows = done.tasks()["alike"], rows_of(tmp_path / "d")
    assert table.kind == "sts" and set(table.score.tolist()) == {0.0, 4.0}
    for row in rows:
        if sent(row) % 5 == 1:
            assert row["reason"] == "copy"
        elif row["label"] == "far" and row["sentence2"] == "two 3":
            assert row["reason"] == "label" and row["grade"] > 3.9
        else:
            assert row["reason"] == "" and abs(row["grade"] - (4 if row["label"] == "near" else 0))\
                < 1  # fmt: skip
    near = next(row["grade"] for row in rows if row["label"] == "near" and not row["reason"])
    assert near == pytest.approx((2 * 2.718281828**-1 + 4) / (1 + 2.718281828**-1), abs=1e-3)


def test_kills_change_no_byte_and_ask_for_nothing_twice(small: Path, tmp_path: Path) -> None:
    run = partial(write_labelled, how=Labelled(prompt=small, examples=60, shard=4))
    whole = Fake(answer, fits)
    run(llm=whole, out=tmp_path / "want")
    rng, landed = random.Random(3), 0
    shards = lambda: len(list(tmp_path.glob(".partial-got-*/**/shard-*.jsonl")))  # noqa: E731

    def slowly(prompt: str, seed: int) -> str:  # so that an aimed kill does not come late
        time.sleep(0.004)
        return answer(prompt, seed)

    for more in (1, 2, 3):
        due = partial(lambda aim: shards() >= aim, shards() + more)
        landed += attempt(
            lambda: run(llm=Fake(slowly, fits), out=tmp_path / "got"), due, rng, jitter=0.01
        )
    last, there = Fake(answer, fits), shards()
    run(llm=last, out=tmp_path / "got")
    assert tiny.tree(tmp_path / "got") == tiny.tree(tmp_path / "want")
    assert landed >= 2 and there >= 4 and not list(tmp_path.glob(".partial-*"))
    assert len(last.prompts) <= len(whole.prompts) - there * 3
    run(llm=last, out=tmp_path / "got")
    assert sum(last.usage.retries.values()) == 0 and len(last.prompts) < len(whole.prompts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[judge.labels]\ngood = 1\nbad = 0", "[judge.labels]\ngood = 1\nfair = 0"), "judge's"),
        (('style = ["plain"', 'label = ["plain"'), "names that are taken"),
        (("[labels.bad]\n", ""), "less than two labels"),
        (('kind = "classification"', 'kind = "sts"'), "has the fields"),
        (('kind = "classification"', ""), "Lists, labels and a judge"),
        (('kind = "classification"', 'kind = "classes"'), "kind"),
        (("tail = 0.5", "tail = 0.0"), "out of range"),
        (("calls = 3", "calls = 0"), "needs items and calls"),
    ],
)
def test_a_wrong_prompt_says_what_is_wrong(change: tuple[str, str], says: str, small: Path) -> None:
    small.write_text(REVIEWS.replace(*change))
    with pytest.raises(UsageError, match=says):
        prompts.load(small)


def test_the_command_line_writes_them(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(cli_llm, "_backend", lambda *words, **more: Fake(answer, fits))
    (tmp_path / "people").write_text("a cook\n\na smith\n")
    cli_llm.synth(
        out=tmp_path / "d", prompt=str(small), examples=24, share=["bad=3"], no_judge=True,
        list_=[f"persona={tmp_path / 'people'}"], set_=["style=odd"], task="mine",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "24 items: 24 examples" in said and "bad: 12 (50.0%, wanted 50.0%)" in said
    rows = rows_of(tmp_path / "d")
    assert {row["persona"] for row in rows} == {"a cook", "a smith"} and rows[0]["style"] == "odd"
    assert list(data.Records.open(tmp_path / "d").tasks()) == ["mine"]
    for words, fault in (
        ({"prompt": str(small), "passages": ["x"]}, "takes no passages"),
        ({"prompt": "gecko"}, "no passages"),
        ({"prompt": str(small), "share": ["bad"]}, "LABEL=X"),
        ({"prompt": str(small), "share": ["worse=1"]}, "no label 'worse'"),
        ({"prompt": str(small), "share": ["good=0"]}, "Less than two labels"),
    ):
        with pytest.raises(UsageError, match=fault):
            cli_llm.synth(out=tmp_path / "e", **words)  # type: ignore[arg-type]
