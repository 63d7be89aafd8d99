"""Weights of model directories on disk: where each tensor lies, and blocks of it in memory.

Blocks are read, not mapped: a mapped file counts as memory of the process and costs a page fault
every few pages, a block that is read stays in the processor's cache until it is added.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from embkit.errors import CorruptError, UsageError

BLOCK = 1 << 18  # elements: 1 MB of float32, which two of fit into a second-level cache
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}
_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "BOOL": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
}  # fmt: skip
Key = tuple[str, str]  # folder inside the model directory, name of the tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies.

    Attributes:
        file: a safetensors file. start: of its bytes there.
        dtype: as safetensors names it. shape: in elements.
    """

    file: Path
    start: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes."""
        return self.count * _BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        raw: its bytes, with the length before them. names: of its tensors, in file order.
        metadata: its strings.
    """

    raw: bytes
    names: tuple[str, ...]
    metadata: Mapping[str, str] | None


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model directory, by name."""
    return sorted(p for p in model.rglob("*.safetensors") if p.is_file())


def read_header(path: Path) -> tuple[Header, dict[str, Place]]:
    """The header of a safetensors file, checked, and where its tensors lie.

    Raises:
        CorruptError: it is damaged. UsageError: it holds a type that no average is defined for.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks lengths, offsets and names
            pass
    except (SafetensorError, OSError) as error:
        raise CorruptError(
            f"The weights cannot be read: {error}", where=path, fix="copy the model again"
        ) from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        raw = file.read(length)
    entries = json.loads(raw)
    metadata = entries.pop("__metadata__", None)
    order = sorted(entries, key=lambda name: (entries[name]["data_offsets"], name))
    places = {}
    for name in order:
        entry = entries[name]
        if entry["dtype"] not in _BYTES:
            raise UsageError(
                f"Tensor {name!r} is of type {entry['dtype']}, which embkit does not average.",
                where=path,
                fix="save the model in float32, bfloat16 or float16",
            )
        places[name] = Place(
            file=path, start=8 + length + int(entry["data_offsets"][0]), dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
        )  # fmt: skip
    header = struct.pack("<Q", length) + raw
    return Header(raw=header, names=tuple(order), metadata=metadata), places


def tensors_of(model: Path) -> dict[Key, Place]:
    """Every tensor of a model directory, whether its weights are one file or several."""
    found: dict[Key, Place] = {}
    for path in weight_files(model):
        folder = path.parent.relative_to(model).as_posix()
        for name, place in read_header(path)[1].items():
            found[folder, name] = place
    return found


def widest(places: Sequence[Place]) -> str:
    """The type that holds all of these: of half types that differ, F32."""
    codes = [place.dtype for place in places]
    if all(code == codes[0] for code in codes):
        return codes[0]
    dtype = FLOATS[codes[0]]
    for code in codes[1:]:
        dtype = torch.promote_types(dtype, FLOATS[code])
    return _CODES[dtype]


def header_bytes(header: Header, places: Mapping[str, Place], dtypes: Mapping[str, str]) -> bytes:
    """The header with these types: the very bytes of ``header`` where they are its own."""
    if all(places[name].dtype == dtypes[name] for name in header.names):
        return header.raw
    entries: dict[str, object] = {}
    if header.metadata is not None:
        entries["__metadata__"] = header.metadata
    start = 0
    for name in header.names:
        size = places[name].count * _BYTES[dtypes[name]]
        entries[name] = {
            "dtype": dtypes[name],
            "shape": list(places[name].shape),
            "data_offsets": [start, start + size],
        }
        start += size
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class Reader:
    """Reads blocks of tensors; a context that closes its files."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        self._raw = torch.empty(BLOCK * 8, dtype=torch.uint8)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def bytes(self, place: Place) -> Iterator[memoryview]:
        """The bytes of a tensor, a block at a time; a block is good until the next is asked for."""
        for at in range(0, place.bytes, len(self._raw)):
            size = min(len(self._raw), place.bytes - at)
            yield self._fill(place, at, size)

    def into(self, out: torch.Tensor, place: Place, at: int) -> None:
        """Elements ``at`` to ``at + len(out)`` of a floating tensor, converted to ``out``'s type.

        Args:
            out: [n], at most ``BLOCK`` elements.
        """
        dtype = FLOATS[place.dtype]
        item = _BYTES[place.dtype]
        if dtype == out.dtype:
            view = out.view(torch.uint8).numpy().data
            self._read(place, at * item, view)
            return
        size = len(out) * item
        self._fill(place, at * item, size)
        out.copy_(self._raw[:size].view(dtype))

    def _fill(self, place: Place, at: int, size: int) -> memoryview:
        view = self._raw.numpy().data[:size]
        self._read(place, at, view)
        return view

    def _read(self, place: Place, at: int, view: memoryview) -> None:
        if place.file not in self._files:
            opened = self._stack.enter_context(place.file.open("rb", buffering=0))
            self._files[place.file] = opened  # type: ignore[assignment]
        file = self._files[place.file]
        file.seek(place.start + at)
        while view:
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise CorruptError(
                    "The file ends before its last tensor.", where=place.file, fix="copy it again"
                )
            view = view[count:]
