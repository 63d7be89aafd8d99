"""Read and write embkit's one container: checksummed ``.safetensors`` files and JSON manifests.

The bytes are written, published and verified by the Rust core (docs/formats.md); this module only
carries numpy arrays and torch tensors in and out. Any safetensors reader opens the files.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import _rust
from embkit.errors import CorruptError

if TYPE_CHECKING:
    import torch

VERSION = 1

_DTYPES = {
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "float32": "F32", "float64": "F64", "bool": "BOOL",
}  # fmt: skip


def _parts(name: str, value: np.ndarray | torch.Tensor) -> tuple[str, str, list[int], np.ndarray]:
    """Name, dtype code, shape and raw bytes (u8, contiguous, no copy where possible)."""
    if not isinstance(value, np.ndarray):
        import torch

        tensor = value.detach().cpu().contiguous()
        shape = list(tensor.shape)
        if tensor.dtype == torch.bfloat16:
            raw = tensor.view(torch.uint16).numpy()
            return name, "BF16", shape, raw.reshape(-1).view(np.uint8)
        value = tensor.numpy()
    shape = list(value.shape)
    array = np.ascontiguousarray(value)
    code = _DTYPES.get(array.dtype.name)
    if code is None:
        raise TypeError(f"{name}: dtype {array.dtype} cannot be stored in safetensors")
    return name, code, shape, array.reshape(-1).view(np.uint8)


def save(
    path: Path | str,
    tensors: Mapping[str, np.ndarray | torch.Tensor],
    *,
    kind: str,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write tensors to one checksummed file, published atomically.

    Args:
        path: the final name; written beside it, fsynced, then renamed.
        tensors: name to array of any shape (bfloat16 as a torch tensor).
        kind: what the file holds, e.g. ``"embkit.negatives"``; stored with the format version.
        metadata: further strings for the file's header.

    Returns:
        ``{"length", "header_crc", "crc_crc"}``, what a manifest records of the file.
    """
    meta = {**(metadata or {}), "format": kind, "version": str(VERSION)}
    return _rust.write_tensors(str(path), [_parts(k, v) for k, v in tensors.items()], meta)


def load(
    path: Path | str, *, kind: str | None = None, verify: str = "first-touch"
) -> dict[str, np.ndarray]:
    """Map a file and return its tensors as read-only numpy views, without ``crc``.

    Args:
        path: a file written by :func:`save`.
        kind: refuse a file that holds something else.
        verify: ``"first-touch"``, ``"open"`` or ``"off"``.

    Raises:
        CorruptError: damaged, truncated, or of another kind. FormatError: of a newer version.
    """
    tensors, meta = _rust.open_tensors(str(path), verify)
    _check_kind(path, meta, kind)
    return {name: array for name, (_, array) in tensors.items() if name != "crc"}


def load_torch(
    path: Path | str, *, kind: str | None = None, verify: str = "open", copy: bool = True
) -> dict[str, torch.Tensor]:
    """As :func:`load`, as torch tensors (bfloat16 included).

    Args:
        copy: into memory of their own; without it they are views of the mapped file and must not
            be written to.
    """
    import torch

    tensors, meta = _rust.open_tensors(str(path), verify)
    _check_kind(path, meta, kind)
    out = {}
    for name, (code, array) in tensors.items():
        if name == "crc":
            continue
        if copy:
            tensor = torch.from_numpy(array.copy())
        else:
            with warnings.catch_warnings():  # torch has no read-only tensors and says so
                warnings.simplefilter("ignore", UserWarning)
                tensor = torch.from_numpy(array)
        as_dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(code)
        out[name] = tensor.view(as_dtype) if as_dtype is not None else tensor
    return out


def metadata(path: Path | str) -> dict[str, str]:
    """The header's strings: format, version and what the writer added."""
    return _rust.open_tensors(str(path), "off")[1]


def _check_kind(path: Path | str, meta: Mapping[str, str], kind: str | None) -> None:
    if kind is not None and meta.get("format") != kind:
        raise CorruptError(
            f"This file holds {meta.get('format', 'no embkit data')}, not {kind}.",
            where=path,
            fix=f"give the path of a {kind} file",
        )


def write_manifest(directory: Path | str, content: Mapping[str, Any]) -> None:
    """Publish ``directory/manifest.json``: canonical JSON that carries its own CRC-32C."""
    _rust.write_manifest(str(Path(directory) / "manifest.json"), json.dumps(content))


def read_manifest(directory: Path | str, *, kind: str | None = None) -> dict[str, Any]:
    """Read and verify ``directory/manifest.json``.

    Raises:
        CorruptError: the directory is no embkit output, is damaged, or is of another kind.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise CorruptError(
            "No manifest.json here: this is not a finished embkit output.",
            where=directory,
            fix="give the directory that an embkit stage wrote, or run that stage again",
        )
    content: dict[str, Any] = json.loads(_rust.read_manifest(str(path)))
    if kind is not None and content.get("format") != kind:
        raise CorruptError(
            f"This directory holds {content.get('format')}, not {kind}.",
            where=directory,
            fix=f"give a directory of kind {kind}",
        )
    return content
