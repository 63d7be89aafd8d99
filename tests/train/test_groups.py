"""Learning rates by part: which parameter has which, AdamW by hand, and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import backbone

from embkit.data import Store
from embkit.errors import UsageError
from embkit.model import Encoder, Tuning
from embkit.recipe import Train
from embkit.train import Callback, checkpoint, finetune
from embkit.train.groups import groups, lr_scales
from embkit.train.optim import Optimizer

HALF = 0.5


def scales_by_name(encoder: Encoder, **settings: Any) -> dict[str, float]:
    found = lr_scales(encoder, Train(**settings))
    return {name: found.get(p, 1.0) for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert", "llama", "gemma3"])
def test_each_block_has_a_share_of_the_rate_of_the_one_above(family: str, store: Store) -> None:
    body = backbone(family, layers=3, vocab_size=205)
    lengths = dict.fromkeys(("query", "passage"), 16)
    encoder = Encoder(body, store.tokenizer, dims=(16,), max_length=lengths)
    for name, scale in scales_by_name(
        encoder, layer_lr_decay=HALF, projection_lr_scale=8.0
    ).items():
        block = [i for i in range(3) if f"layer.{i}." in name or f"layers.{i}." in name]
        if block:
            assert scale == HALF ** (3 - block[0]), name
        elif "embed" in name:
            assert scale == HALF**4, name
        else:
            assert scale == (8.0 if name.startswith("projection") else 1.0), name
            assert name.startswith("projection") or "norm" in name, name


def test_adapters_train_at_the_rate_of_their_block(store: Store) -> None:
    pytest.importorskip("peft")
    encoder = Encoder(
        backbone("qwen3", vocab_size=205), store.tokenizer, dims=(32,), tuning=Tuning(lora=2)
    )
    optimizer = Optimizer(encoder, Train(layer_lr_decay=HALF))
    names = {id(p): n for n, p in optimizer.named}
    seen = {
        (group["lr_scale"], names[id(p)].split(".")[2])
        for group in optimizer.adamw.param_groups
        for p in group["params"]
    }
    assert seen == {(HALF, "1"), (HALF**2, "0")}


def test_plain_settings_make_the_two_groups_of_always(
    make_encoder: Callable[..., Encoder],
) -> None:
    encoder = make_encoder()
    matrices, vectors = groups(encoder, Train(weight_decay=0.3))
    assert [p.ndim >= 2 for p in matrices["params"]] == [True] * len(matrices["params"])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(encoder.parameters()))
    assert Optimizer(encoder, Train()).groups() == []


def test_updates_equal_adamw_by_hand(make_encoder: Callable[..., Encoder]) -> None:
    """Four updates with clipping, in float64 and one parameter at a time, and their average."""
    encoder = make_encoder()
    settings: dict[str, Any] = {
        "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6, "clip_norm": 3.0, "ema": 0.75,
        "layer_lr_decay": HALF, "projection_lr_scale": 20.0,
    }  # fmt: skip
    optimizer = Optimizer(encoder, Train(**settings))
    scale = scales_by_name(encoder, layer_lr_decay=HALF, projection_lr_scale=20.0)
    assert set(scale.values()) == {20.0, 0.5, 0.25, 0.125}
    weight = {n: p.detach().double().clone() for n, p in encoder.named_parameters()}
    start = {n: w.clone() for n, w in weight.items()}
    average = {n: w.clone() for n, w in weight.items()}
    first = {n: torch.zeros_like(w) for n, w in weight.items()}
    second = {n: torch.zeros_like(w) for n, w in weight.items()}
    for t, rate in enumerate((0.01, 0.02, 0.005, 0.01), 1):
        generator = torch.Generator().manual_seed(t)
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in weight.items()}
        for name, parameter in encoder.named_parameters():
            parameter.grad = grads[name].clone()
        total = sum(float(g.double().square().sum()) for g in grads.values()) ** 0.5
        assert optimizer.step(rate) == pytest.approx(total, rel=1e-5)
        for name, g32 in grads.items():
            g = g32.double() * min(1.0, 3.0 / total)
            lr = rate * scale[name]
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            root = (second[name] / (1 - 0.95**t)).sqrt() + 1e-6
            if weight[name].ndim >= 2:
                weight[name] *= 1 - lr * 0.1
            weight[name] -= lr * first[name] / (1 - 0.8**t) / root
            average[name] = 0.75 * average[name] + 0.25 * weight[name]
    for name, parameter in encoder.named_parameters():
        moved = (weight[name] - start[name]).abs().max()
        assert (parameter.detach().double() - weight[name]).abs().max() < 1e-4 * moved, name
    optimizer.adopt_average()
    for name, parameter in encoder.named_parameters():
        assert (parameter.detach().double() - average[name]).abs().max() < 1e-5, name


class StopAt(Callback):
    def on_step(self, step: int, line: Any, speed: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_same_bits(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path, monkeypatch: Any
) -> None:
    encoder = make_encoder(dropout=0.1)
    options: dict[str, Any] = {
        "steps": 5, "batch_size": 12, "token_budget": 150, "lr": 1e-3, "ema": 0.5,
        "layer_lr_decay": 0.7, "projection_lr_scale": 5.0, "checkpoint_every": 2,
        "tasks": {"retrieval": 1.0},
    }  # fmt: skip
    finetune(encoder, store, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        finetune(encoder, store, out=tmp_path / "run", callbacks=[StopAt()], **options)
    with monkeypatch.context() as patch:  # as if the blocks had other names now
        patch.setattr(Optimizer, "groups", lambda self: [{"lr_scale": 1.0}])
        with pytest.raises(UsageError, match="of a model with other blocks"):
            finetune(encoder, store, out=tmp_path / "run", **options)
    finetune(encoder, store, out=tmp_path / "run", **options)
    for name in ("log.jsonl", "model/model.safetensors"):
        got, want = ((tmp_path / run / name).read_bytes() for run in ("run", "whole"))
        assert got == want, name
    finetune(encoder, store, out=tmp_path / "plain", **{**options, "projection_lr_scale": 1.0})
    lines = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "plain")]
    rates = [[json.loads(x)["lr"] for x in text.splitlines()] for text in lines]
    assert lines[0] != lines[1] and rates[0] == rates[1], "the log has the run's rate"
    found = checkpoint.load_latest(tmp_path / "whole/checkpoints")
    assert found is not None
    told = found.state["parameter_groups"]
    assert [g["lr_scale"] for g in told] == pytest.approx([5.0, 0.7, 0.7, 0.49, 0.49, 0.343, 0.343])
    assert sum(g["numbers"] for g in told) == sum(p.numel() for p in encoder.parameters())


def test_rates_for_parts_that_are_not_there(
    store: Store, make_encoder: Callable[..., Encoder]
) -> None:
    bare = Encoder(backbone("qwen3", vocab_size=205), store.tokenizer, dims=(32,))
    with pytest.raises(UsageError, match="no projection trains"):
        Optimizer(bare, Train(projection_lr_scale=2.0))
    frozen = make_encoder(freeze=("projection",))
    with pytest.raises(UsageError, match="no projection trains"):
        Optimizer(frozen, Train(projection_lr_scale=2.0))
    for settings in ({"layer_lr_decay": 0.0}, {"layer_lr_decay": 1.1}, {"projection_lr_scale": 0}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            Train(**settings)
