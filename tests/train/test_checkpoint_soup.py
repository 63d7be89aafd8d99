"""Averages of a run's own checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embkit.data import Store
from embkit.errors import UsageError
from embkit.model import Encoder
from embkit.model.tuning import Tuning
from embkit.recipe import Train
from embkit.soup import soup
from embkit.train import finetune
from embkit.train.checkpoint import load as load_checkpoint


def kept(out: Path) -> list[str]:
    return list(json.loads((out / "report.json").read_text())["kept"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Store, tiny_model: Path) -> Path:
    """A run with all its checkpoints and, because they are harder to average, adapters."""
    encoder = Encoder.from_pretrained(tiny_model, tuning=Tuning(lora=2))
    out = tmp_path_factory.mktemp("trained") / "run"
    config = Train(
        steps=6, batch_size=8, lr=1e-2, checkpoint_every=2, keep_checkpoints=9, token_budget=2048,
        ema=0.5,
    )  # fmt: skip
    finetune(encoder, store, out=out, config=config)
    return out


def test_checkpoints_of_a_run_are_averaged(trained: Path, tmp_path: Path) -> None:
    soup([trained], out=tmp_path / "s", select="uniform", checkpoints="last:2")
    assert kept(tmp_path / "s") == ["run-step-000004", "run-step-000006"]
    each = []
    for step in (4, 6):  # the adapters' product is in the weights before they are averaged
        encoder = Encoder.from_pretrained(trained / "model")
        found = load_checkpoint(trained / "checkpoints" / f"step-{step:06d}")
        encoder.load_state_dict(dict(found.model))
        each.append(encoder.merged_state())
    got = Encoder.from_pretrained(tmp_path / "s" / "model").merged_state()
    assert any(not torch.equal(each[0][n], each[1][n]) for n in got)
    for name, value in got.items():
        if "lora" not in name:
            want = (each[0][name].double() + each[1][name].double()) / 2
            torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
    assert not (tmp_path / "s" / "ingredients").exists()
    soup([trained], out=tmp_path / "t", select="uniform", checkpoints="2,6")
    assert kept(tmp_path / "t") == ["run-step-000002", "run-step-000006"]
    for wrong, said in (("last:9", "has those of step 2, 4, 6"), ("3", "step 2, 4, 6"),
                        ("newest", "names none")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            soup([trained], out=tmp_path / "x", select="uniform", checkpoints=wrong)
    with pytest.raises(UsageError, match="no checkpoints"):
        soup([tmp_path / "s"], out=tmp_path / "x", select="uniform", checkpoints="all")
