"""Plots of scores: every number from the result, drawn by matplotlib, the same bytes each time."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_scores import scores

from embkit.errors import CorruptError, UsageError
from embkit.report import load_results, save_plots
from embkit.report.plots import plots


@pytest.fixture
def result() -> dict[str, Any]:
    models = {
        "untrained": scores(11.13, bm25=True),
        "pre-finetuned": scores(52.31),
        "soup, greedy": scores(61.93),
    }
    tested = {k: copy.deepcopy(v) for k, v in models.items() if k != "untrained"}
    return {"recipe": "quickstart", "dims": [128, 32], "scores": {"dev": models, "test": tested}}


def test_the_lines_are_the_figures_of_the_result(result: dict[str, Any]) -> None:
    found = {plot.name: plot for plot in plots(result, "test")}
    assert list(found) == [
        "width-mean", "width-retrieval", "width-sts", "width-classification", "stages",
    ]  # fmt: skip
    models = result["scores"]["test"]
    for kind in ("retrieval", "sts", "classification"):
        for line in found[f"width-{kind}"].lines:
            assert dict(zip(line.x, line.y, strict=True)) == {
                float(w): v for w, v in models[line.name]["types"][kind].items()
            }
    assert [line.name for line in found["width-mean"].lines] == list(models)
    stages = {line.name: line.y for line in found["stages"].lines}
    assert stages["Retrieval, nDCG@10"] == [m["types"]["retrieval"]["128"] for m in models.values()]
    # Random weights would flatten the lines over widths; the stages have them, with BM25.
    over = {plot.name: plot for plot in plots(result, "dev")}
    assert "untrained" not in [line.name for line in over["width-mean"].lines]
    assert over["stages"].note.startswith("1 untrained, 2 pre-finetuned")
    assert over["stages"].lines[-1].y == [83.91, 83.91]


def test_what_is_missing_is_a_gap(result: dict[str, Any]) -> None:
    del result["scores"]["test"]["pre-finetuned"]["types"]["sts"]
    found = {plot.name: plot for plot in plots(result, "test")}
    line = next(x for x in found["width-sts"].lines if x.name == "pre-finetuned")
    assert all(math.isnan(y) for y in line.y)


def test_png_files(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = save_plots(result, tmp_path / "a")
    assert len(made) == 2 * 5 and {p.name.split("-")[0] for p in made} == {"dev", "test"}
    for path in made:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
    again = save_plots(result, tmp_path / "b")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in made]
    result["scores"]["test"]["soup, greedy"]["mean"]["128"] += 5
    other = save_plots(result, tmp_path / "c")
    changed = {p.name for p, q in zip(made, other, strict=True) if p.read_bytes() != q.read_bytes()}
    assert changed == {"test-width-mean.png"}


def test_without_matplotlib_the_error_says_what_to_install(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match="embkit\\[plots\\]"):
        save_plots(result, tmp_path)


def test_results_of_a_run_and_of_evaluations(result: dict[str, Any], tmp_path: Path) -> None:
    def write(name: str, content: Any) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(content))
        return tmp_path / name

    run = write("run", result)
    assert load_results([run]) == result
    one, two = write("one", scores(50.0)), write("two", scores(60.0))
    both = load_results([one, two])
    assert both["dims"] == [128, 32] and list(both["scores"]["scores"]) == ["one", "two"]
    lines = plots(both, "scores")[0].lines
    assert [line.name for line in lines] == ["one", "two"]
    assert lines[1].y == [scores(60.0)["mean"]["32"], scores(60.0)["mean"]["128"]]
    with pytest.raises(UsageError, match="one run, or of evaluations"):
        load_results([run, one])
    with pytest.raises(UsageError, match="one run, or of evaluations"):
        load_results([one, one])
    with pytest.raises(CorruptError, match=r"No result\.json"):
        load_results([tmp_path])
    with pytest.raises(CorruptError, match="has no scores"):
        load_results([write("empty", {})])


def test_tasks_of_mteb_have_a_line_a_precision(tmp_path: Path) -> None:
    by = {"float": 61.5, "int8": 61.25}
    content = {
        "tasks": {},
        "types": {"sts": {"64": by}, "bitext": {"64": {"float": 40.0, "int8": 39.5}}},
        "mean": {"64": by},
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "result.json").write_text(json.dumps(content))
    found = {p.name: p for p in plots(load_results([tmp_path / "model"]), "scores")}
    assert list(found) == ["width-mean", "width-sts", "width-bitext", "stages"]
    lines = {line.name: line.y for line in found["width-bitext"].lines}
    assert lines == {"model": [40.0], "model, int8": [39.5]}
