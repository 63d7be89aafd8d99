"""The group `recipes` on a small data folder: cells are kept, scored as `evaluate` does, and held
out groups stay out of training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from embkit.bench import Reported
from embkit.bench import recipes_ablations as group
from embkit.bench import recipes_data as real
from embkit.bench import recipes_quality as contest
from embkit.bench.recipes_cells import PROBE, Cell, World
from embkit.bench.recipes_rows import QUICK, REAL

TINY = replace(
    QUICK, model={**QUICK.model, "hidden": 16, "dims": (16, 8)}, vocab=300,
    prefinetune={**QUICK.prefinetune, "steps": 2, "batch_size": 16},
    finetune={**QUICK.finetune, "steps": 2, "batch_size": 8},
)  # fmt: skip


@pytest.fixture(scope="module")
def world(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("recipes"), small_data, TINY)


def test_a_cell_is_kept_and_not_trained_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(train={"tasks": TINY.shares()}, dims=(16, 8))
    first = world.result(cell)
    monkeypatch.setattr(World, "_train", lambda *_, **__: pytest.fail("trained again"))
    again = World(world.home, world.data, TINY)
    assert again.result(cell) == first
    assert world.path(replace(cell, seed=1)) != world.path(cell)
    assert again.trained(replace(cell, split="test", dims=())) == world.trained(cell)
    other = World(world.home, world.data, replace(TINY, rules={"k": 9, "candidates": 32}))
    assert other.path(cell) != world.path(cell)


def test_scores_are_those_of_evaluate(world: World) -> None:
    from embkit.evaluate import MAIN, evaluate
    from embkit.model import Encoder

    cell = Cell(train={"tasks": TINY.shares()}, dims=(16, 8))
    got = world.result(cell)
    model = Encoder.from_pretrained(world.trained(cell)[0])
    want = evaluate(model, world.data / "dev", dims=(16, 8), bm25=False)
    for width in ("16", "8"):
        assert got["scores"][width] == pytest.approx(
            {kind: want["types"][kind][width] for kind in MAIN}, abs=1e-4
        )
        assert set(got["items"][width]) == {"retrieval", "classification"}
        for kind, sets in got["items"][width].items():
            for name, values in sets.items():
                measure = want["tasks"][name]["widths"][width][MAIN[kind]]
                assert np.mean(values) == pytest.approx(measure, abs=1e-3)


def test_a_row_has_the_mean_of_kinds_and_the_difference(world: World) -> None:
    one = group.ablations(TINY)["uniform"]
    case = group.ablation(world, "uniform", one, seeds=(0, 1))
    on = [world.result(replace(one.on, seed=s)) for s in (0, 1)]
    off = [world.result(replace(one.off, seed=s)) for s in (0, 1)]
    value = case.ours()
    assert isinstance(value, Reported)
    assert value.value == pytest.approx(np.mean([list(r["scores"]["16"].values()) for r in on]))
    means = [np.mean([r["scores"]["16"]["retrieval"] for r in rows]) for rows in (on, off)]
    assert case.facts["difference"] == pytest.approx(means[0] - means[1], abs=1e-3)
    low, high = case.facts["interval"]
    assert low <= case.facts["difference"] <= high and case.facts["difference_of"] == "retrieval"


def test_a_soup_is_the_mean_of_its_runs(world: World) -> None:
    from safetensors.numpy import load_file

    cell = Cell(train={"tasks": TINY.shares()}, soup=(0, 1))
    made = world.trained(cell)[0] / "model.safetensors"
    members = [
        load_file(world.trained(replace(cell, soup=(), seed=s))[0] / "model.safetensors")
        for s in cell.soup
    ]
    for name, value in load_file(made).items():
        np.testing.assert_allclose(value, (members[0][name] + members[1][name]) / 2, atol=1e-7)


def test_a_budget_sets_the_steps(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget, less what was spent before, over the cost of a step in the probe."""
    seen: list[tuple[int, str]] = []

    def train(
        self: World, cell: Cell, settings: Any, out: Path, begin: Path, **_: Any
    ) -> tuple[float, float]:
        seen.append((settings["steps"], begin.parent.name))
        return 0.5 + 0.1 * (settings["steps"] - 1), 0.5

    monkeypatch.setattr(World, "_train", train)
    monkeypatch.setattr(World, "score", lambda *_: {})
    before = world.tokenizing()
    for seed in (0, 1):
        world.result(Cell(train={"lr": 0.5}, mined=False, budget=60.0, seed=seed))
    want = round((60 - before - 0.5) / 0.1)
    assert seen == [(PROBE, "pre"), (want, "pre"), (want, "pre")]  # one probe for both seeds
    seen.clear()
    first = {"share": 0.75, "batch_size": 32}
    cell = Cell(train={"lr": 0.5, "first": first}, mined=False, budget=60.0, start="random")
    found = world.result(cell)
    long, short = (round((share * (60 - before) - 0.5) / 0.1) for share in (0.75, 0.25))
    assert [steps for steps, _ in seen] == [PROBE, PROBE, long, short]
    assert seen[2][1] == "random" and seen[3][1] == f"{world.path(cell).stem}-first"
    assert found["steps"] == long + short
    assert found["cpu"] == pytest.approx(before + 0.1 * (long + short - 2) + 1.0, abs=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as EMBKIT_REAL_DATA names one, with made-up rows."""
    home = tmp_path_factory.mktemp("real")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        path = home / f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(zstandard.compress(text.encode()))

    for name in {*real.PRE, *real.FINE}:
        kind = "prefinetune" if name in real.PRE else "finetune"
        rows = [
            {"query": f"{name} query {i}", "positive": f"p{i // 3} passage of {name}", "lang": "en"}
            for i in range(240)
        ]
        write(f"pairs/{kind}/{name}.en", rows)
    for split in ("train", "dev", "test"):
        pair = {"sentence1": f"{split} a", "sentence2": "b", "score": 1}
        write(f"sts/stsb-en.{split}", [pair, {**pair, "score": 2}])
    for name in real.LABELS:
        for split in ("train", "test"):
            rows = [{"text": f"{split} {name} {i}", "label": i % 3} for i in range(300)]
            write(f"classification/{name}.{split}", rows)
    for name in real.TEST:
        write(f"retrieval/{name}/corpus", [{"_id": "1", "title": "", "text": "t"}])
        write(f"retrieval/{name}/queries", [{"_id": "2", "text": "t"}])
        write(f"retrieval/{name}/qrels", [{"query_id": "2", "corpus_id": "1", "score": 1}])
    return home


def test_groups_are_held_out_whole(folder: Path, tmp_path: Path) -> None:
    from embkit.data.readers import read_jsonl
    from embkit.evaluate import load_split

    out = real.build(folder, tmp_path / "data")
    dev = {found.name: found for found in load_split(out / "dev")}
    for name in real.HELD:
        held: Any = dev[f"retrieval/{name}"]
        rows = read_jsonl(out / "train" / f"{name}.jsonl")
        assert 5 <= len(rows) / 240 * 16 <= 16 and held.queries
        groups = {real.group(name, row) for row in rows}
        assert not groups & {real.group(name, {"positive": text}) for text in held.corpus}
        assert len(held.queries) == 240 - len(rows)
        right = [held.corpus[next(iter(found))] for found in held.judged]
        place = {f"{name} query {i}": f"p{i // 3} passage of {name}" for i in range(240)}
        assert right == [place[query] for query in held.queries]
    for name in real.LABELS:
        found: Any = dev[f"classification/{name}"]
        texts = {row["text"] for row in read_jsonl(out / "train" / f"{name}.jsonl")}
        assert found.test and not texts & set(found.test)
        assert max(map(found.train_label.count, set(found.train_label))) <= 40


def test_noise_moves_positives_of_a_third(folder: Path, tmp_path: Path) -> None:
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(3000)]
    noisy = real.noisy("medquad", rows)
    wrong = sum(a["positive"] != b["positive"] for a, b in zip(rows, noisy, strict=True))
    assert wrong == pytest.approx(1000, abs=100)
    assert sorted(r["positive"] for r in noisy) == sorted(r["positive"] for r in rows)
    assert real.noisy("wordnet", rows) == rows


def test_ours_tries_no_more_settings() -> None:
    assert len(contest.OURS) < len(contest.GRID) == 6


def test_the_table_says_what_the_interval_says() -> None:
    from embkit.bench.recipes_table import table

    row = {
        "name": "recipes.soup", "peer": "best run", "expected": "better (X)",
        "difference": 0.5, "difference_of": "retrieval", "interval": [0.1, 0.9],
        "kinds_mean_sd": {
            "embkit": {"retrieval": [61.5, 0.25]}, "best run": {"retrieval": [61]},
        },
    }  # fmt: skip
    same, worse = {**row, "interval": [-0.1, 0.9]}, {**row, "interval": [-0.9, -0.1]}
    lines = table([row, same, worse]).splitlines()
    assert lines[0] == "| row | nDCG@10, with / without | gained (95%) | papers | seen |"
    assert lines[2] == (
        "| soup | 61.5 ± 0.2 / 61.0 | nDCG@10 +0.50 (+0.10 to +0.90) | better (X) | better |"
    )
    assert lines[3].endswith("| no difference seen |") and lines[4].endswith("| worse |")
    assert lines[1].count("|") == lines[0].count("|")


def test_mixtures_by_rule() -> None:
    plan = replace(TINY, fine=("a", "b"), sts=("s",), labels=("x", "y"))
    sizes = {"a": 900, "b": 100, "s": 5, "x": 7, "y": 9, "other": 1}
    assert plan.mixture("uniform", sizes) == dict.fromkeys("absxy", 1.0)
    assert plan.mixture("size", sizes) == {k: float(sizes[k]) for k in "absxy"}
    found = plan.mixture("size, 0.8", sizes)
    assert found == pytest.approx({"a": 0.6, "b": 0.2, "s": 0.1, "x": 0.05, "y": 0.05})


def test_settings_of_every_row_are_settings() -> None:
    from embkit.recipe import Train
    from embkit.recipe.schema import build

    plan = REAL
    cells = [cell for one in group.ablations(plan).values() for cell in (one.on, one.off)]
    cells += [contest.our_cell(more, 1.0) for more in contest.OURS]
    for cell in cells:
        settings = {**plan.finetune, **cell.train, "tasks": {}}
        first = settings.pop("first", {"share": 0.0})
        build(Train, {k: v for k, v in {**plan.prefinetune, **first}.items() if k != "share"}, "")
        made = build(Train, settings, "cell")
        parts = [part.hard_negatives for part in made.parts]
        assert cell.mined == any([made.hard_negatives, *parts])


@pytest.mark.parametrize("first", [False, True])
def test_the_chosen_settings_keep_their_budget(
    world: World, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Whole runs that cost a quarter more than the probe said get fewer steps, in both stages."""
    seen: list[int] = []

    def train(
        self: World, cell: Cell, settings: Any, out: Path, begin: Path, **_: Any
    ) -> tuple[float, float]:
        seen.append(settings["steps"])
        step = 0.1 if settings["steps"] == PROBE else 0.125
        return 0.5 + step * (settings["steps"] - 1), 0.5

    monkeypatch.setattr(World, "_train", train)
    settings: dict[str, Any] = {"lr": 0.25, "first": {"share": 0.5}} if first else {"lr": 0.25}
    cell = Cell(train=settings, mined=False, start="random", budget=60.0)
    hopeful = world.trained(cell)[1]
    assert hopeful["cpu"] > 70
    seen.clear()
    found = world.trained(contest.kept(world, cell))[1]
    assert found["cpu"] == pytest.approx(60, rel=0.01)
    assert sum(seen[-2:] if first else seen[-1:]) == found["steps"] < hopeful["steps"]
