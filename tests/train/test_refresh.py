"""Negatives mined again beside the training: on schedule, the same bits, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embkit import container, pipeline
from embkit.data import Store
from embkit.errors import CorruptError, EmbkitError, Preempted, UsageError
from embkit.mine import load_negatives
from embkit.model import Encoder
from embkit.recipe import Dynamic, from_table, load
from embkit.train import Miner, finetune, refresh
from embkit.train import step as one_step

FAKE = Path(__file__).parents[1] / "fake_miner.py"
SETTINGS: dict[str, Any] = {
    "steps": 26, "batch_size": 8, "lr": 2e-3, "token_budget": 600, "hard_negatives": 2,
    "tasks": {"retrieval": 1.0}, "checkpoint_every": 5, "refresh_every": 8, "refresh_lag": 5,
    # No slice is that hard: each is trained on once.
    "dynamic": Dynamic(rule="conan-v2", first=0, lag=4, floor=1.01),
}  # fmt: skip


def miner(store: Store, seconds: float = 0.0) -> Miner:
    """The stand-in of the tests; late by some seconds."""
    script = [sys.executable, str(FAKE), str(store.path)]
    return Miner(command=lambda model, out: [*script, str(model), str(out), str(seconds)])


def files(run: Path) -> dict[str, bytes]:
    found = (p for p in sorted(run.rglob("*")) if p.is_file() and p.name != "README.md")
    return {str(p.relative_to(run)): p.read_bytes() for p in found if p.name != "manifest.json"}


def test_tables_are_swapped_on_schedule(
    store: Store,
    ranked: Path,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights of step 8 and 16, first trained on in steps 14 and 22 (from 1): late or not."""
    used: dict[int, list[tuple[int, list[int]]]] = {}
    kept: dict[str, tuple[np.ndarray, ...]] = {"0": load_negatives(ranked, "retrieval")}
    real, swap = one_step.mean_scores, refresh.Refresh.wait

    def spy(embeddings: Any, batch: Any) -> Any:
        filled = batch.filled
        rows = filled.rows[filled["hard"]].tolist()
        used[filled.step] = list(zip(filled.examples.tolist(), rows, strict=True))
        return real(embeddings, batch)

    def waited(self: Any, number: int, idle: Any) -> float:
        seconds = swap(self, number, idle)
        table = load_negatives(self.table(number), "retrieval")
        kept[str(number)] = tuple(np.array(column) for column in table)
        return seconds

    monkeypatch.setattr(one_step, "mean_scores", spy)
    monkeypatch.setattr(refresh.Refresh, "wait", waited)
    runs = []
    for threads, late in ((1, 0.0), (3, 0.7)):
        out = tmp_path / str(threads) / "run"
        finetune(
            make_encoder(layers=1), store, negatives=ranked, refresh=miner(store, late), out=out,
            data_threads=threads, **SETTINGS,
        )  # fmt: skip
        runs.append(files(out))
    assert runs[0] == runs[1] and not any("refresh" in name for name in runs[0])
    lines = [json.loads(line) for line in runs[0]["log.jsonl"].decode().splitlines()]
    assert [x["step"] for x in lines if "refresh" in x] == [14, 22]
    assert [x["refresh"]["weights"] for x in lines if "refresh" in x] == [8, 16]
    for number in ("1", "2"):
        new, old = kept[number], kept[str(int(number) - 1)]
        fresh = sum(
            r not in old[1][int(a) : int(b)]
            for a, b in zip(new[0][:-1], new[0][1:], strict=True)
            for r in new[1][int(a) : int(b)]
        )
        (share,) = lines[5 + 8 * int(number)]["refresh"]["changed"].values()
        assert share == pytest.approx(fresh / len(new[1])) and share > 0.5
    for step, examples in used.items():
        offsets, row, *_ = kept["0" if step < 13 else "1" if step < 21 else "2"]
        for example, rows in examples:
            listed = row[int(offsets[example]) : int(offsets[example + 1])].tolist()
            places = [listed.index(r) for r in rows]
            assert places[1] == places[0] + 1 and places[0] % 2 == 0
            if step in (13, 21):  # anew
                assert places[0] == 0
    assert sum(x["negatives"]["retrieval"]["replaced"] for x in lines if "negatives" in x) > 20
    state = json.loads(runs[0]["checkpoints/step-000025/state.json"])
    assert state["refresh"]["table"] == "negatives-000016" and not state["refresh"]["weights"]


def test_the_miner_of_a_recipe_mines(
    store: Store, ranked: Path, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """The command that the pipeline and `embkit finetune` give: `embkit mine`, by its own rules."""
    given = from_table(
        {"mine": {"k": 12, "percent_of_positive": 1.0, "near_duplicate": 0.9}}, where="test"
    )
    chosen = pipeline.miner(given, store.path)
    words = list(chosen.command(tmp_path / "model", tmp_path / "out"))
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    assert load("quickstart", overrides=settings).mine == given.mine
    assert words[2:6] == ["embkit", "mine", str(tmp_path / "model"), str(store.path)]
    if not os.environ.get("EMBKIT_TEST_FULL"):
        return  # a process that imports torch costs seconds
    finetune(
        make_encoder(layers=1), store, negatives=ranked, refresh=chosen, out=tmp_path / "run",
        **{**SETTINGS, "steps": 14},
    )  # fmt: skip
    lines = (tmp_path / "run/log.jsonl").read_text().splitlines()
    swapped = json.loads(lines[13])["refresh"]
    assert swapped["weights"] == 8 and swapped["changed"]["retrieval"] > 0.5


def test_a_preempted_run_goes_on_with_the_same_bits(
    store: Store,
    ranked: Path,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM before, while waiting for, and after a table; the weights come from the disk."""
    real = refresh.Refresh.wait
    stops = [1, 2]

    def wait(self: Any, number: int, idle: Any) -> float:
        if stops and number == stops[0]:
            stops.pop(0)
            signal.raise_signal(signal.SIGTERM)
        return real(self, number, idle)

    def run(out: Path, late: float) -> None:
        finetune(
            make_encoder(layers=1, dropout=0.1), store, negatives=ranked,
            refresh=miner(store, late), out=out, **SETTINGS,
        )  # fmt: skip

    run(tmp_path / "whole", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(refresh.Refresh, "wait", wait)
        for _ in range(2):
            with pytest.raises(Preempted, match=r"stopped after step (11|19) of 26"):
                run(tmp_path / "run", 0.3)
    run(tmp_path / "run", 0.3)
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_what_goes_wrong(
    store: Store,
    ranked: Path,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
) -> None:
    def run(miner: Miner | None, **settings: Any) -> None:
        finetune(
            make_encoder(layers=1), store, negatives=ranked, refresh=miner, out=tmp_path / "run",
            **{**SETTINGS, "steps": 14, **settings},
        )  # fmt: skip

    with pytest.raises(UsageError, match="nothing that mines"):
        run(None)
    with pytest.raises(UsageError, match="refresh_lag = 9"):
        run(miner(store), refresh_lag=9)
    says = "import sys; sys.exit('no such corpus')"
    with pytest.raises(EmbkitError, match="step 8 ended with 1 .* no such corpus"):
        run(Miner(command=lambda model, out: [sys.executable, "-c", says]))
    (partial,) = tmp_path.glob(".partial-run-*")
    assert (partial / "checkpoints/LATEST").read_text() == "step-000010\n"
    weights = partial / "refresh/weights-000008/model/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match="not the one that was published"):
        run(miner(store))
    weights.write_bytes(data)
    run(miner(store))
    assert container.read_manifest(tmp_path / "run", kind="embkit.run")
