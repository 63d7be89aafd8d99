"""`report_to`, with the trackers themselves where they are installed, writing to local files."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embkit.data import Store
from embkit.errors import UsageError
from embkit.model import Encoder
from embkit.recipe import Watch
from embkit.train import prefinetune
from embkit.train.reporters import REPORTERS

# A run in a process of its own: trackers start threads and servers, and read the environment.
RUN = """
import sys
from embkit.data import Store
from embkit.model import Encoder
from embkit.recipe import Watch
from embkit.train import Callback, prefinetune

class Stop(Callback):
    def on_step(self, step, line, speed):
        if step == 5 and sys.argv[5] == "stop":
            raise KeyboardInterrupt

try:
    prefinetune(
        Encoder.from_pretrained(sys.argv[1]), Store(sys.argv[2]), out=sys.argv[3], steps=8,
        batch_size=16, token_budget=300, checkpoint_every=4, callbacks=[Stop()],
        watch=Watch(report_to=(sys.argv[4],)),
    )
except KeyboardInterrupt:
    pass
"""


def mlflow_values(folder: Path) -> tuple[int, dict[int, float]]:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "embkit"]
    runs = client.search_runs([experiment.experiment_id])
    found = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert runs[0].info.status == "FINISHED" and runs[0].data.params["steps"] == "8"
    return len(runs), {m.step: m.value for m in found}


def trackio_values(folder: Path) -> tuple[int, dict[int, float]]:
    code = """
import json, trackio
runs = list(trackio.Api().runs("embkit"))
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("embkit", runs[0].name)
print(json.dumps([len(runs), {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, values = json.loads(done.stdout.splitlines()[-1])
    return count, {int(k): v for k, v in values.items()}


READERS = {"mlflow": mlflow_values, "trackio": trackio_values}


def environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "EMBKIT_PROGRESS": "off",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.mark.parametrize("tracker", sorted(REPORTERS))
@pytest.mark.timeout(240)
def test_a_tracker_gets_every_step_of_a_run_that_is_resumed(
    tracker: str, store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    pytest.importorskip(tracker)
    model = make_encoder().export(tmp_path / "model")
    for word in ("stop", "go"):
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(model), str(store.path), str(tmp_path / "run"),
             tracker, word],
            env=environment(tmp_path), capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    if tracker == "wandb":  # its offline files are for its own server: one per process
        assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2
        return
    count, values = READERS[tracker](tmp_path)
    assert count == 1, "the resumed run goes on in the same entry"
    assert {s: pytest.approx(v) for s, v in values.items()} == {x["step"]: x["loss"] for x in lines}


def test_a_tracker_that_is_not_installed_is_named(
    store: Store,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str, *rest: Any) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"(?s)names wandb, which is not installed.*embkit\[wandb"):
        prefinetune(
            make_encoder(), store, out=tmp_path / "run", steps=2, batch_size=8,
            watch=Watch(report_to=("wandb",)),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
