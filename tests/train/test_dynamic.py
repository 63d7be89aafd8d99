"""Dynamic hard negatives: the rules by hand, a real run against the replay, the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from naive_dynamic import Replay

from embkit.data import Batches, Store
from embkit.errors import UsageError
from embkit.mine import load_negatives, mine
from embkit.model import Encoder
from embkit.recipe import Dynamic, Model, Watch, from_table
from embkit.train import dynamic, finetune
from embkit.train.dynamic import Slices, no_longer_hard

SETTINGS: dict[str, Any] = {
    "steps": 30, "batch_size": 16, "lr": 2e-3, "token_budget": 600, "hard_negatives": 2,
    "tasks": {"retrieval": 4.0, "topics": 1.0}, "checkpoint_every": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "first", "now", "want"),
    [
        ("conan-v1", 0.60, 0.50, True),  # golden values, and those of v2
        ("conan-v1", 0.60, 0.55, False),
        ("conan-v1", 0.95, 0.81, False),
        ("conan-v2", 0.80, 0.60, True),
        ("conan-v2", 0.90, 0.72, False),
        ("conan-v1", 0.60, 0.60, False),  # the first visit
        ("conan-v1", 0.60, 0.53, False),  # 0.6095
        ("conan-v1", 0.60, 0.52, True),  # 0.598
        ("conan-v1", 0.99, 0.81, False),  # fallen, but still above the ceiling
        ("conan-v1", 0.94, 0.80, False),  # the ceiling itself
        ("conan-v1", 0.10, -0.30, True),
        ("conan-v1", -0.20, -0.20, True),  # a negative similarity: 1.15 * -0.2 < -0.2
        ("conan-v1", -0.20, -0.10, False),
        ("conan-v1", 0.10, -0.85, False),  # |S| counts
        ("conan-v2", 0.39, 0.39, True),  # the first visit, below the floor
        ("conan-v2", 0.40, 0.40, False),
        ("conan-v2", 0.60, 0.51, False),  # 0.612
        ("conan-v2", 0.60, 0.49, True),  # 0.588
        ("conan-v2", 0.90, 0.71, False),  # fallen, but still above the ceiling
        ("conan-v2", 0.90, 0.69, True),
        ("conan-v2", 0.50, -0.85, True),  # here S itself counts
        ("conan-v2", -0.20, 0.90, True),
    ],
)
def test_the_rules_by_hand(rule: str, first: float, now: float, want: bool) -> None:
    resolved = Dynamic(rule=rule).resolved()
    assert no_longer_hard(resolved, np.array([first]), np.array([now])).tolist() == [want]
    replay = Replay([], 1, rule, first=10, every=1, lag=3)
    assert replay.no_longer_hard(first, now) is want


class Lists:
    """As much of a run's batches as slices need: lists of given lengths, examples by step."""

    def __init__(self, lengths: list[int], steps: list[list[int]]) -> None:
        self.lengths, self.steps = np.array(lengths), steps
        self.names, self.examples = ["t"], {"t": len(lengths)}
        self.store = SimpleNamespace(task=lambda _: {"kind": "retrieval"})
        self.plan = SimpleNamespace(part=lambda _: (0, 0, 0, 0))
        self.loader = SimpleNamespace(
            plan=self.plan,
            listed=lambda _, e: self.lengths[e.astype(int)].astype(np.uint32),
            examples=lambda s: (0, np.array(self.steps[s], np.uint64)),
        )


def follow(
    lists: Lists, rule: Dynamic, scores: list[list[float]], *, n: int
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Starts of every step, and what each check counted; batches are made as late as allowed."""
    slices = Slices(rule, lists, n=n)  # type: ignore[arg-type]
    starts, counts = [], []
    for step, values in enumerate(scores):
        found = slices.starts(step)
        assert found is not None
        starts.append(found.tolist())
        seen = np.array(lists.steps[step], np.uint64)
        counts.append(slices.observe(step, seen, np.array(values, np.float32)).get("t", {}))
    return starts, counts


def test_v1_by_hand() -> None:
    """Checks every 3 steps of what was seen last; a new slice from 3 steps later; S_first anew."""
    rule = Dynamic(rule="conan-v1", first=1, every=3, lag=3)
    scores = [
        [0.9, 0.6],
        [0.2, 0.6],  # between checks nobody looks
        [0.9, 0.5],  # check: 1.035 > 0.9 stays; 0.575 < 0.6 goes
        [0.8, 0.1],  # example 1 still has the old slice: its 0.1 counts for nothing
        [0.8, 0.1],
        [0.7, 0.5],  # check: 0.805 < 0.9 and 0.7 < 0.8 goes; a first visit stays
        [0.1, 0.5],
        [0.1, 0.7],
        [0.5, 0.45],  # check: a first visit stays; 0.5175 > 0.5 stays
    ]
    starts, counts = follow(Lists([9, 9], [[0, 1]] * 9), rule, scores, n=2)
    assert starts == [[1, 1]] * 5 + [[1, 3]] * 3 + [[3, 3]]
    assert [c.get("replaced") for c in counts] == [None, None, 1, None, None, 1, None, None, 0]
    assert counts[2] == {
        "checked": 2, "replaced": 1, "exhausted": 0,
        "now": pytest.approx(0.7), "first": pytest.approx(0.75),
    }  # fmt: skip
    assert counts[8]["now"] == pytest.approx(0.475) and counts[8]["first"] == pytest.approx(0.5)


def test_v2_by_hand() -> None:
    """Every step; the end of a list; lists shorter than a slice; an example without negatives."""
    rule = Dynamic(rule="conan-v2", first=2, lag=3)
    low, absent = 0.1, float("nan")
    # Slices of 2 from place 2 on: two in a list of 6, one in 5, none whole in 3 and in 0.
    lists = Lists([6, 5, 3, 0], [[0, 1, 2, 3]] * 8)
    starts, counts = follow(lists, rule, [[low, low, low, absent]] * 8, n=2)
    assert [s[0] for s in starts] == [2, 2, 2, 4, 4, 4, 4, 4]
    assert {tuple(s[1:]) for s in starts} == {(2, 2, 2)}  # the loader takes the last of short lists
    assert [c["replaced"] for c in counts] == [1, 0, 0, 0, 0, 0, 0, 0]
    assert [c["exhausted"] for c in counts] == [2, 2, 2, 3, 3, 3, 3, 3]
    assert [c["checked"] for c in counts] == [3, 2, 2, 3, 3, 3, 3, 3]


def test_the_state_survives_a_checkpoint_anywhere() -> None:
    """Random scores against the replay, saved and loaded at every step; starts asked for ahead."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 30, 40)
    lengths[0] = 30
    steps = [rng.permutation(40)[:12].tolist() for _ in range(60)]
    for name, every in (("conan-v1", 7), ("conan-v2", 1)):
        rule = Dynamic(rule=name, first=3, every=every, lag=5)
        lists = Lists(lengths.tolist(), steps)
        replay = Replay(lengths.tolist(), 2, name, first=3, every=every, lag=5)
        slices = Slices(rule, lists, n=2)  # type: ignore[arg-type]
        ahead = {s: slices.starts(s) for s in range(5)}
        replaced = 0
        for step, seen in enumerate(steps):
            scores = rng.uniform(-1, 1, 12).astype(np.float32)
            scores[lengths[seen] == 0] = np.nan
            found = slices.starts(step)
            assert found is not None and np.array_equal(found, ahead.pop(step))
            for e, start in zip(seen, found.tolist(), strict=True):
                have = range(min(start, max(0, lengths[e] - 2)), lengths[e])[:2]
                assert have == replay.places(step, e)
            counts = slices.observe(step, np.array(seen, np.uint64), scores).get("t", {})
            scored = {
                e: None if np.isnan(s) else float(s) for e, s in zip(seen, scores, strict=True)
            }
            want = replay.step(step, scored)
            assert counts == {k: pytest.approx(v) for k, v in want.items()}
            replaced += int(want.get("replaced", 0))
            if step + 5 < 60:
                ahead[step + 5] = slices.starts(step + 5)
            tensors = {k: torch.from_numpy(v.copy()) for k, v in slices.columns().items()}
            slices = Slices(rule, lists, n=2)  # type: ignore[arg-type]
            slices.restore(tensors, done=step + 1)
        assert replaced > 20


def test_batches_take_slices_of_the_lists(make_store: Callable[..., Store]) -> None:
    """Rust: ``list[start : start + n]``, the last n where a list ends; other kinds none."""
    store = make_store(8, 40)
    table = store.examples("retrieval")
    batches = Batches(store, batch_size=13, hard_negatives=2, weights={"retrieval": 1, "sts": 1})
    kinds = set()
    for step in range(12):
        number, examples = batches.loader.examples(step)
        starts = (examples % 5).astype(np.uint64)
        starts[0] = 2**64 - 1
        batch = batches.batch(step, starts=starts)
        kinds.add(batch.kind)
        assert batches.names[number] == batch.task and np.array_equal(batch.examples, examples)
        if batch.kind != "retrieval":
            assert batch["hard"].shape == (13, 0)
            continue
        listed = batches.loader.listed(number, examples)
        rows = zip(examples, starts, batch.rows[batch["hard"]], batch["hard_mask"], strict=True)
        for i, (example, start, found, mask) in enumerate(rows):
            a, b = table.negative_offsets[int(example) : int(example) + 2].astype(int)
            want = table.negative[a:b].tolist()
            assert len(want) == listed[i]
            start = min(int(start), max(0, len(want) - 2))
            assert found[mask].tolist() == want[start : start + 2]
    assert kinds == {"retrieval", "sts"}
    with pytest.raises(UsageError, match="12 starts for a batch of 13"):
        batches.batch(0, starts=np.zeros(12, np.uint64))


@pytest.fixture(scope="module")
def mined(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranked lists of 40 for the small store."""
    model = Model(hidden=32, layers=1, heads=2, intermediate=32, dims=(32,))
    return mine(
        Encoder.from_config(model, store.tokenizer), store,
        k=40, candidates=64, rerank_candidates=40,
        out=tmp_path_factory.mktemp("dynamic") / "mined",
        percent_of_positive=None, near_duplicate=None,
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["conan-v2", "conan-v1"])
def test_a_run_equals_the_replay_of_its_scores(
    store: Store,
    mined: Path,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rule: str,
) -> None:
    offsets, row, _, _ = load_negatives(mined, "retrieval")
    every = 10 if rule == "conan-v1" else 1
    settings = Dynamic(rule=rule, first=4, every=every, lag=6)
    trained: list[tuple[int, np.ndarray, np.ndarray, list[list[int]]]] = []
    real = dynamic.mean_scores

    def spy(embeddings: torch.Tensor, batch: Any) -> torch.Tensor:
        """What a step trained on, and its scores, against cosines in float64."""
        found, filled = real(embeddings, batch), batch.filled
        scores = found.numpy()
        if filled["hard"].shape[1] == 0:
            return found
        e = embeddings.detach().double()
        e = e / e.norm(dim=1, keepdim=True)
        hard, mask = filled["hard"], filled["hard_mask"]
        for i, query in enumerate(filled["query"]):
            want = [float(e[query] @ e[h]) for h in hard[i][mask[i]]]
            assert scores[i] == pytest.approx(np.mean(want), abs=1e-6)
        used = [r[m].tolist() for r, m in zip(filled.rows[hard], mask, strict=True)]
        trained.append((filled.step, filled.examples, scores, used))
        return found

    logs, states = [], []
    for threads in (1, 2, 3) if rule == "conan-v2" else (1,):
        trained.clear()
        out = tmp_path / str(threads) / "run"
        with monkeypatch.context() as patch:
            patch.setattr("embkit.train.step.mean_scores", spy)
            finetune(
                make_encoder(layers=1), store, negatives=mined, out=out, dynamic=settings,
                data_threads=threads, watch=Watch(background=threads == 3), **SETTINGS,
            )  # fmt: skip
        logs.append((out / "log.jsonl").read_bytes())
        states.append((out / "checkpoints/step-000030/optimizer.safetensors").read_bytes())
    assert len(set(logs)) == len(set(states)) == 1
    replay = Replay(np.diff(offsets.astype(int)).tolist(), 2, rule, first=4, every=every, lag=6)
    steps = {step: found for step, *found in trained}
    replaced = moved = 0
    for line in map(json.loads, logs[0].splitlines()):
        step, scored = line["step"] - 1, {}
        if step in steps:
            examples, scores, used = steps[step]
            for e, score, rows in zip(examples.tolist(), scores.tolist(), used, strict=True):
                places = replay.places(step, e)
                assert rows == row[int(offsets[e]) :][places.start : places.stop].tolist()
                moved += places.start > 4
                scored[e] = score
        want = replay.step(step, scored)
        assert ("negatives" in line) == bool(want)
        if want:
            assert line["negatives"]["retrieval"] == {
                k: pytest.approx(v, abs=1e-9) for k, v in want.items()
            }
            replaced += int(want["replaced"])
    assert replaced > 15 and moved > 15


def test_switched_off_nothing_changes(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """No new field in the log, the checkpoint or the digest of a run without it."""
    finetune(make_encoder(), store, out=tmp_path / "run", **{**SETTINGS, "steps": 4})
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    new = {"dynamic", "refresh_every", "refresh_lag", "miner"}
    assert not new & set(manifest["params"])
    text = (tmp_path / "run/log.jsonl").read_text()
    assert "negatives" not in text and "refresh" not in text
    state = json.loads((tmp_path / "run/checkpoints/step-000004/state.json").read_text())
    assert not new & {*state, *state["config"]}


def test_refusals(
    store: Store, mined: Path, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    def run(**settings: Any) -> None:
        finetune(
            make_encoder(), store, negatives=mined, out=tmp_path / "run", **{**SETTINGS, **settings}
        )

    on = Dynamic(rule="conan-v2")
    with pytest.raises(UsageError, match="longest list of negatives .* has 40, .* ends at 62"):
        run(dynamic=Dynamic(rule="conan-v1", first=60))
    with pytest.raises(UsageError, match="hard_negatives is 0"):
        run(dynamic=on, hard_negatives=0)
    with pytest.raises(UsageError, match="no task of the mixture is retrieval"):
        run(dynamic=on, tasks={"topics": 1.0})
    with pytest.raises(UsageError, match="conan-v1"):
        Dynamic(rule="conan-1")
    with pytest.raises(UsageError, match=r"dynamic.first = 10, lag = 2"):
        Dynamic(lag=2)
    given = {"finetune": {"hard_negatives": 2, "dynamic": {"rule": "conan-v2", "floor": 0.3}}}
    resolved = from_table(given).run_config(0).dynamic.resolved()
    assert (resolved.every, resolved.ratio, resolved.ceiling, resolved.floor) == (1, 1.2, 0.7, 0.3)
