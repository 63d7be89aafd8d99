"""The row synth.rank: its questions, ranks and kept scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake import Fake

from embkit.bench.synth_real import ranking, scores
from embkit.bench.synth_sample import Question, questions
from embkit.bench.synth_write import _one
from embkit.demo import DATA
from embkit.synth.relabelling import chance


def test_ranks_count_ties_against_the_right_passage() -> None:
    asked = Question("a", "q", ("x", "y", "z", "w"), (1, 3), (4, 3, 2, 1))
    assert [asked.rank(np.array(s)) for s in ([3, 2, 1, 0], [0, 0, 0, 0], [1, 2, 3, 4])] == [
        2,
        3,
        1,
    ]
    assert abs(chance(20) - sum(1 / k for k in range(1, 21)) / 20) < 1e-12
    # Two right of four: the better is first, second or third in 3, 2 and 1 of 6 orders.
    assert abs(chance(4, 2) - (3 + 2 / 2 + 1 / 3) / 6) < 1e-12


def test_every_question_has_its_positives_among_as_many_passages() -> None:
    for hard in (False, True):
        asked = questions(DATA, each=6, n=8, hard=hard)
        assert asked == questions(DATA, each=6, n=8, hard=hard)
        assert all(len(set(q.passages)) == 8 and q.right for q in asked)
        wrong = [np.delete(np.array(q.bm25), q.right) for q in asked]
        # The best of BM25 but for the positives, or some of the pool.
        assert all((w.max() <= 8 + len(q.right)) == hard for w, q in zip(wrong, asked, strict=True))


def test_a_query_counts_when_it_finds_its_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pool = [f"passage {i} tells of subject{i} at some length" for i in range(40)]

    def answer(prompt: str, seed: int) -> str:
        number = int(prompt.rsplit("Passage: passage ", 1)[1].split()[0])
        told = (f"what is subject{number}", f"what is subject{number - 20}", "what")[number % 3]
        return f" {told}\nTask: find what is said of it"

    found = _one(Fake(answer), pool[30:36], pool, "gecko-lines", 0.0)
    assert found["kept"] == 6 and found["dropped"] == {}
    # Two name their own subject, two another, two none: ties go to the first of the pool.
    assert found["share"] == 2 / 6
    assert _one(Fake(None), pool[30:36], pool, "gecko-lines", 0.0) == found  # kept
    none = _one(Fake(lambda prompt, seed: "no"), pool[30:36], pool, "gecko", 0.0)
    assert none["share"] == none["kept"] == 0


def test_scores_are_kept_and_the_row_has_both_rankings(tmp_path: Path) -> None:
    asked = questions(DATA, each=4, n=6)

    def score(prompt: str, continuation: str) -> float:
        query, passage = continuation, prompt.rsplit("Passage:", 1)[1]
        if "\nAnswer:" in prompt:
            query = passage.rsplit("Query:", 1)[1]
            return float(continuation == " Yes") * len(set(query.split()) & set(passage.split()))
        return float(len(set(query.split()) & set(passage.split())))

    llm = Fake(None, score)
    found = {name: scores(llm, asked, name, tmp_path, 2) for name in ("likelihood", "yes-no")}
    dead = Fake(None, None)
    assert scores(dead, asked, "likelihood", tmp_path, 2) == found["likelihood"]
    (damaged, *_) = sorted(tmp_path.glob("likelihood-*/shards/*"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = scores(llm, asked, "likelihood", tmp_path, 2)
    assert [r["score"] for r in again] == [r["score"] for r in found["likelihood"]]
    case = ranking("synth.rank", asked, found)
    ranks = [q.rank(np.array(r["score"])) for q, r in zip(asked, again, strict=True)]
    assert case.ours().value == np.mean([1 / rank for rank in ranks])
    assert case.facts["questions_yes-no"] == case.facts["questions"] == len(asked)
    assert case.rivals["BM25"]().value > case.facts["chance"]
