"""Losses in a run: teachers, a learned temperature, losses by task, and what is refused first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embkit.data import Examples, Store, Teacher, teach
from embkit.data import teacher as teacher_module
from embkit.data.teacher import Scores
from embkit.errors import UsageError
from embkit.losses import losses_fit
from embkit.mine import mine
from embkit.model import Encoder
from embkit.recipe import Loss, Part, Train
from embkit.stage import digest_of
from embkit.train import Callback, finetune
from embkit.train.batches import Steps
from embkit.train.parallel import Ranks
from embkit.train.teachers import Teachers

SMALL: dict[str, Any] = {"steps": 6, "batch_size": 16, "token_budget": 300, "lr": 1e-2}


def vectors_of(texts: list[str], roles: list[str]) -> np.ndarray:
    """A teacher that counts words, 5 wide."""
    assert set(roles) <= {"query", "passage", "both"}
    words = [[int(w[1:]) for w in text.split()] for text in texts]
    return np.array([[sum(w % (k + 2) for w in ws) + 1 for k in range(5)] for ws in words])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_teach_writes_every_row_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "_BLOCK", 100)
    asked: list[int] = []

    def fails_late(texts: list[str], roles: list[str]) -> np.ndarray:
        asked.append(len(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return vectors_of(texts, roles)

    with pytest.raises(KeyboardInterrupt):
        teach(store, fails_late, tmp_path / "t", name="words")
    teach(store, fails_late, tmp_path / "t", name="words")
    assert sum(asked) == store.rows + 100  # the block that failed was asked for twice
    found = Teacher(tmp_path / "t", store)
    rows = np.random.default_rng(0).integers(0, store.rows, 50).astype(np.uint64)
    want = vectors_of([store.text(int(r)) for r in rows], ["both"] * 50)
    np.testing.assert_array_equal(found.rows(rows), want.astype(np.float32))
    teach(store, fails_late, tmp_path / "t", name="words")
    assert sum(asked) == store.rows + 100  # it is there already
    with pytest.raises(UsageError, match="not finite"):
        teach(store, lambda t, r: np.full((len(t), 2), np.nan), tmp_path / "n", name="nan")


def test_vectors_of_another_store_are_refused(
    store: Store, tmp_path: Path, make_store: Callable[..., Store]
) -> None:
    other = make_store(0, 90, copies=2)  # the same texts, other clusters
    assert other.rows == store.rows
    teach(other, vectors_of, tmp_path / "t", name="words")
    short = np.ones((store.rows - 1, 4), np.float32)
    np.save(tmp_path / "short.npy", short)
    with pytest.raises(UsageError, match=f"{store.rows - 1} vectors, the store has {store.rows}"):
        Teacher(tmp_path / "short.npy", store)
    with pytest.raises(UsageError, match="of another store"):
        Teacher(tmp_path / "t", store)


def test_scores_are_found_by_pair(table: Any) -> None:
    made: Examples = table(
        "r", "retrieval", [0, 1, 1, 4], [[5, 6], [5], [7], []], [[7], [8, 9], [8], [5]]
    )
    made = dataclasses.replace(
        made,
        score=np.array([0.5, np.nan, 0.7, 0.9], np.float32),
        negative_score=np.array([0.1, 0.2, np.nan, 0.3, 0.4], np.float32),
    )
    huge = np.uint64(2**64 - 20)  # identities are any 64 bits
    store = SimpleNamespace(examples=lambda name: made, text_id=lambda rows: rows + huge)
    scores = Scores.of_examples(store, "r")  # type: ignore[arg-type]
    query = np.array([0, 0, 1, 1, 1, 1, 4, 9], np.uint64) + huge
    passage = np.array([5, 6, 5, 7, 8, 9, 5, 9], np.uint64) + huge
    want = np.array([0.5, np.nan, np.nan, 0.7, 0.2, np.nan, 0.4, np.nan], np.float32)
    np.testing.assert_array_equal(scores.of(query, passage), want)
    assert scores.of(query[:3, None], np.zeros((3, 2), np.uint64)).shape == (3, 2)
    none = Scores(query[:0], query[:0], np.zeros(0, np.float32))
    assert not none.any and np.isnan(none.of(query, passage)).all()


def first_batch(store: Store, config: Train, **options: Any) -> Any:
    steps = Steps(store, config, Ranks(), layout="padded", **options)
    (batch,) = steps.stream(0, 1, threads=1, device=torch.device("cpu"))
    return batch


def lengths(queries: list[str], passages: list[str]) -> np.ndarray:
    """A reranker."""
    pairs = zip(queries, passages, strict=True)
    return np.array([len(p) - 0.1 * len(q) for q, p in pairs], np.float32)


def test_mined_negatives_have_the_rerankers_scores(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    config = Train(
        **SMALL, tasks={"retrieval": 1.0}, hard_negatives=2, loss=Loss(distill_scores=1.0)
    )
    rules: dict[str, Any] = {"k": 4, "candidates": 24, "percent_of_positive": None}
    mined = mine(make_encoder(), store, out=tmp_path / "m", reranker=lengths, **rules)
    teachers = Teachers(config, store, [["retrieval"]], mined=mined)
    batch = first_batch(store, config, negatives=mined)
    sides, text = teachers.sides(batch), [store.text(int(row)) for row in batch.filled.rows]
    assert sides.hard_score is not None and bool(batch.sides.hard_mask.any())
    for i, (q, p) in enumerate(zip(batch.query, batch.positive, strict=True)):
        want = lengths([text[q]] * 3, [text[p], *(text[n] for n in batch.hard[i])])
        assert sides.score[i] == want[0]
        there = batch.sides.hard_mask[i].numpy()
        np.testing.assert_array_equal(sides.hard_score[i].numpy()[there], want[1:][there])
    finetune(make_encoder(), store, negatives=mined, out=tmp_path / "run", config=config)
    first = lines(tmp_path / "run")[0]
    assert first["loss"] > sum(first["loss_per_dim"].values())  # a divergence is added
    alone = mine(make_encoder(), store, out=tmp_path / "alone", **rules)
    with pytest.raises(UsageError, match="mined without a reranker"):
        finetune(make_encoder(), store, negatives=alone, out=tmp_path / "no", config=config)


def test_vectors_score_any_pair(store: Store, tmp_path: Path) -> None:
    """Their cosines, where a task has no scores of its own."""
    teacher = teach(store, vectors_of, tmp_path / "teacher", name="words")
    loss = Loss(distill_scores=1.0, guide="absolute", guide_margin=5.0)
    config = Train(
        **SMALL, tasks={"retrieval": 1.0}, hard_negatives=2, loss=loss, teacher=str(teacher)
    )
    batch, teachers = first_batch(store, config), Teachers(config, store, [["retrieval"]])
    losses_fit(config, (32,), store, [["retrieval"]], teacher_width=teachers.width)
    sides, e = teachers.sides(batch), teachers.vectors(batch, torch.device("cpu"))
    assert e is not None and sides.hard_score is not None
    want = torch.cosine_similarity(e[batch.query], e[batch.positive])
    torch.testing.assert_close(sides.score, want)
    want = torch.cosine_similarity(e[batch.query][:, None], e[batch.hard], dim=-1)
    torch.testing.assert_close(sides.hard_score, want)


def test_a_guide_takes_part_in_a_run(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """One that drops nothing changes no bit, one that drops all leaves nothing to learn."""
    teacher = str(teach(store, vectors_of, tmp_path / "teacher", name="words"))
    found = {}
    for margin in (None, 5.0, 0.0, -5.0):
        guide = {} if margin is None else {"guide": "absolute", "guide_margin": margin}
        config = Train(
            **SMALL, tasks={"retrieval": 1.0}, loss=Loss(**guide), teacher=teacher if guide else ""
        )
        finetune(make_encoder(), store, out=tmp_path / f"{margin}", config=config)
        found[margin] = [line["loss"] for line in lines(tmp_path / f"{margin}")]
    assert found[5.0] == found[None]
    assert 0 < found[0.0][0] < found[None][0] and set(found[-5.0]) == {0.0}


def test_a_teacher_that_is_wider_than_the_model(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """A projection into its space is trained beside the model, resumes, and is forgotten."""
    wide = np.random.default_rng(0).standard_normal((store.rows, 40)).astype(np.float32)
    np.save(tmp_path / "wide.npy", wide)
    config = Train(
        **{**SMALL, "steps": 30}, loss=Loss(distill=5.0), teacher=str(tmp_path / "wide.npy"),
        checkpoint_every=2, tasks={"retrieval": 1.0},
    )  # fmt: skip
    whole = finetune(make_encoder(), store, out=tmp_path / "a", config=config)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_encoder(), store, out=tmp_path / "b", config=config, callbacks=[Stops()])
    again = finetune(make_encoder(), store, out=tmp_path / "b", config=config)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    assert whole.digest() == again.digest()
    assert "teacher_projection" not in whole.state_dict()
    far = [x["loss"] - sum(x["loss_per_dim"].values()) for x in lines(tmp_path / "a")]
    assert far[-1] < far[0] - 0.5  # 5 times two cosines of random vectors at first
    sharded = dataclasses.replace(config, sharding="shard")
    with pytest.raises(UsageError, match="whole weights"):
        losses_fit(sharded, (32,), store, [["retrieval"]], teacher_width=40)


def test_a_run_distils(store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    """The first loss is InfoNCE's and 0.5 of the distance; the files are an input of the run."""
    teacher = teach(store, vectors_of, tmp_path / "teacher", name="words")
    config = Train(**SMALL, tasks={"retrieval": 1.0}, loss=Loss(distill=0.5), teacher=str(teacher))
    finetune(make_encoder(), store, out=tmp_path / "run", config=config)
    steps = Steps(store, config, Ranks(), layout="padded")
    (batch,) = steps.stream(0, 1, threads=1, device=torch.device("cpu"))
    e = torch.cat([m.embed(make_encoder()) for m in batch.micro]).detach()[:, :5].double()
    vectors = Teacher(teacher, store).rows(batch.filled.rows)
    apart = 1 - torch.cosine_similarity(e, torch.from_numpy(vectors).double())
    first, *_, last = lines(tmp_path / "run")
    plain = sum(first["loss_per_dim"].values())
    want = plain + 0.5 * (apart[batch.query].mean() + apart[batch.positive].mean()).item()
    assert first["loss"] == pytest.approx(want, rel=1e-5)
    assert last["loss"] - sum(last["loss_per_dim"].values()) < first["loss"] - plain
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert digest_of(teacher) in record["inputs"].values()
    assert "teacher" not in record["params"] and record["params"]["loss"] == {"distill": 0.5}


def test_scores_of_the_examples_reach_the_loss(store: Store) -> None:
    name, config = "retrieval", Train(
        **SMALL, tasks={"retrieval": 1.0}, hard_negatives=2, loss=Loss(distill_scores=1.0)
    )  # fmt: skip
    real = store.examples(name)
    rng = np.random.default_rng(0)
    scored = dataclasses.replace(
        real,
        score=rng.random(len(real)).astype(np.float32),
        negative_score=rng.random(len(real.negative)).astype(np.float32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "examples", lambda self, name: scored)
        teachers = Teachers(config, store, [[name]])
        losses_fit(config, (32,), store, [[name]], scored=teachers.scored)
    steps = Steps(store, config, Ranks(), layout="padded")
    (batch,) = steps.stream(0, 1, threads=1, device=torch.device("cpu"))
    sides = teachers.sides(batch)
    assert sides.hard_score is not None
    for i, example in enumerate(batch.filled.examples.tolist()):
        assert sides.score[i] == scored.score[example]
        start, end = scored.negative_offsets[example : example + 2].astype(int)
        own = dict(
            zip(scored.negative[start:end].tolist(), scored.negative_score[start:end], strict=True)
        )
        for k in range(2):
            row = int(batch.filled.rows[batch.hard[i, k]])
            if batch.sides.hard_mask[i, k]:
                assert sides.hard_score[i, k] == own[row]


class Stops(Callback):
    def on_step(self, step: int, line: Any, speed: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt


def test_a_learned_temperature_moves_and_resumes(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    config = Train(**SMALL, loss=Loss(learn_temperature=True), temperature=0.1, checkpoint_every=2)
    whole = finetune(make_encoder(), store, out=tmp_path / "a", config=config)
    with pytest.raises(KeyboardInterrupt):
        finetune(make_encoder(), store, out=tmp_path / "b", config=config, callbacks=[Stops()])
    again = finetune(make_encoder(), store, out=tmp_path / "b", config=config)
    assert (tmp_path / "a/log.jsonl").read_bytes() == (tmp_path / "b/log.jsonl").read_bytes()
    assert whole.digest() == again.digest()
    found = [line["temperature"] for line in lines(tmp_path / "a")]
    assert len(set(found)) == 6 and all(0.05 < t < 0.2 for t in found)
    assert "log_temperature" not in whole.state_dict()
    fixed = dataclasses.replace(config, loss=Loss())
    finetune(make_encoder(), store, out=tmp_path / "c", config=fixed)
    other = lines(tmp_path / "c")
    assert other[0]["loss_hex"] == lines(tmp_path / "a")[0]["loss_hex"]  # it starts there
    assert other[-1]["loss_hex"] != lines(tmp_path / "a")[-1]["loss_hex"]


def test_tasks_have_losses_of_their_own(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """Another temperature for one task changes the losses of its steps and no other first one."""
    tasks = {"retrieval": 1.0, "topics": 1.0}
    found = []
    for name, losses in (("a", {}), ("b", {"topics": {"temperature": 0.5}})):
        config = Train(**SMALL, tasks=tasks, losses=losses)
        finetune(make_encoder(), store, out=tmp_path / name, config=config)
        found.append({line["task"]: line["loss"] for line in reversed(lines(tmp_path / name))})
    first = lines(tmp_path / "a")[0]["task"]
    assert (found[0][first] == found[1][first]) == (first != "topics")
    assert found[0]["topics"] != found[1]["topics"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"losses": {"retreival": {"mask": "off"}}}, "no task of that name"),
        ({"loss": Loss(dim_weights={"24": 0.5})}, r"width 24, the model has \[32, 16, 8\]"),
        ({"loss": Loss(form="conan"), "hard_negatives": 2}, "'topics' is a classification"),
        ({"loss": Loss(form="conan")}, "'retrieval' leaves hard negatives only"),
        ({"losses": {"retrieval": {"hard": "shared"}}}, "'retrieval' shares hard negatives"),
        ({"parts": (Part(batch_size=8, loss={"distill_scores": 1.0}),)}, "compares scores of hard"),
        ({"loss": Loss(distill_scores=1.0), "hard_negatives": 2}, "has no teacher's scores"),
        ({"parts": (Part(tasks={"topics": 1}, batch_size=8, hard_negatives=1, in_batch=False),)},
         "'topics' is a classification"),
    ],
)  # fmt: skip
def test_refused_before_the_first_step(
    settings: dict[str, Any], says: str, store: Store, make_encoder: Callable[..., Encoder],
    tmp_path: Path,
) -> None:  # fmt: skip
    config = Train(**{**SMALL, **settings})
    with pytest.raises(UsageError, match=says):
        finetune(make_encoder(), store, out=tmp_path / "run", config=config)
    assert not (tmp_path / "run").exists()


def test_rings_refuse_what_needs_all_rows(store: Store) -> None:
    for loss in (Loss(form="qwen3"), Loss(symmetric=True), Loss(spread_out=1.0)):
        config = Train(loss=loss, gather="ring")
        losses_fit(config, (32,), store, [["retrieval"]])  # one process has no ring
        with pytest.raises(UsageError, match="the rows of all ranks at once"):
            losses_fit(config, (32,), store, [["retrieval"]], ranks=2)
    losses_fit(Train(loss=Loss(form="gecko"), gather="ring"), (32,), store, [["sts"]], ranks=2)
