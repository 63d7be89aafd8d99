"""Recipes: TOML in and out without loss, and errors that name the nearest key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from embkit import recipe
from embkit.errors import UsageError


def test_every_builtin_recipe_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    assert "quickstart" in recipe.builtin()
    for name in recipe.builtin():
        loaded = recipe.load(name)
        recipe.save(loaded, tmp_path / "resolved.toml")
        assert recipe.load(tmp_path / "resolved.toml") == loaded


def test_the_resolved_recipe_holds_every_value(tmp_path: Path) -> None:
    loaded = recipe.load("quickstart", overrides=["model.hidden=64", "model.heads=2"])
    recipe.save(loaded, tmp_path / "r.toml")
    table = recipe.read_table(tmp_path / "r.toml")
    for field in dataclasses.fields(recipe.Train):
        assert field.name in table["prefinetune"], field.name
    assert table["model"]["hidden"] == 64


def test_overrides_take_toml_values_and_bare_words() -> None:
    loaded = recipe.load(
        "quickstart",
        overrides=["finetune.lr=3", "dedup.action=mark", "finetune.tasks={sts = 2}"],
    )
    assert loaded.finetune.lr == 3.0
    assert isinstance(loaded.finetune.lr, float)
    assert loaded.dedup.action == "mark"
    assert loaded.finetune.tasks == {"sts": 2.0}


def test_a_run_is_the_common_settings_with_its_own_over_them() -> None:
    loaded = recipe.from_table({"finetune": {"lr": 0.5}, "runs": [{"seed": 3}, {"lr": 0.25}]})
    assert loaded.run_config(0) == dataclasses.replace(loaded.finetune, seed=3)
    assert loaded.run_config(1) == dataclasses.replace(loaded.finetune, lr=0.25)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"finetun": {}}, "did you mean 'finetune'"),
        ({"finetune": {"stepz": 1}}, "did you mean 'steps'"),
        ({"finetune": {"steps": 1.5}}, "Expected int"),
        ({"finetune": {"steps": 0}}, "not positive"),
        ({"finetune": {"steps": True}}, "Expected int"),
        ({"finetune": 3}, "must be a table"),
        ({"model": {"dims": []}}, "no positive width"),
        ({"model": {"hidden": 65}}, "no multiple"),
        ({"model": {"pooling": "max"}}, "pooling"),
        ({"dedup": {"threshold": 0.0}}, "out of range"),
        ({"dedup": {"action": "murge"}}, "did you mean 'merge'"),
        ({"runs": []}, "no [[runs]]"),
        ({"runs": [{"sead": 1}]}, "did you mean 'seed'"),
        ({"finetune": {"betas": [0.9]}}, "Expected 2 values"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(table: dict, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe.from_table(table)
    assert says in str(caught.value)


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[finetune]\nlr = = 3\n")
    with pytest.raises(UsageError, match="line 2") as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)


def test_an_extending_recipe_names_its_own_tasks(tmp_path: Path) -> None:
    """Those of the recipe below would be tasks that the data lack."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'extends = "gecko"\nprefinetune = { steps = 7, tasks = { web = 1.0 } }\n'
        '[tasks]\nclassification = "off"\nweb = {}\n[finetune.losses]\nclassification = "off"\n'
    )
    loaded = recipe.load(path)
    assert loaded.prefinetune.tasks == {"web": 1.0} and loaded.prefinetune.steps == 7
    assert loaded.prefinetune.batch_size == recipe.load("gecko").prefinetune.batch_size
    assert set(loaded.tasks) == {"web"} and not loaded.finetune.losses
    off = ["tasks.classification=off", "finetune.losses.classification=off"]
    assert not recipe.load("gecko", overrides=off).tasks
    with pytest.raises(UsageError, match="must be a table"):
        recipe.load("gecko", overrides=["tasks.nowhere=off"])
