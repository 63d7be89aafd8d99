"""Runs reported to experiment trackers: `report_to = ["wandb", "trackio", "mlflow"]`.

Each is a package of its own (``pip install 'embkit[wandb]'``) with its own settings in environment
variables: where to send, which project. A run that is resumed goes on in the same entry, found by
the run's digest.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from embkit.errors import UsageError
from embkit.train.callbacks import About, Callback
from embkit.train.tensorboard import evaluation_scalars, scalars

_PROJECT = "embkit"


class Reporter(Callback):
    """Base: numbers go to :meth:`send`."""

    package = ""

    def __init__(self) -> None:
        try:
            self.api: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise UsageError(
                f"report_to names {self.package}, which is not installed: {error}",
                where="watch.report_to",
                fix=f"pip install 'embkit[{self.package}]', or leave it out",
            ) from error

    def send(self, step: int, values: Mapping[str, float]) -> None:
        """Hand numbers of a step to the tracker."""
        raise NotImplementedError

    def on_step(self, step: int, line: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self.send(step, scalars(line, speed))

    def on_evaluate(self, step: int, scores: Mapping[str, Any]) -> None:
        self.send(step, evaluation_scalars(scores))


class Wandb(Reporter):
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE ... are its own."""

    package = "wandb"

    def on_start(self, about: About) -> None:
        self.run = self.api.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT), name=about.out.name,
            id=about.digest[:16], resume="allow", config=dict(about.settings),
        )  # fmt: skip

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def on_end(self, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


class Trackio(Reporter):
    """Trackio, which keeps runs on this machine; TRACKIO_PROJECT names the project."""

    package = "trackio"

    def on_start(self, about: About) -> None:
        self.api.init(
            project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
            name=f"{about.out.name}-{about.digest[:8]}", resume="allow",
            config=_flat(about.settings),
        )  # fmt: skip

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log(dict(values), step=step)

    def on_end(self, done: bool) -> None:
        self.api.finish()


class Mlflow(Reporter):
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME are its own."""

    package = "mlflow"

    def on_start(self, about: About) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self.api.set_experiment(name)
        found = self.api.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.embkit_digest = '{about.digest}'",
            output_format="list",
        )
        if found:
            self.api.start_run(run_id=found[0].info.run_id)
            return
        self.api.start_run(run_name=about.out.name, tags={"embkit_digest": about.digest})
        self.api.log_params(_flat(about.settings))

    def send(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log_metrics(dict(values), step=step)

    def on_end(self, done: bool) -> None:
        self.api.end_run("FINISHED" if done else "KILLED")


REPORTERS: dict[str, type[Reporter]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def reporters(names: Sequence[str]) -> list[Reporter]:
    """The trackers that a run reports to.

    Raises:
        UsageError: one that is not installed.
    """
    return [REPORTERS[name]() for name in names]


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as trackers show them: texts by name."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
