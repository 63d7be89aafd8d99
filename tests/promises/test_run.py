"""Promises of a whole run: killed anywhere it goes on to the same bits; skipped when it is done."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import TINY, full_count

from embkit import pipeline, recipe

pytestmark = pytest.mark.promise


@pytest.fixture(scope="module")
def recipe_file(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    data = f"data.path={json.dumps(str(small_data))}"
    recipe.save(recipe.load("quickstart", overrides=[data, *TINY]), path)
    return path


@pytest.fixture(scope="module")
def finished(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    pipeline.run(recipe_file, out=out)
    return out


def fingerprint(out: Path) -> dict[str, str]:
    """What must be bit-identical: losses, every tensor file, tables, scores. Not timings."""
    kept = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if not path.is_file() or "/checkpoints/" in name:
            continue
        if path.suffix in (".safetensors", ".jsonl") or path.name in ("result.json", "recipe.toml"):
            kept[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return kept


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.mark.timeout(1200)
def test_kill_and_resume_of_the_whole_run(
    recipe_file: Path, finished: Path, tmp_path: Path
) -> None:
    """P4 for the run: aimed SIGKILLs over all stages, then the same bits as without any."""
    kills = full_count(200, 24)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_run.py")), str(tmp_path / "runs"),
         str(recipe_file), str(kills), "7"],
        capture_output=True, text=True, timeout=1100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "plain"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    landed = Counter(report["landed"])
    print(f"{kills} kills in {report['runs']} runs landed in {dict(landed)}")
    assert sum(landed.values()) == kills
    assert len(landed) >= 6, f"the kills fell on too few stages: {landed}"
    for i in range(report["runs"]):
        out = tmp_path / "runs" / str(i)
        assert not differing(fingerprint(finished), fingerprint(out))
        left = [p for p in out.rglob("*") if ".partial" in p.name or ".tmp" in p.name]
        assert not left


def test_a_finished_run_is_skipped_and_changes_nothing(finished: Path, recipe_file: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    result = (finished / "result.json").read_bytes()
    pipeline.run(recipe_file, out=finished)
    exported = finished / "model"
    after = {p: p.stat().st_mtime_ns for p in finished.rglob("*.safetensors")}
    changed = {p for p in before if before[p] != after.get(p) and exported not in p.parents}
    assert not changed
    assert (finished / "result.json").read_bytes() == result


def test_the_resolved_recipe_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    """P13: two data threads, another hash seed, another process: the same bits."""
    resolved = (
        (finished / "recipe.toml").read_text().replace("data_threads = 1", "data_threads = 2")
    )
    (tmp_path / "again.toml").write_text(resolved)
    done = subprocess.run(
        [sys.executable, "-m", "embkit", "run", str(tmp_path / "again.toml"), "--out",
         str(tmp_path / "run")],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = differing(fingerprint(finished), fingerprint(tmp_path / "run"))
    assert found == ["recipe.toml"]


def test_from_redoes_a_stage_and_those_after_it(finished: Path, recipe_file: Path) -> None:
    before = fingerprint(finished)

    def stamp(name: str) -> tuple[int, int]:  # a file system may give an inode's number again
        stat = (finished / name).stat()
        return stat.st_ino, stat.st_mtime_ns

    stamps = {name: stamp(name) for name in before}
    pipeline.run(recipe_file, out=finished, from_stage="mine")
    assert not differing(before, fingerprint(finished))
    redone = {n.split("/")[0] for n in before if stamp(n) != stamps[n]}
    assert {"mined", "ft-0", "soup", "scores"} <= redone
    assert not redone & {"records", "clean", "store", "pre"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_output_is_noticed_and_redone(
    tiny_recipe: Callable[..., Any], tmp_path: Path, damage: str
) -> None:
    """A published file that changed is never trusted: its stage runs again."""
    from embkit import data
    from embkit.pipeline import data_folder, dedup_options, training_files

    chosen = tiny_recipe()
    folder = data_folder(chosen)
    records = data.read(training_files(folder)).save(tmp_path / "records")
    data.dedup(records, out=tmp_path / "clean", **dedup_options(chosen))
    victim = sorted((tmp_path / "clean").glob("raw-*.safetensors"))[0]
    whole = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    elif damage == "truncate":
        victim.write_bytes(whole[:-1])
    else:
        victim.unlink()
    data.dedup(records, out=tmp_path / "clean", **dedup_options(chosen))
    assert victim.read_bytes() == whole
