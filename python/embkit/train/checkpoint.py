"""Checkpoints: safetensors and JSON, whole or absent, never a pickle.

``checkpoints/step-000100/{model.safetensors, optimizer.safetensors, state.json}`` and a ``LATEST``
pointer. With several ranks each writes its own two files, ``model-00001-of-00004.safetensors``,
side by side, and the reader puts tensors together again, for any number of ranks. A checkpoint is
written to a temporary directory, renamed as one step, and only then does LATEST move and only then
are old ones removed; a kill at any point leaves a checkpoint that verifies. state.json holds the
SHA-256 of all other files, and readers trust nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embkit import _rust, container
from embkit.errors import CorruptError, EmbkitError, FormatError
from embkit.model.encoder import hash_tensors

VERSION = 1
FORMAT = "embkit.checkpoint"
KINDS = ("model", "optimizer")
_POLL = 0.02  # seconds between looks for the files of other ranks


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some rows of a tensor that ranks hold together.

    Attributes:
        value: [r, ...], this rank's rows, possibly none.
        start: the first of them. shape: of the whole tensor.
    """

    value: torch.Tensor
    start: int
    shape: tuple[int, ...]


Named = Mapping[str, "torch.Tensor | Part"]


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
    model: Tensors
    optimizer: Tensors


class Tensors(Mapping[str, torch.Tensor]):
    """Whole tensors by name, put together from the files of any number of ranks.

    Raises:
        CorruptError: parts overlap, leave a gap, or are of different types.
    """

    def __init__(self, files: list[Path], kind: str) -> None:
        self._parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            held = container.load_torch(file, kind=kind, copy=False)
            places = json.loads(container.metadata(file).get("parts", "{}"))
            for name, tensor in held.items():
                start, *shape = places.get(name, (0, *tensor.shape))
                if self._shapes.setdefault(name, tuple(shape)) != tuple(shape):
                    raise _misfit(file, name)
                self._parts.setdefault(name, []).append((start, tensor))
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part[0])
            rows, shape, dtype = 0, self._shapes[name], parts[0][1].dtype
            for start, tensor in parts:
                whole = len(parts) == 1 and tensor.shape == shape and start == 0
                if not whole and (start != rows or tensor.shape[1:] != shape[1:]):
                    raise _misfit(files[0], name)
                if tensor.dtype != dtype:
                    raise _misfit(files[0], name)
                rows += len(tensor) if shape else 0
            if shape and rows != shape[0]:
                raise _misfit(files[0], name)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [tensor for _, tensor in self._parts[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of a tensor, without reading the others."""
        found = [
            tensor[max(start - first, 0) : max(stop - first, 0)]
            for first, tensor in self._parts[name]
        ]
        return torch.cat(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class Saver:
    """Saves the checkpoints of a run, in the foreground or behind the training.

    Args:
        folder: the ``checkpoints`` directory of the run.
        keep: checkpoints that stay, at least 1; the best one stays too.
        background: copy the tensors, go on, and let a thread write them. The next save, and
            :meth:`wait`, wait for it.
        rank, world: this process among those that share the run; they see one file system.
        patience: seconds that the first rank waits for the files of others when it has its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        background: bool = False,
        rank: int = 0,
        world: int = 1,
        patience: float = 600.0,
    ) -> None:
        self.folder, self.keep, self.background = folder, keep, background
        self.rank, self.world, self.patience = rank, world, patience
        self._thread: threading.Thread | None = None
        self._trouble: BaseException | None = None

    def save(
        self,
        *,
        step: int,
        model: Named,
        optimizer: Named,
        state: Mapping[str, Any],
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> Path:
        """As the function :func:`save`; returns the directory, which may be there only later.

        Raises:
            What the write before this one raised behind the training.
        """
        self.wait()
        self.folder.mkdir(parents=True, exist_ok=True)
        mine: dict[str, Named] = {}
        for kind, tensors in zip(KINDS, (model, optimizer), strict=True):
            mine[kind] = _share(tensors, self.rank, self.world)
        mine["optimizer"] = {**mine["optimizer"], **(own or {})}
        job = (step, mine, dict(state))
        if self.background:
            copies = {kind: _copies(tensors) for kind, tensors in mine.items()}
            self._thread = threading.Thread(
                target=self._behind, args=(step, copies, dict(state)), name="embkit-checkpoint"
            )
            self._thread.start()
        else:
            self._write(*job)
        return self.folder / name_of(step)

    def wait(self) -> None:
        """Until what is being written is published; raises what writing it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._trouble is not None:
            trouble, self._trouble = self._trouble, None
            raise trouble

    def close(self) -> None:
        """Let a write that is under way end; its trouble is no news any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _behind(self, *job: Any) -> None:
        try:
            self._write(*job)
        except BaseException as error:  # raised again by wait(), in the thread of the training
            self._trouble = error

    def _write(self, step: int, mine: Mapping[str, Named], state: dict[str, Any]) -> None:
        final = self.folder / name_of(step)
        if self.world == 1:
            work = Path(_rust.temp_path(str(final)))
            work.mkdir()
            try:
                self._publish(work, final, state, _write_files(work, mine, ""))
            finally:  # a disk that is full leaves nothing of this one, and those before it
                shutil.rmtree(work, ignore_errors=True)
            return
        work = self.folder / f".{final.name}-of-{self.world}.saving"
        work.mkdir(exist_ok=True)
        hashes = _write_files(work, mine, f"-{self.rank:05d}-of-{self.world:05d}")
        told = json.dumps(hashes).encode()
        _rust.publish_file(str(work / f"rank-{self.rank:05d}.json"), told)
        if self.rank == 0:
            try:
                self._publish(work, final, state, self._of_all(work))
            finally:
                shutil.rmtree(work, ignore_errors=True)

    def _of_all(self, work: Path) -> dict[str, str]:
        """What every rank says of its files, when all have said it.

        No collective: a checkpoint may be written by a thread, beside the collectives of a step.
        """
        hashes: dict[str, str] = {}
        until = time.monotonic() + self.patience
        for rank in range(self.world):
            told = work / f"rank-{rank:05d}.json"
            while not told.is_file():
                if time.monotonic() > until:
                    raise EmbkitError(
                        f"Rank {rank} did not write its part of the checkpoint in "
                        f"{self.patience:g} s.",
                        where=work,
                        fix="look at that rank's log; all ranks must see the same output directory",
                    )
                time.sleep(_POLL)
            hashes |= json.loads(told.read_bytes())
            told.unlink()
        return hashes

    def _publish(
        self, work: Path, final: Path, state: dict[str, Any], hashes: Mapping[str, str]
    ) -> None:
        content = {
            **state,
            "format": FORMAT,
            "version": VERSION,
            "step": step_of(final),
            "sha256": dict(hashes),
        }
        _rust.write_manifest(str(work / "state.json"), json.dumps(content))
        _rust.publish_dir(str(work), str(final))
        _rust.publish_file(str(self.folder / "LATEST"), f"{final.name}\n".encode())
        prune(self.folder, final, self.keep, best=best_of(state))


def save(
    folder: Path,
    *,
    step: int,
    model: Named,
    optimizer: Named,
    state: Mapping[str, Any],
    own: Mapping[str, torch.Tensor] | None = None,
    keep: int = 2,
    rank: int = 0,
    world: int = 1,
) -> Path:
    """Publish the checkpoint of a step, then point LATEST at it, then remove old ones.

    Args:
        folder: the ``checkpoints`` directory of a run.
        step: steps done.
        model, optimizer: tensors by name. With several ranks a plain tensor is the same on every
            rank and one of them writes it; a :class:`Part` is written by the rank that has it.
        state: JSON fields for state.json; format, version, step and file hashes are added.
            ``best`` in it, ``{"step": ...}``, names a checkpoint that stays.
        own: tensors of this rank alone, under names of its own, kept with the optimizer's.
        keep: checkpoints that stay, at least 1.
        rank, world: of this process; each rank calls this once, rank 0 publishes.

    Returns:
        The checkpoint's directory.

    Raises:
        EmbkitError: the files of another rank do not come.
    """
    saver = Saver(folder, keep=keep, rank=rank, world=world)
    return saver.save(step=step, model=model, optimizer=optimizer, state=state, own=own)


def load_latest(folder: Path, *, rank: int = 0) -> Checkpoint | None:
    """The checkpoint LATEST names, or the newest that verifies; None when there is none.

    Every rank reads it before any of them saves; rank 0 also removes what a killed run left.

    Raises:
        FormatError: the newest checkpoint is of a newer format version.
        CorruptError: there are checkpoints, and every one of them is damaged.
    """
    if not folder.is_dir():
        return None
    _rust.sweep_tmp(str(folder))  # of writers that were killed
    if rank == 0:
        for left in folder.glob(".step-*.saving"):  # of ranks that were
            shutil.rmtree(left, ignore_errors=True)
    names = [path.name for path in newest_first(folder)]
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
    held = {
        kind: Tensors(
            [path / n for n in sorted(state["sha256"]) if n.startswith(kind)], f"{FORMAT}.{kind}"
        )
        for kind in KINDS
    }
    return Checkpoint(path=path, state=state, model=held["model"], optimizer=held["optimizer"])


def oldest(folder: Path) -> int:
    """Steps of the oldest checkpoint of a run, 0 without any."""
    return min(map(step_of, newest_first(folder)), default=0)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run by their steps; a directory of any other name is none of them."""
    named = [p for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(named, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Steps done of a checkpoint, by its name."""
    return int(path.name[5:])


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
    world = int(state.get("world", 1))
    if set(state.get("sha256", ())) != {f"{k}{s}.safetensors" for k in KINDS for s in _ends(world)}:
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


def best_of(state: Mapping[str, Any]) -> int:
    """Step of the best checkpoint that a state names, 0 for none."""
    return int((state.get("best") or {}).get("step", 0))


def prune(folder: Path, newest: Path, keep: int, *, best: int = 0) -> None:
    """Remove checkpoints beyond ``keep``; also at resume, for a run killed just before this."""
    spared = {newest.name, name_of(best)}
    # A newer one is damaged, or the run would have gone on from it: it takes no sound one's place.
    old = [p for p in newest_first(folder) if step_of(p) < step_of(newest)]
    for path in old[max(keep, 1) - 1 :]:
        if path.name not in spared:
            # First out of sight as one step: a kill would leave half a checkpoint under its name.
            going = Path(_rust.temp_path(str(path)))
            with suppress(OSError):
                path.rename(going)
                shutil.rmtree(going, ignore_errors=True)


def _ends(world: int) -> list[str]:
    """What follows the kind in the names of a checkpoint's files."""
    return [""] if world == 1 else [f"-{r:05d}-of-{world:05d}" for r in range(world)]


def _share(tensors: Named, rank: int, world: int) -> Named:
    """What a rank writes: its parts, and the plain tensors that are dealt to it by size."""
    if world == 1:
        return tensors
    load, mine = [0] * world, {}
    plain = [(name, t) for name, t in tensors.items() if isinstance(t, torch.Tensor)]
    for name, tensor in sorted(plain, key=lambda item: (-item[1].nbytes, item[0])):
        owner = load.index(min(load))
        load[owner] += tensor.nbytes
        if owner == rank:
            mine[name] = tensor
    return {**mine, **{n: t for n, t in tensors.items() if isinstance(t, Part) and len(t.value)}}


def _copies(tensors: Named) -> Named:
    """The same in memory that training does not write to."""

    def copied(value: torch.Tensor) -> torch.Tensor:
        return value.detach().to("cpu", copy=True)

    return {
        name: Part(value=copied(t.value), start=t.start, shape=t.shape)
        if isinstance(t, Part)
        else copied(t)
        for name, t in tensors.items()
    }


def _write_files(work: Path, mine: Mapping[str, Named], end: str) -> dict[str, str]:
    """Write one file of each kind; their SHA-256 by name."""
    hashes = {}
    for kind, tensors in mine.items():
        file = work / f"{kind}{end}.safetensors"
        parts = {n: (t.start, *t.shape) for n, t in tensors.items() if isinstance(t, Part)}
        container.save(
            file,
            {n: t.value if isinstance(t, Part) else t for n, t in tensors.items()},
            kind=f"{FORMAT}.{kind}",
            metadata={"parts": json.dumps(parts)} if parts else None,
        )
        hashes[file.name] = sha256_file(file)
    return hashes


def _misfit(file: Path, name: str) -> CorruptError:
    return CorruptError(
        f"The parts of tensor {name!r} in the checkpoint do not fit together.",
        where=file.parent,
        fix="remove this checkpoint's directory; the one before it is used then",
    )
