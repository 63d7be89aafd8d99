"""The main job on real rows: what a run leaves behind, and what bad input does to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import TINY, full_count, write_jsonl

from embkit import pipeline
from embkit.pipeline.results import checked

WIDTHS = (40, 24, 8)


@pytest.fixture(scope="module")
def done(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run through the command line."""
    out = tmp_path_factory.mktemp("pipeline") / "run"
    finished = embkit("demo", "--data", str(small_data), "--out", str(out))
    assert finished.returncode == 0, finished.stderr[-3000:]
    (out / "screen.txt").write_text(finished.stdout)
    return out


def embkit(*words: str) -> subprocess.CompletedProcess[str]:
    sets = (
        [part for item in TINY for part in ("--set", item)] if words[0] in ("demo", "run") else []
    )
    return subprocess.run(
        [sys.executable, "-m", "embkit", *words, *sets],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "plain"},
    )  # fmt: skip


def test_the_screen_shows_every_stage_the_table_and_the_three_lines(done: Path) -> None:
    screen = (done / "screen.txt").read_text()
    for i, name in enumerate(pipeline.STAGES, 1):
        assert f"[{i}/{len(pipeline.STAGES)}] {name}" in screen
    for width in WIDTHS:
        assert re.search(rf"\b{width}\b", screen)
    assert "SentenceTransformer(" in screen
    assert "greedy soup: kept" in screen


def test_result_holds_every_model_split_width_and_metric(done: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    models = {"untrained", "pre-finetuned", "soup, uniform", "soup, greedy"}
    for split in ("dev", "test"):
        found = result["scores"][split]
        assert models <= found.keys()
        assert any(name.startswith("fine-tuned") for name in found)
        for name in models:
            text = json.dumps(found[name])
            assert all(f'"{width}"' in text for width in WIDTHS)
            assert all(m in text for m in ("ndcg@10", "recall@", "spearman", "accuracy"))
    assert "bm25" in json.dumps(result["scores"]["test"])


def test_the_numbers_are_those_of_the_exported_model(done: Path, small_data: Path) -> None:
    """Scoring the exported directory again gives result.json's figures of the chosen soup."""
    from embkit.evaluate import evaluate
    from embkit.model import Encoder

    result = json.loads((done / "result.json").read_text())
    again = evaluate(Encoder.from_pretrained(done / "model"), small_data / "test", bm25=False)
    stored = result["scores"]["test"]["soup, greedy"]
    assert json.loads(json.dumps(again))["mean"] == stored["mean"]


def test_the_export_loads_in_sentence_transformers_and_agrees(done: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from embkit.model import Encoder

    texts = ["text editor", "a library for reading compressed archives", "x" * 300]
    theirs = SentenceTransformer(str(done / "model"), device="cpu").encode(texts)
    ours = Encoder.from_pretrained(done / "model").encode(texts)
    assert np.abs(theirs - ours).max() <= 2e-6
    result = json.loads((done / "result.json").read_text())
    assert result["export"]["max_abs_difference"] <= 2e-6


def test_the_report_is_self_contained_and_shows_the_numbers(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!#)', page), "the report loads something"
    assert "<svg" in page
    assert "pre-finetuned" in page


def test_training_losses_fall(done: Path) -> None:
    lines = [json.loads(line) for line in (done / "pre" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["task"] == "retrieval"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_inspect_and_verify_read_every_output(done: Path) -> None:
    for name in ("records", "clean", "store", "pre", "mined", "ft-0", "soup"):
        shown = embkit("inspect", str(done / name))
        assert shown.returncode == 0, shown.stderr
        assert "embkit." in shown.stdout
    whole = embkit("verify", str(done))
    assert whole.returncode == 0, whole.stderr
    assert "all checksums match" in whole.stdout


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_verify_names_a_flipped_bit(done: Path, tmp_path: Path, where: str) -> None:
    store = tmp_path / "store"
    shutil.copytree(done / "store", store)
    shard = sorted(store.glob("texts-*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    at = {"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}[where]
    raw[at] ^= 0x10
    shard.write_bytes(raw)
    found = embkit("verify", str(store))
    assert found.returncode == 3
    assert shard.name in found.stderr
    trained = embkit("prefinetune", str(store), "--out", str(tmp_path / "pre"))
    assert trained.returncode == 3
    assert shard.name in trained.stderr
    assert not (tmp_path / "pre").exists()


Spoil = Callable[[Path], Any]


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"query": f"question {i}", "positive": f"the answer number {i}"} for i in range(count)]


BAD_FOLDERS: dict[str, tuple[Spoil, int, str]] = {
    "missing dev": (lambda d: shutil.rmtree(d / "dev"), 2, "dev/"),
    "no training file": (lambda d: shutil.rmtree(d / "train") or (d / "train").mkdir(), 2, "train"),
    "empty file": (
        lambda d: (d / "train" / "retrieval.jsonl").write_text(""),
        3,
        "retrieval.jsonl",
    ),
    "wrong columns": (
        lambda d: write_jsonl(d / "train" / "retrieval.jsonl", [{"left": "a", "right": "b"}] * 9),
        3,
        "left",
    ),
    "too many rejected": (
        lambda d: write_jsonl(d / "train" / "retrieval.jsonl", [*_rows(50), *[{"query": " "}] * 9]),
        3,
        "retrieval.jsonl",
    ),
    "truncated zst": (
        lambda d: (d / "train" / "more.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\x51"),
        3,
        "more.jsonl.zst",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_data_folder_gives_one_screen_and_leaves_nothing(
    small_data: Path, tmp_path: Path, name: str
) -> None:
    spoil, code, says = BAD_FOLDERS[name]
    shutil.copytree(small_data, tmp_path / "data")
    spoil(tmp_path / "data")
    found = embkit("demo", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"))
    assert found.returncode == code, found.stderr
    assert says in found.stderr
    assert "fix:" in found.stderr
    assert "Traceback" not in found.stderr
    assert len(found.stderr.splitlines()) <= 30
    published = [p for p in (tmp_path / "run").glob("*") if p.is_dir() and p.name[0] != "."]
    assert not published


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("tokenizer.path=no/such/tokenizer", 2, "no/such/tokenizer"),
        ("model.path=no/such/model", 2, "no/such/model"),
        ("finetune.batch_size=100000", 2, "batch"),
        ("prefinetune.tasks={retrieva = 1}", 2, "retrieva"),
        ("model.heads=5", 2, "model.heads"),
    ],
)
def test_a_wrong_setting_stops_before_training(
    small_data: Path, tmp_path: Path, override: str, code: int, says: str
) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "embkit", "run", "quickstart", "--out", str(tmp_path / "run"),
         *[p for item in (*TINY, f"data.path={json.dumps(str(small_data))}", override)
           for p in ("--set", item)]],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert finished.returncode == code, finished.stderr
    assert says in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_model_directory_without_weights_is_refused(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    found = embkit("export", str(tmp_path / "model"), "--out", str(tmp_path / "copy"))
    assert found.returncode in (2, 3)
    assert "model.safetensors" in found.stderr or "weights" in found.stderr
    assert not (tmp_path / "copy").exists()


def test_an_output_directory_of_something_else_is_left_alone(
    small_data: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "run" / "records"
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("not yours")
    found = embkit("demo", "--data", str(small_data), "--out", str(tmp_path / "run"))
    assert found.returncode == 2
    assert (theirs / "thesis.txt").read_text() == "not yours"


@pytest.mark.skipif(full_count(0, 1), reason="EMBKIT_TEST_FULL=1 searches a soup in a run")
def test_a_searched_soup_mixed_with_its_start_is_what_is_exported(
    done: Path, small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done, run)
    chosen = ("soup.select=search", "soup.candidates=2", "soup.alpha=[0.5, 1.0]")
    sets = [part for item in chosen for part in ("--set", item)]
    finished = embkit("demo", "--data", str(small_data), "--out", str(run), *sets)
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads((run / "result.json").read_text())
    mixed = result["soup"]["mixed"]
    assert {t["alpha"] for t in mixed["alphas"]} == {0.5, 1.0} and mixed["base"]["run"] == "pre"
    assert {"soup, search", "soup, mixed with the start"} <= set(result["scores"]["dev"])
    best = result["scores"]["dev"]["soup, mixed with the start"]["mean"]["40"]
    assert best == mixed["dev"] >= result["soup"]["search"]["dev"]
    exported = json.loads((run / "model" / "embkit.json").read_text())["digest"]
    assert exported == json.loads((run / "mixed" / "model" / "embkit.json").read_text())["digest"]


def test_an_export_may_differ_as_the_encoder_does_from_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A deep model's float32 rounding is above 2e-6; another model's difference is above that."""

    class Rounded:
        prompts = {"passage": ""}
        max_length = {"query": 8, "passage": 8}

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            return np.full((len(texts), 2), 3e-5 if len(texts) > 1 else 0.0)

    found: dict[float, bool] = {}
    for difference in (1e-6, 1.6e-5, 1e-3):
        monkeypatch.setattr("embkit.model.check_export", lambda *_, d=difference: d)
        said = checked(Rounded(), tmp_path, ["a", "b"])  # type: ignore[arg-type]
        assert said["max_abs_difference"] == difference
        found[difference] = difference <= said["limit"]
    assert found == {1e-6: True, 1.6e-5: True, 1e-3: False}
    monkeypatch.setattr("embkit.model.check_export", lambda *_: None)
    assert checked(Rounded(), tmp_path, ["a"])["max_abs_difference"] is None  # type: ignore[arg-type]
