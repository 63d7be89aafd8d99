"""Relabelling and judging: ranks, positives, negatives, what cannot be scored, kills."""

from __future__ import annotations

import json
import random
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fake import Fake
from killing import attempt
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embkit import container, data
from embkit.errors import UsageError
from embkit.synth import Judge, Relabel, fuse, judge, relabel
from embkit.synth.judging import agreement

NUMBER = re.compile(r"w(\d+)")


@pytest.fixture(scope="module")
def encoder() -> Any:
    """Words w0 to w39; random weights."""
    from embkit.model import Encoder
    from embkit.recipe import Model

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(40))])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    sizes: dict[str, Any] = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 48}
    return Encoder.from_config(
        Model(**sizes, dims=(32, 16)), made, max_length={"query": 12, "passage": 12}
    ).eval()


@pytest.fixture
def records(tmp_path: Path) -> Any:
    """20 pairs whose first words are topics: that of passage i + 1 is a seed of query i."""
    rows = [
        {"query": f"w{i} w39 q", "positive": f"w{(i + 1) % 20} w{i} p", "negative": [f"w{i} w38 n"]}
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.read(path, task="pairs").save(tmp_path / "records")


def last(prompt: str, what: str) -> int:
    return int(NUMBER.search(prompt.rsplit(what, 1)[1])[1])  # type: ignore[index]


def topic(prompt: str, continuation: str) -> float:
    """Likely when query and passage have one topic, less so the further apart topics are."""
    if "Query:" in prompt.rsplit("\n", 1)[1]:  # query likelihood
        return -abs(last(prompt, "Passage:") - int(NUMBER.search(continuation)[1]))  # type: ignore[index]
    near = abs(last(prompt, "Query:") - last(prompt, "Passage:"))
    return {" Not": 0.0, " Somewhat": -9.0, " Highly": -9.0, " Perfectly": 5.0 - near}[continuation]


def seed_best(prompt: str, continuation: str) -> float:
    """Only the seed is likely, and relevant."""
    text = prompt + continuation
    passage = text.rsplit("Passage:", 1)[1].split()[:2]
    query = NUMBER.search(text.rsplit("Query:", 1)[1])[1]  # type: ignore[index]
    hit = passage == [f"w{(int(query) + 1) % 20}", f"w{query}"]
    return float(hit) * (9 if "Perf" in continuation or "Not" not in continuation else -9)


def test_fusion_is_that_of_the_paper() -> None:
    ql, rc = np.array([-1.0, -2.0, -3.0, -3.0]), np.array([0.2, 0.9, 0.5, 0.5])
    # Ranks 1 2 3 4 and 4 1 2 3: ties stay in their order.
    assert fuse(ql, rc).tolist() == [1 + 1 / 4, 1 / 2 + 1, 1 / 3 + 1 / 2, 1 / 4 + 1 / 3]
    assert fuse(ql, rc, 60).tolist() == [
        1 / 61 + 1 / 64, 1 / 62 + 1 / 61, 1 / 63 + 1 / 62, 1 / 64 + 1 / 63]  # fmt: skip


def test_fusion_of_given_ranks() -> None:
    """Ranks 1 2 3 4 and 3 1 2 4."""
    found = fuse(np.array([4.0, 3.0, 2.0, 1.0]), np.array([2.0, 4.0, 3.0, 1.0]))
    assert found.tolist() == pytest.approx([1.333333, 1.5, 0.833333, 0.5], abs=1e-6)


def test_the_best_becomes_the_positive_and_the_last_the_negative(
    records: Any, encoder: Any, tmp_path: Path
) -> None:
    how = Relabel(candidates=40, shard=7)
    done = relabel(records, model=encoder, llm=Fake(None, topic), out=tmp_path / "r", how=how)
    table, texts = done.tasks()["pairs"], done.texts
    assert len(table) == 20
    for i in range(20):
        query, positive = texts.get(int(table.query[i])), texts.get(int(table.positive[i]))
        number = int(query.split()[0][1:])
        # Both scores like its own topic best: passages "w{i} .. p" and "w{i} w38 n" have it.
        assert positive.split()[0] == f"w{number}"
        negative = texts.get(int(table.negative[i]))
        apart = abs(int(negative.split()[0][1:]) - number)
        assert apart == max(number, 19 - number)
    report = done.report["tasks"]["pairs"]
    assert report["judged"] == 20 and report["share_best_is_not_seed"] == 1.0
    assert done.report["samples"][0].keys() == {"task", "query", "seed", "best"}
    scores = container.load(tmp_path / "r" / "relabel-pairs.safetensors", kind="embkit.relabel")
    assert scores["offsets"].tolist() == list(range(0, 801, 40))
    order = np.argsort(-scores["fused"][:40], kind="stable")
    assert scores["text_id"][:40][order[0]] == texts.text_id[int(table.positive[0])]
    assert scores["text_id"][:40][order[-1]] == texts.text_id[int(table.negative[0])]


def test_a_relevance_that_ranks_as_chance_does_is_said_aloud(
    records: Any, encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_idea(prompt: str, continuation: str) -> float:
        return seed_best(prompt, continuation) if "Query:" in prompt.rsplit("\n", 1)[1] else -1.0

    run = partial(relabel, records, model=encoder, how=Relabel(candidates=10))
    for score, said in ((seed_best, False), (no_idea, True)):
        done = run(llm=Fake(None, score), out=tmp_path / score.__name__)
        mrr = done.report["tasks"]["pairs"]["mrr"]
        assert mrr["chance"] == round(sum(1 / k for k in range(1, 11)) / 10, 6)
        assert mrr["likelihood"] == 1.0 and mrr["relevance"] == (0.1 if said else 1.0)
        assert ("--relevance yes-no" in capsys.readouterr().out) == said


def test_the_seed_is_among_the_candidates_however_far_it_is(
    records: Any, encoder: Any, tmp_path: Path
) -> None:
    how = Relabel(candidates=2)
    done = relabel(records, model=encoder, llm=Fake(None, seed_best), out=tmp_path / "r", how=how)
    report = done.report["tasks"]["pairs"]
    assert report["share_best_is_not_seed"] == 0.0 and report["seed_mrr"] == 1.0
    assert report["candidates"] == 40
    table, before = done.tasks()["pairs"], records.tasks()["pairs"]
    got = [done.texts.get(int(row)) for row in table.positive]
    assert got == [records.texts.get(int(row)) for row in before.positive]


def test_the_variant_with_negatives_alone_and_random_ones(
    records: Any, encoder: Any, tmp_path: Path
) -> None:
    run = partial(relabel, records, model=encoder, llm=Fake(None, topic))
    how = Relabel(candidates=40, positive="seed", negatives=3)
    done = run(out=tmp_path / "a", how=how)
    table, before = done.tasks()["pairs"], records.tasks()["pairs"]
    assert [done.texts.get(int(r)) for r in table.positive] == [
        records.texts.get(int(r)) for r in before.positive
    ]
    assert np.diff(table.negative_offsets.astype(int)).tolist() == [3] * 20
    worst = table.negative_score.reshape(20, 3)
    assert (np.diff(worst, axis=1) <= 0).all() and np.isfinite(worst).all()
    drawn = [run(out=tmp_path / f"{seed}", how=Relabel(candidates=40, negative="random", seed=seed))
             .tasks()["pairs"].negative_score.tolist() for seed in (1, 2)]  # fmt: skip
    assert drawn[0] != drawn[1]
    none = run(out=tmp_path / "none", how=Relabel(candidates=40, negative="none"))
    assert len(none.tasks()["pairs"].negative) == 0


def test_what_cannot_be_scored_keeps_its_seed_and_is_counted(
    records: Any, encoder: Any, tmp_path: Path
) -> None:
    def refuse(prompt: str, continuation: str) -> float | str:
        text = prompt + continuation
        if int(NUMBER.search(text.rsplit("Query:", 1)[1])[1]) == 4:  # type: ignore[index]
            return "refused"
        if text.rsplit("Passage:", 1)[1].split()[0] == "w7":
            return "too_long"
        return topic(prompt, continuation)

    how = Relabel(candidates=40)
    done = relabel(records, model=encoder, llm=Fake(None, refuse), out=tmp_path / "r", how=how)
    report = done.report["tasks"]["pairs"]
    # Query 4 is refused; passages of topic 7 too: one of them is the seed of query 6.
    assert (report["judged"], report["unjudged"], report["examples"]) == (18, 2, 20)
    assert report["rejected_candidates"] == {"refused": 40, "too_long": 2 * 19}
    table = done.tasks()["pairs"]
    assert len(table) == 20 and len(table.negative) == 18
    i = next(i for i in range(20) if done.texts.get(int(table.query[i])).startswith("w4 "))
    assert done.texts.get(int(table.positive[i])) == "w5 w4 p"
    with pytest.raises(UsageError, match="gives no log-likelihoods"):
        llm = Fake(None, topic)
        llm.capabilities = frozenset({"generate", "first_token"})  # type: ignore[misc]
        relabel(records, model=encoder, llm=llm, out=tmp_path / "s")


def test_kills_change_no_byte(records: Any, encoder: Any, tmp_path: Path) -> None:
    run = partial(relabel, records, model=encoder, how=Relabel(candidates=8, shard=3))
    run(llm=Fake(None, topic), out=tmp_path / "want")
    rng, landed = random.Random(3), 0
    shards = lambda: len(list(tmp_path.glob(".partial-got-*/shards/shard-*")))  # noqa: E731

    def slowly(prompt: str, label: str) -> float:  # so that an aimed kill does not come late
        time.sleep(0.002)
        return topic(prompt, label)

    for _ in range(4):
        due = partial(lambda more: shards() >= more, shards() + rng.randrange(1, 3))
        landed += attempt(
            lambda: run(llm=Fake(None, slowly), out=tmp_path / "got"), due, rng, jitter=0.01
        )
    before = Fake(None, topic)
    left = 7 - shards()
    run(llm=before, out=tmp_path / "got")
    assert tiny.tree(tmp_path / "got") == tiny.tree(tmp_path / "want")
    assert landed >= 2 and left < 7


def test_a_judge_takes_weak_positives_and_strong_negatives_out(
    records: Any, tmp_path: Path
) -> None:
    def grade(prompt: str, label: str) -> float:
        """Positives of queries below 5 are bad, negatives of queries above 15 perfect."""
        query, passage = last(prompt, "Query:"), prompt.rsplit("Passage:", 1)[1]
        good = query >= 5 if " p" in passage else query > 15
        return 0.0 if label == (" Perfectly" if good else " Not") else -30.0

    done = judge(records, llm=Fake(None, grade), out=tmp_path / "j")
    counts = done.report["tasks"]["pairs"]
    assert (counts["weak_positives"], counts["strong_negatives"], counts["after"]) == (5, 4, 15)
    assert counts["samples"]["positives"][0]["grade"] == 0.0
    assert counts["samples"]["negatives"][0]["query"].startswith("w16 ")
    table = done.tasks()["pairs"]
    assert len(table) == 15 and len(table.negative) == 11
    marked = judge(records, llm=Fake(None, grade), out=tmp_path / "m", how=Judge(action="mark"))
    assert len(marked.tasks()["pairs"]) == 20 and marked.report["tasks"] == done.report["tasks"]
    two = Judge(prompts=("relevance", "relevance"))
    both = judge(records, llm=Fake(None, grade), out=tmp_path / "b", how=two)
    assert both.report["agreement"]["kappa"] == 1.0 and both.report["agreement"]["pairs"] == 40


def test_agreement_is_cohens() -> None:
    grades = np.array([[2, 2], [2, 0], [0, 0], [0, 0], [np.nan, 2], [2, 2]], float)
    # 4 of 5 alike; chance 0.6 * 0.4 + 0.4 * 0.6 = 0.48.
    found = agreement(grades, 1.0)
    assert found["pairs"] == 5 and found["same_decision"] == 0.8
    assert found["kappa"] == pytest.approx((0.8 - 0.48) / 0.52, abs=1e-6)
