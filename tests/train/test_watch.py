"""Watching a run changes nothing in it: TensorBoard, evaluation, callbacks, spikes, speed."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embkit import _rust, container
from embkit.data import Store
from embkit.errors import EmbkitError, UsageError
from embkit.model import Encoder
from embkit.recipe import Train, Watch
from embkit.train import Callback, loop, prefinetune, train
from embkit.train.profile import Speed, peak
from embkit.train.spike import Spikes

SETTINGS: dict[str, Any] = {"steps": 12, "batch_size": 16, "lr": 2e-3, "token_budget": 300}


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class Seen(Callback):
    """Keeps what it is told, and draws random numbers to be in the way."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.speed: list[Mapping[str, float]] = []
        self.scores: dict[int, float] = {}
        self.checkpoints: list[tuple[int, str]] = []
        self.about: Any = None
        self.ended: bool | None = None

    def on_start(self, about: Any) -> None:
        self.about = about

    def on_step(self, step: int, line: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        torch.rand(7)
        assert line["step"] == step
        self.steps.append(step)
        self.speed.append(speed)

    def on_evaluate(self, step: int, scores: Mapping[str, Any]) -> None:
        self.scores[step] = scores["mean"]["32"]

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.checkpoints.append((step, path.name))

    def on_end(self, done: bool) -> None:
        self.ended = done


def test_a_watched_run_has_the_bits_of_one_that_is_not(
    store: Store, make_encoder: Callable[..., Encoder], dev: Path, tmp_path: Path
) -> None:
    """Evaluations, callbacks that draw random numbers, background checkpoints; dropout on."""
    encoder, seen = make_encoder(dropout=0.1), Seen()
    watch = Watch(evaluate_every=5, evaluate_on=str(dev), best="keep", background=True)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    plain = prefinetune(encoder, store, out=tmp_path / "plain" / "run", **SETTINGS)
    watched, profile = train(
        encoder, store, name="prefinetune", out=tmp_path / "watched" / "run",
        config=Train(**SETTINGS, watch=watch, checkpoint_every=4), callbacks=[seen],
    )  # fmt: skip
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert plain.digest() == watched.digest()
    lines = log(tmp_path / "watched/run")
    scored = {x["step"]: x.pop("scores")["mean"]["32"] for x in lines if "scores" in x}
    assert lines == log(tmp_path / "plain/run")
    assert list(scored) == [5, 10, 12] and scored == seen.scores
    assert seen.steps == list(range(1, 13)) and seen.ended is True
    assert seen.about.steps == 12 and seen.about.start == 0 and seen.about.name == "prefinetune"
    best = max(scored, key=lambda step: (scored[step], -step))
    left = {p.name for p in (tmp_path / "watched/run/checkpoints").glob("step-*")}
    assert left >= {"step-000012", f"step-{best:06d}"} and len(left) <= 3
    assert {s for s, _ in seen.checkpoints} >= {4, 8, 12, 5}  # 5 is the best of one
    assert profile.evaluation > 0 and all(0 < s["mfu"] < 5 for s in seen.speed)


def test_the_scores_are_those_of_evaluate(
    store: Store, make_encoder: Callable[..., Encoder], dev: Path, tmp_path: Path
) -> None:
    from embkit.evaluate import evaluate

    watch = Watch(evaluate_every=1000, evaluate_on=str(dev))
    trained = prefinetune(make_encoder(), store, out=tmp_path / "run", **SETTINGS, watch=watch)
    last = log(tmp_path / "run")[-1]["scores"]
    assert last["mean"] == evaluate(trained, dev, bm25=False)["mean"]


def test_the_best_weights_are_exported(
    store: Store,
    make_encoder: Callable[..., Encoder],
    dev: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores that fall make the first evaluated weights the best; a resumed run remembers."""
    from embkit.evaluate import run as scoring
    from embkit.train import checkpoint

    encoder = make_encoder()
    real, falling = scoring.score_sets, iter(range(9, 0, -1))

    def score(*args: Any) -> Any:
        return {**real(*args), "mean": {"32": float(next(falling))}}

    monkeypatch.setattr(scoring, "score_sets", score)
    watch = Watch(evaluate_every=3, evaluate_on=str(dev), best="export")
    settings = {**SETTINGS, "checkpoint_every": 2, "keep_checkpoints": 1, "watch": watch}

    class Stop(Callback):
        def on_step(self, step: int, line: Any, speed: Any) -> None:
            if step == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefinetune(encoder, store, out=tmp_path / "run", callbacks=[Stop()], **settings)
    trained = prefinetune(encoder, store, out=tmp_path / "run", **settings)
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    assert kept == ["step-000003", "step-000012"]
    best = checkpoint.load(tmp_path / "run/checkpoints/step-000003")
    assert best.state["best"] == {"step": 3, "score": 9.0}
    for name, value in trained.state_dict().items():
        assert torch.equal(value, best.model[name])
    assert Encoder.from_pretrained(tmp_path / "run").digest() == trained.digest()


def test_evaluation_is_checked_before_the_first_step(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    for watch, match in (
        (Watch(evaluate_every=2), "nothing to evaluate on"),
        (Watch(evaluate_every=2, evaluate_on=str(tmp_path)), "evaluation set"),
    ):
        with pytest.raises(UsageError, match=match):
            prefinetune(make_encoder(), store, out=tmp_path / "run", **SETTINGS, watch=watch)
    for bad in ({"report_to": ("wandbb",)}, {"best": "keep"}, {"spike": 0.0}):
        with pytest.raises(UsageError):
            Watch(**bad)  # type: ignore[arg-type]


def test_a_spike_stops_the_run_with_its_batch(
    store: Store,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Step 40 of one task jumps; switched off, the run goes on from its checkpoint."""
    import dataclasses

    real = loop.Step.run

    def jump(self: Any, batch: Any, clock: Any) -> Any:
        done = real(self, batch, clock)
        return dataclasses.replace(done, loss=50.0) if batch.filled.step == 39 else done

    monkeypatch.setattr(loop.Step, "run", jump)
    settings = {**SETTINGS, "steps": 42, "tasks": {"retrieval": 1.0}, "checkpoint_every": 36}
    with pytest.raises(EmbkitError, match="loss of step 40 has jumped to 50") as caught:
        prefinetune(make_encoder(), store, out=tmp_path / "run", **settings)
    assert 'watch.spike = "off"' in str(caught.value)
    (saved,) = tmp_path.glob(".partial-run-*/failed-step-000040.safetensors")
    assert container.metadata(saved)["task"] == "retrieval"
    with pytest.raises(EmbkitError, match="step 40 has jumped"):  # the history is in the log
        prefinetune(make_encoder(), store, out=tmp_path / "run", **settings)
    prefinetune(make_encoder(), store, out=tmp_path / "run", **settings, watch=Watch(spike=None))
    assert [x["step"] for x in log(tmp_path / "run")] == list(range(1, 43))


def test_the_rule_of_spikes() -> None:
    step = itertools.count(1)

    def line(task: str, loss: float, **more: Any) -> dict[str, Any]:
        return {"step": next(step), "task": task, "loss": loss, **more}

    spikes = Spikes(10.0, [line("a", 5.0) for _ in range(31)])
    assert spikes.limit("a") is None
    spikes.add(line("a", 5.0))
    assert spikes.limit("a") == pytest.approx(5 + 10 * 0.5) and spikes.limit("b") is None
    wide = Spikes(10.0, [line("a", 5.0 + (-1) ** i) for i in range(64)])
    assert wide.limit("a") == pytest.approx(5 + 10 * 1.4826)
    low = Spikes(10.0, [line("a", 0.01) for _ in range(64)])
    assert low.limit("a") == pytest.approx(1.01)
    for _ in range(64):
        low.add(line("a", 3.0))
    assert low.limit("a") == pytest.approx(6.0)
    low.add(line("a", 8.0, refresh={}))
    assert low.limit("a") is None
    rare = Spikes(10.0, [line("a", 5.0) for _ in range(40)])
    rare.add(line("b", 5.0) | {"step": 9000})
    assert rare.limit("a") is None, "too long ago"
    assert Spikes(None, [line("a", 5.0) for _ in range(64)]).limit("a") is None


def events(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and scalars of each event; every checksum is verified."""

    def masked(data: bytes) -> bytes:
        crc = _rust.crc32c(data)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    data, at = path.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + size]
        assert data[at + 8 : at + 12] == masked(data[at : at + 8])
        assert data[at + 12 + size : at + 16 + size] == masked(body)
        at += 16 + size
        found = dict(fields(body))
        values = {}
        for number, one in fields(found.get(5, b"")):
            assert number == 1
            tag = dict(fields(one))
            values[tag[1].decode()] = struct.unpack("<f", tag[2])[0]
        yield found.get(2, 0), values


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protobuf message."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        size = {0: None, 1: 8, 5: 4}.get(key & 7, -1)
        if size is None:
            yield key >> 3, number()
            continue
        if size == -1:
            size = number()
        yield key >> 3, data[at : at + size]
        at += size


def test_tensorboard_has_every_step_and_each_start(
    store: Store, make_encoder: Callable[..., Encoder], dev: Path, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_step(self, step: int, line: Any, speed: Any) -> None:
            if step == 7:
                raise KeyboardInterrupt

    settings = {**SETTINGS, "checkpoint_every": 5}
    settings["watch"] = Watch(evaluate_every=6, evaluate_on=str(dev))
    with pytest.raises(KeyboardInterrupt):
        prefinetune(make_encoder(), store, out=tmp_path / "run", callbacks=[Stop()], **settings)
    prefinetune(make_encoder(), store, out=tmp_path / "run", **settings)
    files = sorted((tmp_path / "tensorboard/run").glob("events.out.tfevents.*"))
    assert len(files) == 2 and not list((tmp_path / "run").rglob("events*"))
    first, second = ([e for e in events(path)] for path in files)
    assert [s for s, v in first if "train/loss" in v] == list(range(1, 8))
    assert [s for s, v in second if "train/loss" in v] == list(range(6, 13))
    assert second[1][0] == 6, "TensorBoard drops older events from this step on"
    lines = log(tmp_path / "run")
    for step, values in second:
        if "train/loss" in values:
            assert values["train/loss"] == np.float32(lines[step - 1]["loss"])
            assert values["speed/tokens_per_s"] > 0
        elif values:
            assert values["dev/mean_at_32"] == np.float32(lines[step - 1]["scores"]["mean"]["32"])


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    """The package itself, where it is installed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from embkit.train.tensorboard import Events

    for start, steps in ((1, range(1, 8)), (6, range(6, 10))):
        file = Events(tmp_path, first_step=start)
        for step in steps:
            file.write(step, {"train/loss": start + step / 4, "a/ü": -1e-30})
        file.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    found = {e.step: e.value for e in read.Scalars("train/loss")}
    assert found == {**{s: 1 + s / 4 for s in range(1, 6)}, **{s: 6 + s / 4 for s in range(6, 10)}}
    assert [e.value for e in read.Scalars("a/ü")][0] == np.float32(-1e-30)


def test_speed_counts_what_the_model_asks_for(
    store: Store, make_encoder: Callable[..., Encoder]
) -> None:
    """MFU by a count of the matrix products of a forward pass, times three."""
    from torch.utils.flop_counter import FlopCounterMode

    encoder = make_encoder(projection=False)
    encoder.backbone.set_attn_implementation("eager")  # the fused one is not counted on a CPU
    ids = torch.randint(5, 200, (3, 20))
    with FlopCounterMode(display=False) as counter:
        encoder(ids, torch.ones_like(ids))
    from embkit.train.profile import Profile

    speed = Speed(Profile(), encoder)
    ours = speed.linear * ids.numel() + speed.pair * 3 * 20**2
    assert ours == pytest.approx(3 * counter.get_total_flops(), rel=0.01)
    assert peak(encoder.device).origin == "measured" and peak(encoder.device).flops > 1e8


def test_the_bar_does_not_count_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from embkit import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Bar("Train", 1000, "steps")
    now[0] = 130.0
    shown.start(900)
    now[0] = 140.0
    shown.update(910)
    assert shown.rate() == 1.0 and "1:30 left" in shown._text()
