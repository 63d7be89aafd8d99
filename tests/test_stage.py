"""Stages: whole or absent, free when done, alone at work, and clean after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from embkit import _rust, stage
from embkit.container import read_manifest, write_manifest
from embkit.errors import CorruptError, FormatError, UsageError


def run(out: Path, *, value: int = 1, inputs: tuple[Path, ...] = (), fresh: bool = False) -> bool:
    """A stage that writes its parameter; returns whether it had to work."""
    with stage.stage(out, name="test", params={"value": value}, inputs=inputs, fresh=fresh) as work:
        if work.done:
            return False
        (work.dir / "sub").mkdir(exist_ok=True)
        _rust.publish_file(str(work.dir / "sub" / "value.txt"), str(value).encode())
        work.publish({"counts": {"values": 1}})
        return True


def test_a_stage_works_once_and_again_when_anything_it_depends_on_changes(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("one")
    out = tmp_path / "out"
    assert run(out, inputs=(source,))
    assert not run(out, inputs=(source,))
    source.write_text("two")
    assert run(out, inputs=(source,))
    assert run(out, value=2, inputs=(source,))
    assert (out / "sub" / "value.txt").read_text() == "2"
    assert run(out, value=2, inputs=(source,), fresh=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".partial")] == []


def test_a_killed_writers_temporary_file_is_never_published(tmp_path: Path) -> None:
    """Found by the kill test: a temporary file became part of the output."""
    out = tmp_path / "out"
    with (
        pytest.raises(RuntimeError, match="stop"),
        stage.stage(out, name="test", params={"value": 1}) as work,
    ):
        for folder in (work.dir, work.dir / "sub"):
            folder.mkdir(exist_ok=True)
            # A process that is gone by now had opened a temporary file here.
            code = (
                "import pathlib, sys; from embkit import _rust; "
                "pathlib.Path(_rust.temp_path(sys.argv[1])).write_bytes(b'half')"
            )
            target = str(folder / "value.safetensors")
            subprocess.run([sys.executable, "-c", code, target], check=True)
        assert len([p for p in work.dir.rglob("*.tmp")]) == 2
        raise RuntimeError("stop")
    assert run(out)
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "manifest.json",
        "sub/value.txt",
    }


def test_what_a_kill_after_publishing_leaves_is_cleaned_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    left = stage.partial_dir(out, read_manifest(out)["digest"])
    left.mkdir()
    (left / "old.txt").write_text("old")
    assert not run(out)
    assert not left.exists()


def test_two_executors_of_one_stage_do_its_work_once(tmp_path: Path) -> None:
    worked: list[bool] = []
    threads = [
        threading.Thread(target=lambda: worked.append(run(tmp_path / "out"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(worked) == [False, False, False, True]


def test_waiting_for_a_directory_that_is_published_again_and_again(tmp_path: Path) -> None:
    """A lock is taken whatever moment its directory goes and comes: no errors, one holder."""
    work, holders, errors = tmp_path / "work", [0], []

    def hold() -> None:
        try:
            for _ in range(500):
                lock = stage._lock(work)
                holders[0] += 1
                assert holders[0] == 1
                holders[0] -= 1
                work.rename(tmp_path / f"out-{threading.get_ident()}")
                (tmp_path / f"out-{threading.get_ident()}").rmdir()
                os.close(lock)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors


@pytest.mark.parametrize("name", ["sub/value.txt", "manifest.json"])
def test_every_flipped_bit_of_an_output_is_noticed(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(out)
    digest = read_manifest(out)["digest"]
    path = out / name
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        assert not stage.is_done(out, digest), f"byte {i} of {name}"
    path.write_bytes(whole)
    assert stage.is_done(out, digest)


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(out)
    manifest = read_manifest(out)
    manifest["files"]["../elsewhere.txt"] = manifest["files"]["sub/value.txt"]
    (tmp_path / "elsewhere.txt").write_text("1")
    with pytest.raises(CorruptError, match="outside"):
        stage.check_files(out, manifest)


def test_wrong_outputs_and_parameters(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="not written by embkit"):
        run(tmp_path / "theirs")
    with (
        pytest.raises(UsageError, match="local directories"),
        stage.stage("s3://bucket/out", name="test", params={}),
    ):
        pass
    with (
        pytest.raises(UsageError, match="no JSON value"),
        stage.stage(tmp_path / "out", name="test", params={"x": float("nan")}),
    ):
        pass
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "out", inputs=(tmp_path / "missing",))


def test_an_output_of_a_newer_embkit_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(out)
    manifest = read_manifest(out)
    manifest.pop("crc32c", None)
    write_manifest(out, {**manifest, "version": 99, "embkit": "7.8.9"})
    before = (out / "manifest.json").read_bytes()
    for value in (1, 2):
        with pytest.raises(FormatError, match=r"7\.8\.9"):
            run(out, value=value)
    assert (out / "manifest.json").read_bytes() == before
    assert run(out, value=2, fresh=True)  # when the user says so
