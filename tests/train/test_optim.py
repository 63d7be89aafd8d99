"""Optimizer: schedules, averages, half precision, parts of a step; and all of it resumes."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from embkit.data import Store
from embkit.errors import CorruptError, Preempted
from embkit.model import Encoder
from embkit.recipe import Part, Train
from embkit.train import Callback, finetune, optim
from embkit.train.batches import Steps
from embkit.train.optim import Optimizer, learning_rate
from embkit.train.parallel import Ranks
from embkit.train.profile import Clock, Profile
from embkit.train.step import Step

SETTINGS: dict[str, Any] = {
    "steps": 6, "batch_size": 12, "token_budget": 150, "lr": 1e-3, "warmup_ratio": 0.0,
    "tasks": {"retrieval": 1.0},
}  # fmt: skip
NAME = "projection.weight"


def trained(store: Store, encoder: Encoder, steps: int = 3, **settings: Any) -> list[Any]:
    """What a few steps gave."""
    config = Train(**{**SETTINGS, **settings})
    source = Steps(store, config, Ranks(), layout="padded")
    step = Step(encoder.train(), config, Optimizer(encoder, config), parts=source.count)
    stream = source.stream(0, steps, threads=1, device=torch.device("cpu"))
    return [step.run(batch, Clock(Profile())) for batch in stream]


def fill(encoder: Encoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in encoder.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_warm_up_by_steps_and_a_decay_at_the_end() -> None:
    config = Train(steps=100, lr=2.0, warmup_steps=4, schedule="wsd", decay_ratio=0.25)
    rates = [learning_rate(config, s) for s in (0, 3, 4, 74, 75, 87, 99)]
    assert rates == pytest.approx([0.5, 2.0, 2.0, 2.0, 2.0, 2 * 13 / 25, 2 / 25])
    floor = Train(steps=10, lr=1.0, warmup_steps=8, schedule="wsd", min_lr_ratio=0.5)
    assert [learning_rate(floor, s) for s in (7, 8, 9)] == pytest.approx([1.0, 1.0, 0.75])


def test_foreach_is_fused_to_rounding(make_encoder: Callable[..., Encoder]) -> None:
    found = []
    for form in ("fused", "foreach"):
        encoder = make_encoder()
        optimizer = Optimizer(encoder, Train(lr=0.01, adamw=form))
        for seed in range(3):
            fill(encoder, seed)
            optimizer.step(0.01)
        found.append(encoder.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7)


def test_the_average_is_that_of_the_weights(make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder()
    weight = dict(encoder.named_parameters())[NAME]
    want = weight.detach().double().clone()
    optimizer = Optimizer(encoder, Train(lr=0.1, ema=0.75))
    for seed in range(4):
        fill(encoder, seed)
        optimizer.step(0.1)
        want = 0.75 * want + 0.25 * weight.detach().double()
    last = weight.detach().clone()
    optimizer.adopt_average()
    assert (weight.detach().double() - want).abs().max() < 1e-6
    assert (last.double() - want).abs().max() > 1e-3


@pytest.mark.parametrize(
    "settings", [{"adamw": "foreach"}, {"ema": 0.5}, {"precision": "fp16"}], ids=str
)
def test_its_state_is_everything(
    make_encoder: Callable[..., Encoder], settings: dict[str, Any]
) -> None:
    """Two steps, and one, a copy of the state in a new optimizer, and the other: the same bits."""
    config = Train(lr=0.01, **settings)
    ends = []
    for cut in (False, True):
        encoder = make_encoder()
        optimizer = Optimizer(encoder, config)
        fill(encoder, 0)
        optimizer.step(0.01)
        if cut:
            tensors, count = optimizer.tensors()
            state = {k: v.clone() for k, v in encoder.state_dict().items()}
            encoder = make_encoder(seed=5)
            encoder.load_state_dict(state)
            optimizer = Optimizer(encoder, config)
            optimizer.restore({k: v.clone() for k, v in tensors.items()}, count)
            with pytest.raises(CorruptError, match="of another model"):
                optimizer.restore({k: tensors[k] for k in list(tensors)[:-1]}, count)
        fill(encoder, 1)
        optimizer.step(0.01)
        ends.append({**encoder.state_dict(), **optimizer.tensors()[0]})
    assert all(torch.equal(ends[1][k], v) for k, v in ends[0].items())


def test_fp16_finds_its_scale(
    make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_GROW", 3)
    encoder = make_encoder()
    optimizer = Optimizer(encoder, Train(precision="fp16"))
    assert optimizer.scale == 2.0**16
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    fill(encoder, 0)
    dict(encoder.named_parameters())[NAME].grad[0, 0] = float("inf")  # type: ignore[index]
    assert not math.isfinite(optimizer.step(0.1))
    assert (optimizer.scale, optimizer.count) == (2.0**15, 0)
    assert all(torch.equal(before[k], v) for k, v in encoder.state_dict().items())
    scales = []
    for seed in range(4):
        fill(encoder, seed)
        size = math.sqrt(sum(float(p.grad.square().sum()) for p in encoder.parameters()))  # type: ignore[union-attr]
        assert optimizer.step(0.1) == pytest.approx(size / (2.0 ** (15 + (seed > 2))), rel=1e-5)
        scales.append(optimizer.scale)
    assert scales == [2.0**15, 2.0**15, 2.0**16, 2.0**16] and optimizer.count == 4


def test_half_precision_trains_float32_weights(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "_SCALE", 64.0)  # small enough from the start
    found = {}
    for precision in ("fp32", "bf16", "fp16"):
        encoder = make_encoder()
        done = trained(store, encoder, precision=precision)
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        assert not any(d.skipped for d in done)
        found[precision] = ([d.loss for d in done], [d.norm for d in done])
    for precision, near in (("bf16", 0.05), ("fp16", 0.01)):
        assert found[precision][0] != found["fp32"][0]
        for got, want in zip(found[precision], found["fp32"], strict=True):
            assert got == pytest.approx(want, rel=near), precision


def test_accumulated_batches_are_a_mean(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads: list[torch.Tensor] = []

    def keep(self: Optimizer, rate: float) -> float:
        grads.append(dict(self.named)[NAME].grad.clone())  # type: ignore[union-attr]
        self.clear()
        return 1.0

    monkeypatch.setattr(Optimizer, "step", keep)
    plain = trained(store, make_encoder(), 4)
    both = trained(store, make_encoder(), 2, accumulate=2)
    for i, done in enumerate(both):
        pair = plain[2 * i : 2 * i + 2]
        assert done.loss == pytest.approx(sum(d.loss for d in pair) / 2, rel=1e-12)
        assert [p["loss"] for p in done.more["parts"]] == [d.loss for d in pair]
        assert done.tokens == sum(d.tokens for d in pair)
        torch.testing.assert_close(grads[4 + i], (grads[2 * i] + grads[2 * i + 1]) / 2)


class StopAt(Callback):
    """SIGTERM after a step."""

    def on_step(self, step: int, line: Any, speed: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


PARTS = (
    Part(tasks={"retrieval": 1.0}, batch_size=10, hard_negatives=2, in_batch=False),
    Part(tasks={"sts": 1.0, "topics": 1.0}, batch_size=14, weight=0.8),
)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp16", "accumulate": 2, "schedule": "wsd"},
        {"parts": PARTS, "ema": 0.5, "graph_memory": 0.0},
    ],
    ids=["accumulate", "parts"],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path, settings: dict[str, Any]
) -> None:
    encoder = make_encoder(dropout=0.1)
    options = {**SETTINGS, **settings, "steps": 5}
    finetune(encoder, store, out=tmp_path / "whole", **options)
    with pytest.raises(Preempted, match="after step 2 of 5"):
        finetune(encoder, store, out=tmp_path / "run", callbacks=[StopAt()], **options)
    # What memory is there may change in between.
    finetune(encoder, store, out=tmp_path / "run", **{**options, "graph_memory": 1e-3})
    for name in ("log.jsonl", "model/model.safetensors"):
        got, want = ((tmp_path / run / name).read_bytes() for run in ("run", "whole"))
        assert got == want, name
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(len(x["parts"]) == 2 and x["task"].count("+") == 1 for x in lines)
    state = json.loads((tmp_path / "run/checkpoints/step-000005/state.json").read_text())
    if "parts" in settings:
        assert state["cursor"]["0/retrieval"] == 5
        assert state["cursor"]["1/sts"] + state["cursor"]["1/topics"] == 5
        weights = [torch.from_numpy(x) for x in _weights(tmp_path / "run")]
        assert not torch.equal(*weights), "the model is the average, not the last weights"
    else:
        assert state["cursor"] == {"retrieval": 10}
        assert [x["grad_norm"] is None for x in lines] == [True] + [False] * 4
        assert [x["loss_scale"] for x in lines] == [2.0**16] + [2.0**15] * 4


def _weights(run: Path) -> list[Any]:
    """The projection of the model and of the last checkpoint."""
    from embkit.train import checkpoint

    found = checkpoint.load_latest(run / "checkpoints")
    assert found is not None
    exported = Encoder.from_pretrained(run / "model").state_dict()
    return [exported[NAME].numpy(), found.model[NAME].numpy()]
