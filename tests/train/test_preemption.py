"""SIGTERM through torchrun, as a cluster sends it: a checkpoint that says so, and the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embkit.data import Store
from embkit.model import Encoder
from embkit.train import prefinetune

SETTINGS: dict[str, Any] = {
    "steps": 400, "batch_size": 16, "lr": 2e-3, "token_budget": 300, "checkpoint_every": 1000,
    "tasks": {"retrieval": 1.0},
}  # fmt: skip


def test_a_preempted_checkpoint_says_so(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    from embkit.errors import Preempted
    from embkit.train import Callback

    class Preempt(Callback):
        def on_step(self, step: int, line: Any, speed: Any) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    settings = {**SETTINGS, "steps": 5}
    with pytest.raises(Preempted):
        prefinetune(make_encoder(), store, out=tmp_path / "run", callbacks=[Preempt()], **settings)
    (state,) = tmp_path.glob(".partial-run-*/checkpoints/step-000003/state.json")
    assert '"preempted":true' in state.read_text()  # examples/slurm.sh looks for these words
    prefinetune(make_encoder(), store, out=tmp_path / "run", **settings)
    (state,) = tmp_path.glob("run/checkpoints/step-000005/state.json")
    assert "preempted" not in json.loads(state.read_text())


@pytest.mark.slow
def test_sigterm_to_torchrun(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    model = make_encoder(dropout=0.1).export(tmp_path / "model")
    encoder = Encoder.from_pretrained(model)
    out = tmp_path / "run"
    sets = [
        f"prefinetune.{k}={json.dumps(v) if not isinstance(v, dict) else '{ retrieval = 1.0 }'}"
        for k, v in SETTINGS.items()
    ]
    words = ["prefinetune", str(store.path), "--out", str(out), "--model", str(model)]
    options = [w for s in [*sets, "model.dims=[32, 16, 8]"] for w in ("--set", s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
         "-m", "embkit", *words, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            (log,) = [*tmp_path.glob(".partial-run-*/log.jsonl"), None][:1]
            if log is not None and log.read_bytes().count(b"\n") >= 5:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode not in (0, None), error[-2000:]
    states = list(tmp_path.glob(".partial-run-*/checkpoints/step-*/state.json"))
    assert len(states) == 1, error[-3000:]
    state = json.loads(states[0].read_text())
    assert state["preempted"] is True and 5 <= state["step"] < 400
    done = subprocess.run(
        [sys.executable, "-m", "embkit", *words, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    from embkit import recipe

    config = recipe.load("quickstart", overrides=[*sets]).prefinetune
    prefinetune(encoder, store, out=tmp_path / "whole", config=config)
    one, two = ((tmp_path / n / "log.jsonl").read_bytes() for n in ("run", "whole"))
    assert one == two
