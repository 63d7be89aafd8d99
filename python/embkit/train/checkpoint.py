"""Checkpoints: safetensors and JSON, whole or absent, never a pickle.

``checkpoints/step-000100/{model.safetensors, optimizer.safetensors, state.json}`` and a ``LATEST``
pointer. A checkpoint is written to a temporary directory, renamed as one step, and only then does
LATEST move and only then are old ones removed; a kill at any point leaves a checkpoint that
verifies. state.json holds the SHA-256 of the two other files, and readers trust nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embkit import _rust, container
from embkit.errors import CorruptError, FormatError
from embkit.model.encoder import hash_tensors

VERSION = 1
FORMAT = "embkit.checkpoint"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: its directory.
        state: the content of state.json.
        model: weights by name. optimizer: optimizer and RNG tensors by name.
    """

    path: Path
    state: dict[str, Any]
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def save(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Publish the checkpoint of a step, then point LATEST at it, then remove old ones.

    Args:
        folder: the ``checkpoints`` directory of a run.
        step: steps done.
        model, optimizer: tensors by name.
        state: JSON fields for state.json; format, version, step and file hashes are added.
        keep: checkpoints that stay, at least 1.

    Returns:
        The checkpoint's directory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / name_of(step)
    work = Path(_rust.temp_path(str(final)))
    work.mkdir()
    try:
        container.save(work / "model.safetensors", model, kind=f"{FORMAT}.model")
        container.save(work / "optimizer.safetensors", optimizer, kind=f"{FORMAT}.optimizer")
        content = {
            **state,
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "sha256": {p.name: sha256_file(p) for p in sorted(work.glob("*.safetensors"))},
        }
        _rust.write_manifest(str(work / "state.json"), json.dumps(content))
        _rust.publish_dir(str(work), str(final))
    finally:  # a disk that is full leaves nothing of this one, and the checkpoints before it
        shutil.rmtree(work, ignore_errors=True)
    _rust.publish_file(str(folder / "LATEST"), f"{final.name}\n".encode())
    prune(folder, final, keep)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """The checkpoint LATEST names, or the newest that verifies; None when there is none.

    Raises:
        FormatError: the newest checkpoint is of a newer format version.
        CorruptError: there are checkpoints, and every one of them is damaged.
    """
    if not folder.is_dir():
        return None
    _rust.sweep_tmp(str(folder))  # of writers that were killed
    names = sorted((p.name for p in folder.glob("step-*") if p.is_dir()), reverse=True)
    pointer = folder / "LATEST"
    first = pointer.read_text("utf-8", errors="replace").strip() if pointer.is_file() else ""
    if first in names:
        names.remove(first)
        names.insert(0, first)
    damage: CorruptError | None = None
    for name in names:
        try:
            return load(folder / name)
        except FormatError:
            raise
        except (CorruptError, OSError) as error:
            damage = damage or (
                error if isinstance(error, CorruptError) else CorruptError(str(error), where=name)
            )
    if damage is not None:
        raise CorruptError(
            f"No checkpoint of this run verifies; the first fault: {damage.what}",
            where=damage.where or folder,
            fix="run the stage again with --fresh",
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        CorruptError: a file is missing, damaged, or is not the one that state.json names.
        FormatError: it is of a newer version.
    """
    state = read_state(path)
    for name, want in state["sha256"].items():
        file = path / Path(name).name
        if not file.is_file() or sha256_file(file) != want:
            raise CorruptError(
                "A checkpoint file is missing or is not the one that was written.",
                where=file,
                fix="remove this checkpoint's directory; the one before it is used then",
            )
    return Checkpoint(
        path=path,
        state=state,
        model=container.load_torch(path / "model.safetensors", kind=f"{FORMAT}.model"),
        optimizer=container.load_torch(path / "optimizer.safetensors", kind=f"{FORMAT}.optimizer"),
    )


def oldest(folder: Path) -> int:
    """Steps of the oldest checkpoint of a run, 0 without any."""
    return min((int(p.name[5:]) for p in folder.glob("step-*") if p.is_dir()), default=0)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint, verified by its own CRC-32C."""
    file = path / "state.json"
    if not file.is_file():
        raise CorruptError("The checkpoint has no state.json.", where=path, fix="remove it")
    state: dict[str, Any] = json.loads(_rust.read_manifest(str(file)))
    if state.get("format") != FORMAT:
        raise CorruptError("This state.json is not of a checkpoint.", where=file)
    if int(state["version"]) > VERSION:
        raise FormatError(
            f"The checkpoint is of format version {state['version']}, this embkit reads {VERSION}.",
            where=file,
            fix="upgrade embkit",
        )
    if set(state.get("sha256", ())) != {"model.safetensors", "optimizer.safetensors"}:
        raise CorruptError("The checkpoint's state.json names other files.", where=file)
    return state


def name_of(step: int) -> str:
    """Directory name of the checkpoint after ``step`` steps."""
    return f"step-{step:06d}"


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    total = hashlib.sha256()
    hash_tensors(total, tensors)
    return total.hexdigest()


def prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove checkpoints beyond ``keep``; also at resume, for a run killed just before this."""
    old = sorted((p for p in folder.glob("step-*") if p.is_dir() and p != newest), reverse=True)
    for path in old[max(keep, 1) - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
