"""Rivals whose packages do not go with ours: each runs in the environment of `make rivals`.

A rival is a process that makes its shards or its index once and then does one round of the work for
each line that it is sent (benches/rivals/shards.py, neighbours.py); it measures itself, so that its
rounds take turns with ours like any other way's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Reported, Sample
from embkit.data.tables import Array
from embkit.errors import EmbkitError

SCRIPTS = Path(__file__).resolve().parents[3] / "benches" / "rivals"


class NotInstalled(ImportError):
    """The rival cannot run here; the row is emitted without it."""


def interpreter() -> Path:
    """Python of the rivals' environment; EMBKIT_RIVALS names another folder than the cache's.

    Raises:
        NotInstalled: there is none, or this is not a checkout.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    found = Path(os.environ.get("EMBKIT_RIVALS") or home / "embkit" / "rivals") / "bin" / "python"
    if not SCRIPTS.is_dir():
        raise NotInstalled("the rivals need a checkout of embkit")
    if not found.is_file():
        raise NotInstalled("not installed: run `make rivals`")
    return found


class Job:
    """The work in a temporary folder, for rivals to make their shards or index from.

    Args:
        arrays: name to array, written as ``name.npy``. about: numbers, written as ``job.json``.
        script: the file under benches/rivals that does the work.
    """

    def __init__(
        self, arrays: dict[str, Array], about: dict[str, Any], *, script: str = "shards.py"
    ) -> None:
        self.home = tempfile.TemporaryDirectory(prefix="embkit-rivals-")
        self.path = Path(self.home.name)
        for name, array in arrays.items():
            np.save(self.path / f"{name}.npy", array)
        (self.path / "job.json").write_text(json.dumps(about))
        self.files = sorted(p.name for p in self.path.iterdir())
        self.script = SCRIPTS / script
        self.rivals: list[Rival] = []

    def start(self, peers: dict[str, str]) -> tuple[dict[str, Rival], dict[str, str]]:
        """Start rivals; those that run by name, and why the others do not.

        Args:
            peers: name in the row to name in the script.
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

    def start_here(self, peer: str) -> Rival:
        """Start a way of ours in the same fashion, with the Python of this process."""
        self.rivals.append(Rival(self, peer, python=Path(sys.executable)))
        return self.rivals[-1]

    def close(self) -> None:
        """End the rivals and remove their files."""
        for rival in self.rivals:
            rival.close()
        self.home.cleanup()


class Rival:
    """A running rival.

    Attributes:
        ready: what it said when its shards or its index were there.
    """

    def __init__(self, job: Job, peer: str, *, python: Path | None = None) -> None:
        python = python or interpreter()
        self.peer = peer
        folder = job.path / peer
        folder.mkdir()
        for name in job.files:
            (folder / name).symlink_to(job.path / name)
        self.log = (folder / "log").open("w+")
        source = str(Path(__file__).resolve().parents[2])
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "EMBKIT_PROGRESS": "off",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        self.process = subprocess.Popen(
            [str(python), str(job.script), peer, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **quiet, "PYTHONPATH": source},
        )  # fmt: skip
        self.folder = folder
        try:
            self.ready = self._answer()
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
