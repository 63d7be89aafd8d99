"""Encoders that are trained in part, or open step by step: the same bits after a stop."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from families import backbone

from embkit.data import Store
from embkit.errors import UsageError
from embkit.model import Encoder, Tuning
from embkit.train import finetune, prefinetune
from embkit.train import step as one_step

SETTINGS: dict[str, Any] = {
    "steps": 8, "batch_size": 12, "lr": 5e-3, "token_budget": 200, "checkpoint_every": 3,
    "tasks": {"retrieval": 1.0},
}  # fmt: skip
HAS_PEFT = importlib.util.find_spec("peft") is not None


def made(store: Store, **settings: Any) -> Encoder:
    body = backbone("qwen3", vocab_size=205, attention_dropout=0.1)
    return Encoder(
        body, store.tokenizer, dims=(32, 8), bidirectional=True, max_length=store.max_length,
        **settings,
    )  # fmt: skip


def losses(out: Path) -> list[str]:
    return [json.loads(line)["loss_hex"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.promise
@pytest.mark.parametrize(
    "settings",
    [
        {"soft_mask_steps": 7, "tuning": Tuning(freeze=("embeddings",))},
        pytest.param(
            {"soft_mask_steps": 8, "tuning": Tuning(lora=2, gradient_checkpointing=True)},
            marks=pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed"),
        ),
    ],
)
def test_stopped_runs_equal_an_uninterrupted_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """P4: what depends on the step is a function of it, and adapters are in the checkpoint; a next
    stage starts from the same bits whether it gets the encoder or its files."""
    start = made(store, **settings)
    whole = prefinetune(start, store, out=tmp_path / "whole", **SETTINGS)
    real, calls = one_step.value_and_grad, 0

    def fails_at(*numbers: int) -> Any:
        def compute(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in numbers:
                raise RuntimeError("stopped")
            return real(*arguments, **options)

        return compute

    with monkeypatch.context() as patch:
        patch.setattr(one_step, "value_and_grad", fails_at(5, 10))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="stopped"):
                prefinetune(start, store, out=tmp_path / "parts", **SETTINGS)
    parts = prefinetune(start, store, out=tmp_path / "parts", **SETTINGS)
    assert (
        losses(tmp_path / "parts") == losses(tmp_path / "whole")
        and len(losses(tmp_path / "parts")) == 8
    )
    assert parts.digest() == whole.digest() != start.digest() and parts.opening == 1
    read = Encoder.from_pretrained(tmp_path / "whole")
    assert read.digest() == whole.digest() and read.tuning == start.tuning
    for name, encoder in (("held", whole), ("read", read)):
        finetune(encoder, store, out=tmp_path / name, **{**SETTINGS, "steps": 3})
    assert losses(tmp_path / "held") == losses(tmp_path / "read")
    assert losses(tmp_path / "held") != losses(tmp_path / "whole")[:3]


def test_an_opening_that_would_not_end(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opens over 9 steps, and 8 are trained"):
        prefinetune(made(store, soft_mask_steps=9), store, out=tmp_path / "run", **SETTINGS)
