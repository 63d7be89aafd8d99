"""The search of a mixture: what is tried, what is repeated, and what comes out of it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import full_count

from embkit import pipeline, recipe, simplex
from embkit.data import Store
from embkit.errors import UsageError
from embkit.evaluate import evaluate
from embkit.mix import (
    _candidates,
    best,
    fragment,
    normalised,
    search_mixture,
    steps_to_converge,
)
from embkit.model import Encoder
from embkit.recipe import Mix, Train
from embkit.train import finetune

drawn = functools.partial(simplex.drawn, least=0.01)
grid = functools.partial(simplex.grid, least=0.01)

FIRST = {"a": 0.5, "b": 0.3, "c": 0.2}
FAST = Train(steps=2, batch_size=16, lr=5e-3, token_budget=2048, tasks={"retrieval": 3, "sts": 1})


def test_a_mixture_adds_up_and_has_all_its_tasks() -> None:
    assert normalised({"a": 3, "b": 1}) == {"a": 0.75, "b": 0.25}
    assert normalised({"a": 1, "b": 0}) == {"a": 0.9901, "b": 0.0099}


def test_the_grid_changes_one_task_then_two() -> None:
    found = list(grid(FIRST, (2.0, 0.5)))
    assert found[0] == FIRST and len(found) == 3**3
    assert found[1] == normalised({"a": 1.0, "b": 0.3, "c": 0.2})
    assert found[2] == normalised({"a": 0.25, "b": 0.3, "c": 0.2})
    assert found[7] == normalised({"a": 1.0, "b": 0.6, "c": 0.2})
    # All tasks times two is the first again: the search tries it once.
    tried = list(_candidates(FIRST, Mix(method="grid", candidates=99), []))
    assert len(tried) == len({json.dumps(m, sort_keys=True) for m in tried}) == 19


def test_draws_are_those_of_the_seed_and_spread_as_asked() -> None:
    first = list(itertools.islice(drawn("abc", 3), 400))
    assert first == list(itertools.islice(drawn("abc", 3), 400))
    assert first[:9] != list(itertools.islice(drawn("abc", 4), 9))
    spread = np.std([m["a"] for m in first])
    assert spread == pytest.approx(np.sqrt(1 / 18), rel=0.15)  # of Dirichlet(1, 1, 1)
    narrow = [m["a"] for m in itertools.islice(drawn("abc", 3, 50.0), 400)]
    assert np.std(narrow) < 0.25 * spread


def test_the_model_of_scores_beats_drawing() -> None:
    """On a smooth score with noise, over seeds: nearer to the best with the same budget."""
    goal = np.array([0.7, 0.2, 0.1])

    def gap(method: str, seed: int) -> float:
        rng = np.random.default_rng(seed)
        tried: list[dict[str, Any]] = []
        for weights in _candidates(
            FIRST, Mix(method=method, candidates=18, initial=6, seed=seed), tried
        ):
            distance = float(np.sum((np.array(list(weights.values())) - goal) ** 2))
            tried.append({"weights": weights, "dev": 60 - 40 * distance + rng.normal(0, 0.05)})
        return 60 - max(t["dev"] for t in tried)

    seeds = range(full_count(12, 4))
    model = np.mean([gap("bayes", s) for s in seeds])
    assert model < 0.2 and model < 0.5 * np.mean([gap("dirichlet", s) for s in seeds])


def test_steps_to_converge_of_known_curves() -> None:
    steps = np.arange(200)
    for scale in (5, 15, 40):
        found = steps_to_converge((3 * np.exp(-steps / scale) + 1).tolist())
        means = np.convolve(np.exp(-steps / scale), np.ones(20) / 20, "valid")
        (late,) = np.flatnonzero(means > 0.1 * means[0] + 0.9 * means.min())[-1:]
        assert found == 20 + late + 1
        assert found == pytest.approx(20 + scale * np.log(10), rel=0.12)
    assert steps_to_converge([1.0] * 50) == 5
    with pytest.raises(UsageError, match="9 steps"):
        steps_to_converge([1.0] * 9)


def test_a_search_ranks_runs_that_anybody_can_repeat(
    store: Store, tiny_model: Path, dev: Path, tmp_path: Path
) -> None:
    encoder = Encoder.from_pretrained(tiny_model)
    mix = Mix(method="grid", candidates=3, steps=3, alone=10)
    out = tmp_path / "mix"
    found = search_mixture(encoder, store, out=out, on=dev, config=FAST, mix=mix)
    assert json.loads((out / "result.json").read_text()) == found
    assert found["alone"].keys() == {"retrieval", "sts"}  # topics has no weight in the recipe
    assert found["first"] == normalised(found["alone"])
    scores = [c["dev"] for c in found["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 3
    assert {c["tried"] for c in found["candidates"]} == {1, 2, 3}
    top = found["candidates"][0]
    config = dataclasses.replace(FAST, steps=3, tasks=top["weights"])
    again = evaluate(finetune(encoder, store, out=tmp_path / "again", config=config), dev)
    assert again["mean"]["32"] == top["dev"]
    assert {k: w["32"] for k, w in again["types"].items()} == top["types"]
    assert best(found, 2) == [c["weights"] for c in found["candidates"][:2]]

    # Again after a kill: what is there stays, what is missing comes back with the same bits.
    lost = out / "runs" / found["candidates"][1]["run"]
    log = (lost / "log.jsonl").read_bytes()
    shutil.rmtree(lost)
    (out / "result.json").unlink()
    kept = out / "runs" / top["run"] / "manifest.json"
    before = kept.stat().st_mtime_ns
    assert search_mixture(encoder, store, out=out, on=dev, config=FAST, mix=mix) == found
    assert (lost / "log.jsonl").read_bytes() == log and kept.stat().st_mtime_ns == before


def test_the_result_is_a_part_of_a_recipe(tmp_path: Path) -> None:
    result = {
        "candidates": [{"weights": FIRST}, {"weights": {"a": 0.1, "b": 0.9}}, {"weights": {}}]
    }
    (tmp_path / "r.toml").write_text(fragment(result, 2))
    loaded = recipe.load(tmp_path / "r.toml")
    assert loaded.finetune.tasks == FIRST
    assert [loaded.run_config(i).tasks for i in range(2)] == best(result, 2)


@pytest.mark.parametrize(
    ("config", "mix", "says"),
    [
        (FAST, Mix(), "no budget"),
        (dataclasses.replace(FAST, tasks={"sts": 1}), Mix(candidates=2), "one mixture"),
        (dataclasses.replace(FAST, tasks={"stz": 1}), Mix(candidates=2), "did you mean 'sts'"),
        (dataclasses.replace(FAST, parts=(recipe.Part(),)), Mix(candidates=2), "parts"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    store: Store, tiny_model: Path, tmp_path: Path, config: Train, mix: Mix, says: str
) -> None:
    encoder = Encoder.from_pretrained(tiny_model)
    with pytest.raises(UsageError, match=says):
        search_mixture(encoder, store, out=tmp_path / "m", on=tmp_path, config=config, mix=mix)
    with pytest.raises(UsageError, match="search"):
        recipe.from_table({"mix": {"candidates": 2}, "finetune": {"parts": [{}]}})


def test_a_search_in_several_processes_is_refused(
    store: Store,
    tiny_model: Path,
    tmp_path: Path,
    tiny_recipe: Callable[..., recipe.Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By itself, and in a whole run before its first stage."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    encoder = Encoder.from_pretrained(tiny_model)
    with pytest.raises(UsageError, match="a single process"):
        search_mixture(
            encoder, store, out=tmp_path / "m", on=tmp_path, config=FAST, mix=Mix(candidates=2)
        )
    with pytest.raises(UsageError, match="a single process"):
        pipeline.run(tiny_recipe("mix.candidates=2"), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
