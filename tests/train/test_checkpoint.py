"""Checkpoints: shards of any number of ranks, writing behind the training, keeping the best."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embkit import _rust, container
from embkit.data import Store
from embkit.errors import CorruptError, EmbkitError, UsageError
from embkit.model import Encoder
from embkit.recipe import Watch
from embkit.train import Callback, checkpoint, prefinetune
from embkit.train.checkpoint import Part, Saver, load, load_latest

SETTINGS: dict[str, Any] = {"steps": 12, "batch_size": 16, "lr": 2e-3, "token_budget": 300}


def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(10, 3, generator=g),
        "half": torch.randn(7, 2, 2, generator=g).bfloat16(),
        "bias": torch.randn(5, generator=g),
        "step": torch.tensor(7.0),
        "small": torch.randn(2, 4, generator=g),
    }


def parts(rank: int, world: int) -> dict[str, Any]:
    """As `fully_shard` cuts: equal chunks of rows, the last ones shorter or empty."""
    out: dict[str, Any] = {}
    for name, value in tensors().items():
        if name in ("bias", "step"):
            out[name] = value
            continue
        chunk = -(-len(value) // world)
        start = min(rank * chunk, len(value))
        out[name] = Part(value=value[start : start + chunk], start=start, shape=value.shape)
    return out


def write(folder: Path, world: int, step: int = 3) -> Path:
    """A checkpoint by so many threads that are ranks, rank 0 first: it waits for the others."""
    savers = [Saver(folder, rank=r, world=world) for r in range(world)]

    def one(rank: int) -> None:
        savers[rank].save(
            step=step, model=parts(rank, world), optimizer={"m": tensors()["bias"]},
            own={f"rng.torch.{rank}": torch.full((3,), rank, dtype=torch.uint8)},
            state={"world": world},
        )  # fmt: skip

    threads = [threading.Thread(target=one, args=(r,)) for r in range(world)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return folder / checkpoint.name_of(step)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, world: int) -> None:
    path = write(tmp_path / "checkpoints", world)
    found = load_latest(path.parent)
    assert found is not None and found.path == path and found.state["world"] == world
    assert sorted(p.name for p in path.parent.iterdir()) == ["LATEST", "step-000003"]
    assert len(list(path.glob("*.safetensors"))) == 2 * world
    assert set(found.model) == set(tensors())
    for name, value in tensors().items():
        assert torch.equal(found.model[name], value) and found.model.shape(name) == value.shape
        assert found.model[name].dtype == value.dtype
    for start, stop in ((0, 10), (0, 3), (2, 9), (5, 5), (9, 10)):
        assert torch.equal(found.model.rows("weight", start, stop), tensors()["weight"][start:stop])
    assert torch.equal(found.optimizer["m"], tensors()["bias"])
    for rank in range(world):
        assert found.optimizer[f"rng.torch.{rank}"].tolist() == [rank] * 3
    found.model["weight"].zero_()  # of its own memory: neither the file nor the next read changes
    assert torch.equal(load(path).model["weight"], tensors()["weight"])


def test_every_file_of_every_rank_counts(tmp_path: Path) -> None:
    """A missing, exchanged or changed shard is noticed, and so are parts that do not fit."""
    path = write(tmp_path / "checkpoints", 2)
    one, two = (path / f"model-{r:05d}-of-00002.safetensors" for r in range(2))
    whole = one.read_bytes()
    for damage in (whole[:-1], two.read_bytes(), whole[:-1] + bytes([whole[-1] ^ 1])):
        one.write_bytes(damage)
        with pytest.raises(CorruptError, match="not the one that was written"):
            load(path)
    one.unlink()
    with pytest.raises(CorruptError, match="missing"):
        load(path)
    one.write_bytes(whole)
    load(path)

    held = container.load_torch(two)
    places = json.loads(container.metadata(two)["parts"])

    def reseal(weight: list[int], drop: str = "") -> None:
        there = {**places, "weight": weight}
        container.save(
            two, {k: v for k, v in held.items() if k != drop}, kind="embkit.checkpoint.model",
            metadata={"parts": json.dumps(there)},
        )  # fmt: skip
        state = json.loads((path / "state.json").read_text())
        state["sha256"][two.name] = checkpoint.sha256_file(two)
        _rust.write_manifest(str(path / "state.json"), json.dumps(state))

    for wrong in ([4, 10, 3], [6, 11, 3], [5, 10, 4], [5, 9, 3]):
        reseal(wrong)
        with pytest.raises(CorruptError, match="'weight' in the checkpoint do not fit"):
            load(path)
    reseal([5, 10, 3])
    load(path)
    reseal([5, 10, 3], drop="half")
    with pytest.raises(CorruptError, match="'half' in the checkpoint do not fit"):
        load(path)


def test_a_rank_that_does_not_write_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, world=2, patience=0.1)
    with pytest.raises(EmbkitError, match=r"Rank 1 did not write .* in 0.1 s"):
        saver.save(step=1, model=parts(0, 2), optimizer={}, state={"world": 2})
    (folder / ".step-000009-of-2.saving").mkdir()
    assert load_latest(folder) is None and not list(folder.iterdir())


def test_background_writes_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on over the tensors while they are written; the next save waits."""
    gate, order = threading.Event(), []
    real = checkpoint._write_files

    def slow(*args: Any) -> Any:
        gate.wait(10)
        order.append("written")
        return real(*args)

    monkeypatch.setattr(checkpoint, "_write_files", slow)
    saver, weight = Saver(tmp_path, background=True), torch.arange(6.0)
    for step in (1, 2):
        if step == 2:
            threading.Timer(0.2, gate.set).start()
        saver.save(step=step, model={"w": weight}, optimizer={}, state={})
        order.append(f"saved {step}")
        weight += 100
    assert order[0] == "saved 1" and order.index("written") < order.index("saved 2")
    saver.wait()
    assert [load(tmp_path / f"step-00000{s}").model["w"][0].item() for s in (1, 2)] == [0.0, 100.0]
    assert (tmp_path / "LATEST").read_text() == "step-000002\n"

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_files", full)
    saver.save(step=3, model={"w": weight}, optimizer={}, state={})
    with pytest.raises(OSError, match="No space"):
        saver.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-000001", "step-000002"]
    saver.wait()


def test_killed_while_it_writes_in_the_background(tmp_path: Path) -> None:
    """P1 for background writes: killed anywhere, what is visible verifies."""
    folder, seen = tmp_path / "checkpoints", set()
    for trial in range(30):
        pid = os.fork()
        if pid == 0:
            try:
                saver = Saver(folder, background=True, keep=2)
                weight = torch.full((200_000,), 0.0)
                for step in range(1, 1000):
                    weight += 1
                    saver.save(
                        step=1000 * trial + step, model={"w": weight}, optimizer={}, state={}
                    )
            finally:
                os._exit(1)
        time.sleep(0.03 + 0.002 * trial)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        seen.add(any(name.endswith(".tmp") for name in names))
        found = load_latest(folder)
        if found is not None:
            value = found.model["w"]
            assert (value == found.state["step"] % 1000).all()
            assert all(load(p) for p in folder.glob("step-*"))
    assert seen == {True, False}, "kills fell on both: while a checkpoint was written, and not"


def test_unfinished_runs_of_other_settings_are_not_lost(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    """Another recipe, width set, tokenizer or store: an error before the first step."""

    class Stop(Callback):
        def on_checkpoint(self, step: int, path: Path) -> None:
            if step == 6:
                raise KeyboardInterrupt

    settings = {**SETTINGS, "checkpoint_every": 3}
    encoder, out = make_encoder(), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prefinetune(encoder, store, out=out, callbacks=[Stop()], **settings)
    (partial,) = tmp_path.glob(".partial-run-*")

    def refused(match: str, encoder: Encoder = encoder, store: Store = store, **more: Any) -> None:
        with pytest.raises(UsageError, match=match) as caught:
            prefinetune(encoder, store, out=out, **{**settings, **more})
        assert caught.value.where == str(partial) and "6 steps in" in str(caught.value)

    refused(r"lr = 0.002 \(now 0.003\)", lr=3e-3)
    refused(r"widths \[32, 16, 8\], not \[32, 8\]", encoder=make_encoder(dims=(32, 8)))
    refused("another start model", encoder=make_encoder(seed=4))
    other = shutil.copytree(store.path, tmp_path / "store")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest.pop("crc32c")
    _rust.write_manifest(str(other / "manifest.json"), json.dumps({**manifest, "digest": "x"}))
    refused("on other data: the store has changed", store=Store(other))
    # Free settings are no other run, a run with a longer name is not this one, and fresh is a word.
    prefinetune(encoder, store, out=tmp_path / "run-2", **{**settings, "lr": 3e-3})
    assert partial.is_dir()
    prefinetune(
        encoder, store, out=out, **{**settings, "keep_checkpoints": 1}, watch=Watch(spike=None)
    )
    assert not partial.exists()
    with pytest.raises(KeyboardInterrupt):
        prefinetune(encoder, store, out=out, callbacks=[Stop()], **{**settings, "lr": 4e-3})
    prefinetune(encoder, store, out=out, fresh=True, **{**settings, "lr": 5e-3})
    assert not list(tmp_path.glob(".partial-*"))


def test_a_copied_checkpoint_names_what_differs(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    from embkit.train.checks import checkpoint_fits

    prefinetune(make_encoder(), store, out=tmp_path / "run", **SETTINGS)
    found = load_latest(tmp_path / "run/checkpoints")
    assert found is not None
    same = {k: found.state[k] for k in ("stage_digest", "data_digest", "config", "dims")}
    same |= {k: found.state[k] for k in ("tokenizer", "cursor")}
    checkpoint_fits(found, same)
    for change, match in (
        ({"tokenizer": "0"}, "another tokenizer"),
        ({"dims": [32]}, r"widths \[32, 16, 8\], not \[32\]"),
        ({"config": {**found.state["config"], "seed": 5}}, r"seed = 0 \(now 5\)"),
        ({"data_digest": "0"}, "on other data"),
        ({"cursor": {"retrieval": 1}}, "of another plan"),
        ({"stage_digest": "0"}, "another start model"),
    ):
        with pytest.raises(UsageError, match=match):
            checkpoint_fits(found, {**same, **change})


def test_order_and_strangers(tmp_path: Path) -> None:
    """Steps count, not the alphabet; copies by hand and damaged newer ones take no place."""
    for step in (999_999, 1_000_000, 1_000_001):
        write(tmp_path, 1, step)
    assert [checkpoint.step_of(p) for p in checkpoint.newest_first(tmp_path)] == [
        1_000_001, 1_000_000,
    ]  # fmt: skip
    shutil.copytree(tmp_path / "step-1000001", tmp_path / "step-1000001-backup")
    (tmp_path / "step-2000000").mkdir()
    write(tmp_path, 1, 1_000_002)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "LATEST", "step-1000001", "step-1000001-backup", "step-1000002", "step-2000000",
    ]  # fmt: skip
    assert checkpoint.oldest(tmp_path) == 1_000_001
    (tmp_path / "LATEST").unlink()
    found = load_latest(tmp_path)
    assert found is not None and found.state["step"] == 1_000_002


def test_the_commands_forget_a_run_when_told(
    store: Store, tiny_model: Path, tmp_path: Path
) -> None:
    """`--fresh`, which messages advise, of both training verbs; without it a finished run stays."""
    from embkit.cli import training

    settings = ["steps=2", "batch_size=6", "warmup_ratio=0", "tasks={retrieval=1.0}"]

    def pre(*, fresh: bool = False) -> int:
        changed = ["model.dims=[32,16]", *(f"prefinetune.{s}" for s in settings)]
        training.prefinetune(
            store.path, tmp_path / "pre", model=str(tiny_model), set_=changed, fresh=fresh
        )
        return (tmp_path / "pre" / "manifest.json").stat().st_mtime_ns

    def fine(*, fresh: bool = False) -> int:
        changed = [f"finetune.{s}" for s in (*settings, "hard_negatives=0")]
        training.finetune(tiny_model, store.path, tmp_path / "fine", set_=changed, fresh=fresh)
        return (tmp_path / "fine" / "manifest.json").stat().st_mtime_ns

    for verb in (pre, fine):
        first = verb()
        assert verb() == first
        assert verb(fresh=True) != first
