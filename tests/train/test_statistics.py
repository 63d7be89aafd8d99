"""Similarities of a batch in the log: against loops in Python, and without a trace in the run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from embkit.data import Store
from embkit.losses import Sides
from embkit.model import Encoder
from embkit.recipe import Loss, Train
from embkit.train import Callback, finetune, statistics
from embkit.train.parallel import Ranks
from embkit.train.tensorboard import scalars

DIMS = (8, 24, 16)
CONFIG = Train(log_every=1, temperature=0.05)


def made(kind: str, *, seed: int = 0, hard: int = 2, loss: Loss | None = None) -> tuple[Any, Any]:
    """A batch whose rows share texts, keys and queries, and its embeddings."""
    rng = np.random.default_rng(seed)
    b, r = 11, 30

    def numbers(high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, high, shape).astype(np.int32))

    e_RD = torch.from_numpy(rng.standard_normal((r, 24)).astype(np.float32))
    e_RD[3] = 0
    query, positive, own = numbers(r, b).long(), numbers(r, b).long(), numbers(r, b, hard).long()
    key = numbers(25, r)  # of texts: a candidate that is the positive itself is masked
    e_RD[positive] += 1.5 * e_RD[query]
    sides = Sides(
        kind=kind, query_key=numbers(9, b), positive_key=key[positive], hard_key=key[own],
        hard_mask=numbers(3, b, hard) > 0, score=numbers(4, b).float(), weight=torch.ones(b),
    )  # fmt: skip
    batch = SimpleNamespace(
        query=query, positive=positive, hard=own, sides=sides, share=None,
        loss=loss or Loss(), in_batch=(loss or Loss()).terms()["in_batch"], step=0, place=0,
    )  # fmt: skip
    return batch, e_RD


def measured(*batches: tuple[Any, Any], tasks: tuple[str, ...] = ("t",)) -> dict[str, Any]:
    config = dataclasses.replace(CONFIG, loss=batches[0][0].loss, hard_negatives=2)
    found = statistics.Statistics(config, DIMS, len(batches), Ranks())
    for place, (batch, e_RD) in enumerate(batches):
        batch.place = place
        found.add(batch, e_RD)
    sums = found.take()
    assert sums is not None and found.take() is None
    return statistics.report(sums, tasks, DIMS, config)


def cosine(a: torch.Tensor, b: torch.Tensor, d: int) -> float:
    x, y = a[:d].double(), b[:d].double()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def naive(batch: Any, e: torch.Tensor) -> dict[str, Any]:
    """Every candidate of every row, as a decision of its own."""
    s, rows, rule, terms = batch.sides, range(len(batch.query)), batch.loss.mask, batch.loss.terms()
    all_, masked = 0, 0
    kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {i: [] for i in rows}
    for i in rows:
        q, p = e[batch.query[i]], e[batch.positive[i]]
        for j in rows:
            same = rule != "off" and s.positive_key[j] == s.positive_key[i]
            same = bool(same or (rule == "keys" and s.query_key[j] == s.query_key[i]))
            theirs = [
                (terms["in_batch"], (q, e[batch.positive[j]])),
                (terms["same_tower"], (q, e[batch.query[j]])),
                (terms["doc_doc"], (p, e[batch.positive[j]])),
            ]
            for there, pair in theirs:
                if there and j != i:
                    all_, masked = all_ + 1, masked + same
                    kept[i] += [] if same else [pair]
            for h in range(batch.hard.shape[1]):
                if s.hard_mask[j, h] and (i == j or batch.loss.hard == "shared"):
                    same_hard = bool(rule != "off" and s.hard_key[j, h] == s.positive_key[i])
                    all_, masked = all_ + 1, masked + same_hard
                    kept[i] += [] if same_hard else [(q, e[batch.hard[j, h]])]
    out: dict[str, Any] = {"masked": masked / all_, "accuracy": {}, "positive": {}, "negative": {}}
    for d in DIMS:
        pos = [cosine(e[batch.query[i]], e[batch.positive[i]], d) for i in rows]
        neg = [[cosine(a, b, d) for a, b in kept[i]] for i in rows]
        right = [pos[i] > max(neg[i]) + 1e-6 for i in rows if neg[i]]
        out["accuracy"][str(d)] = sum(right) / len(right)
        out["positive"][str(d)] = float(np.mean(pos))
        out["negative"][str(d)] = float(np.mean([x for row in neg for x in row]))
        margin = batch.loss.terms()["margin"]
        if margin is not None:
            unit = [abs(p) if batch.loss.margin_rule == "relative" else 1.0 for p in pos]
            over = [x > pos[i] + margin * unit[i] for i in rows for x in neg[i]]
            out.setdefault("beyond_margin", {})[str(d)] = float(np.mean(over))
    return out


@pytest.mark.parametrize("block", [1 << 20, 40])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"in_batch": False}, {"mask": "positives"}, {"mask": "off", "temperature": 0.5},
        {"margin": -0.1}, {"margin": -0.3, "margin_rule": "relative"},
        {"form": "gecko", "hard": "shared"}, {"form": "conan", "hard": "shared"},
        {"form": "qwen3", "mask": "positives"}, {"in_batch": False, "doc_doc": True},
    ],
    ids=str,
)  # fmt: skip
def test_pairs_with_negatives(
    settings: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and margins as the loss has them, also cut into blocks of rows."""
    monkeypatch.setitem(statistics._BLOCK, "cpu", block)
    loss = Loss(**settings)
    for seed, hard in itertools.product(range(2), (0, 2) if loss.terms()["in_batch"] else (2,)):
        batch, e_RD = made("retrieval", seed=seed, hard=hard, loss=loss)
        got, want = measured((batch, e_RD))["t"], naive(batch, e_RD)
        assert got.pop("temperature") == settings.get("temperature", 0.05)
        assert got.pop("masked") == want.pop("masked")
        if loss.terms()["margin"] is not None:
            assert 0 < min(want["beyond_margin"].values()) < 1
        for name, by_width in want.items():
            assert got.pop(name) == pytest.approx(by_width, abs=1e-6), (name, seed)
        assert not got


def test_graded_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(statistics._BLOCK, "cpu", 40)
    batch, e_RD = made("sts")
    got = measured((batch, e_RD))["t"]
    gold = batch.sides.score.tolist()
    for d in DIMS:
        pairs = [
            cosine(e_RD[a], e_RD[b], d) for a, b in zip(batch.query, batch.positive, strict=True)
        ]
        order = [
            pairs[i] > pairs[j] for i in range(11) for j in range(11) if gold[i] > gold[j]
        ]  # fmt: skip
        assert got["cosine"][str(d)] == pytest.approx(np.mean(pairs), abs=1e-6)
        assert got["order"][str(d)] == np.mean(order)
    assert set(got) == {"cosine", "order"}


def test_parts_of_one_task_are_one() -> None:
    """Sums over parts, not a mean of their means: rows count the same."""
    one, other, graded = made("retrieval"), made("retrieval", seed=1), made("sts")
    other[0].sides.hard_mask[:] = False
    found = measured(one, other, graded, tasks=("a", "a", "b"))
    want = [naive(*one), naive(*other)]
    sizes = [110 + int(x[0].sides.hard_mask.sum()) for x in (one, other)]
    total = sum(w["masked"] * n for w, n in zip(want, sizes, strict=True))
    assert found["a"]["masked"] == pytest.approx(total / sum(sizes), rel=1e-12)
    assert found["b"] == measured(graded)["t"]


def test_without_a_negative_there_is_no_accuracy() -> None:
    batch, e_RD = made("retrieval", loss=Loss(in_batch=False))
    batch.sides.hard_mask[:] = False
    found = measured((batch, e_RD))["t"]
    assert set(found["accuracy"].values()) == {None} == {found["masked"]}
    assert None not in found["positive"].values()
    tags = statistics.scalars({"t": found})
    assert set(tags) == {"batch/t/temperature", *(f"batch/t/positive_at_{d}" for d in DIMS)}


def test_a_learned_temperature_is_the_one_of_now(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """Of the tasks that learn it; another task's own stays."""
    finetune(
        make_encoder(), store, out=tmp_path / "run", steps=6, batch_size=12, lr=0.05, log_every=1,
        loss=Loss(learn_temperature=True), temperature=0.1,
        losses={"topics": {"learn_temperature": False, "temperature": 0.3}},
        tasks={"retrieval": 1.0, "topics": 1.0},
    )  # fmt: skip
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    seen = {task: [x for x in lines if x["task"] == task] for task in ("retrieval", "topics")}
    told = {
        task: [x["statistics"][task]["temperature"] for x in found] for task, found in seen.items()
    }
    assert told["retrieval"] == [x["temperature"] for x in seen["retrieval"]]
    assert len(set(told["retrieval"])) == len(told["retrieval"]) > 1
    assert set(told["topics"]) == {0.3}


class StopAt(Callback):
    def on_step(self, step: int, line: Any, speed: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt


def test_they_are_in_the_log_and_nowhere_else(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """Every ``log_every`` steps and at the end; the model is the same without, and a run that
    stopped between has the same log."""
    encoder = make_encoder(dropout=0.1)
    options: dict[str, Any] = {
        "steps": 8, "batch_size": 12, "token_budget": 150, "lr": 1e-3, "hard_negatives": 1,
        "checkpoint_every": 4, "graph_memory": 0.0,
    }  # fmt: skip
    finetune(encoder, store, out=tmp_path / "whole", **options, log_every=3)
    finetune(encoder, store, out=tmp_path / "rare", **options, log_every=100)
    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, store, out=tmp_path / "run", callbacks=[StopAt()], **options, log_every=3)
    finetune(encoder, store, out=tmp_path / "run", **options, log_every=3)
    files = {
        run: [(tmp_path / run / f).read_bytes() for f in ("log.jsonl", "model/model.safetensors")]
        for run in ("whole", "rare", "run")
    }
    assert files["run"] == files["whole"] and files["rare"][1] == files["whole"][1]
    whole, rare = ([json.loads(x) for x in files[r][0].splitlines()] for r in ("whole", "rare"))
    assert [x["step"] for x in whole if "statistics" in x] == [3, 6, 8]
    assert [x["step"] for x in rare if "statistics" in x] == [8]
    for line in whole:
        told = line.pop("statistics", {line["task"]: {}})
        assert list(told) == [line["task"]]
        for tag, value in scalars({**line, "statistics": told}, {}).items():
            assert math.isfinite(value), tag
            assert not tag.startswith("batch/") or tag.split("/")[1] == line["task"]
    assert whole == [{k: v for k, v in x.items() if k != "statistics"} for x in rare]
