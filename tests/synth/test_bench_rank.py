"""The row synth.rank: its questions, ranks and kept scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fake import Fake

from embkit.bench.synth_real import ranking, scores
from embkit.bench.synth_sample import Question, questions
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
