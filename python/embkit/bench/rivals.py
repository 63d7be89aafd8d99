"""Rivals whose packages do not go with ours: each runs in the environment of `make rivals`.

A rival is a process that writes its shards once and then does one round of the work for each line
that it is sent (benches/rivals/shards.py); it measures itself, so that its rounds take turns with
ours like any other way's.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Reported, Sample
from embkit.data.tables import Array
from embkit.errors import EmbkitError

SCRIPT = Path(__file__).resolve().parents[3] / "benches" / "rivals" / "shards.py"


class NotInstalled(ImportError):
    """The rival cannot run here; the row is emitted without it."""


def interpreter() -> Path:
    """Python of the rivals' environment; EMBKIT_RIVALS names another folder than the cache's.

    Raises:
        NotInstalled: there is none, or this is not a checkout.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = Path(os.environ.get("EMBKIT_RIVALS") or home / "embkit" / "rivals") / "bin" / "python"
    if not SCRIPT.is_file():
        raise NotInstalled("the rivals need a checkout of embkit")
    if not found.is_file():
        raise NotInstalled("not installed: run `make rivals`")
    return found


class Job:
    """Token rows in a temporary folder for rivals to write their shards from.

    Args:
        flat: uint16 [tokens]. offsets: int64 [n + 1]. batch: rows of a batch.
    """

    def __init__(self, flat: Array, offsets: Array, *, batch: int) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="embkit-rivals-")
        self.path = Path(self.home.name)
        np.save(self.path / "flat.npy", flat)
        np.save(self.path / "offsets.npy", offsets)
        (self.path / "job.json").write_text(json.dumps({"batch": batch}))
        self.rivals: list[Rival] = []

    def start(self, peers: dict[str, str]) -> tuple[dict[str, Rival], dict[str, str]]:
        """Start rivals; those that run by name, and why the others do not.

        Args:
            peers: name in the row to name in shards.py.
        """
        running: dict[str, Rival] = {}
        skipped: dict[str, str] = {}
        for name, peer in peers.items():
            try:
                running[name] = Rival(self, peer)
            except NotInstalled as error:
                skipped[name] = str(error)
        self.rivals += running.values()
        return running, skipped

    def close(self) -> None:
        """End the rivals and remove their files."""
        for rival in self.rivals:
            rival.close()
        self.home.cleanup()


class Rival:
    """A running rival."""

    def __init__(self, job: Job, peer: str) -> None:
        python = interpreter()
        self.peer = peer
        folder = job.path / peer
        folder.mkdir()
        for name in ("flat.npy", "offsets.npy", "job.json"):
            (folder / name).symlink_to(job.path / name)
        self.log = (folder / "log").open("w+")
        source = str(Path(__file__).resolve().parents[2])
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        self.process = subprocess.Popen(
            [str(python), str(SCRIPT), peer, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **quiet, "PYTHONPATH": source},
        )  # fmt: skip
        try:
            self._answer()
        except EmbkitError as error:
            raise NotInstalled(str(error)) from None

    def ask(self, word: str) -> dict[str, Any]:
        """Let it do one round; what it says."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def round(self, word: str, value: Any = None) -> Reported:
        """One round as the harness takes it; ``value`` stands for a result compared elsewhere."""
        said = self.ask(word)
        return Reported(value, Sample(said["cpu"], said["wall"], said["peak"]))

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().strip().splitlines()
            raise EmbkitError(f"{self.peer} ended: {said[-1] if said else 'no word'}")
        return dict(json.loads(line))
