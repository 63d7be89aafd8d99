"""TensorBoard's event files, written here, so that every run has them without a further package.

``torch.utils.tensorboard`` needs the ``tensorboard`` package with its server, gRPC and protobuf;
what a run logs are scalars, a few dozen bytes each in two small formats:

- records (TFRecord): length u64, masked CRC-32C of it, data, masked CRC-32C of the data;
- data (protobuf ``Event``): wall_time = 1 (double), step = 2 (varint), file_version = 3 (string),
  summary = 5 {value = 1 {tag = 1, simple_value = 2 (float)}}, session_log = 7 {status = 1}.

A run that is resumed starts a new file whose session log says START at its first step: TensorBoard
then drops what older files have of that step and later ones.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from embkit import _rust
from embkit.train import statistics
from embkit.train.callbacks import About, Callback

FOLDER = "tensorboard"
_FLUSH = 10.0  # seconds


class TensorBoard(Callback):
    """Writes scalars of every step to ``tensorboard/RUN`` beside the run directory.

    Beside it, not in it: events hold times, and what is published is the same bytes each time.
    """

    def on_start(self, about: About) -> None:
        folder = about.out.parent / FOLDER / about.out.name
        folder.mkdir(parents=True, exist_ok=True)
        self._events = Events(folder, first_step=about.start + 1)

    def on_step(self, step: int, line: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self._events.write(step, scalars(line, speed))

    def on_evaluate(self, step: int, scores: Mapping[str, Any]) -> None:
        self._events.write(step, evaluation_scalars(scores))

    def on_end(self, done: bool) -> None:
        self._events.close()


def scalars(line: Mapping[str, Any], speed: Mapping[str, float]) -> dict[str, float]:
    """Numbers of a step by tag, the same for every place that they are reported to."""
    found = {"train/loss": line["loss"], f"train/loss_{line['task']}": line["loss"]}
    found |= {f"train/loss_at_{dim}": value for dim, value in line["loss_per_dim"].items()}
    found["train/lr"] = line["lr"]
    if line["grad_norm"] is not None:  # fp16 that overflowed has none
        found["train/grad_norm"] = line["grad_norm"]
    found |= statistics.scalars(line.get("statistics", {}))
    return found | {f"speed/{name}": value for name, value in speed.items()}


def evaluation_scalars(scores: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation by tag: the means by width, and by kind of task."""
    found = {f"dev/mean_at_{dim}": value for dim, value in scores["mean"].items()}
    for kind, widths in scores["types"].items():
        found |= {f"dev/{kind}_at_{dim}": value for dim, value in widths.items()}
    return found


class Events:
    """One event file.

    Args:
        folder: where; the name carries the time, the host and the process, as TensorBoard's does.
        first_step: the first that will be written; what older files have from it on is void.
    """

    def __init__(self, folder: Path, *, first_step: int = 1) -> None:
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._handle: IO[bytes] = self.path.open("wb")
        self._flushed = time.monotonic()
        self._record(_double(1, now) + _bytes(3, b"brain.Event:2"))
        self._record(_double(1, now) + _varint(2, first_step) + _bytes(7, _varint(1, 1)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One event with scalars by tag; on disk within ten seconds."""
        summary = b"".join(
            _bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items()
        )
        self._record(_double(1, time.time()) + _varint(2, step) + _bytes(5, summary))
        if time.monotonic() - self._flushed > _FLUSH:
            self._handle.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self._handle.close()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._handle.write(length + _masked(length) + data + _masked(data))


def _masked(data: bytes) -> bytes:
    """CRC-32C, rotated and shifted so that a checksum of checksums stays sound."""
    crc = _rust.crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _double(field: int, value: float) -> bytes:
    return _number(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _number(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(value)) + value
