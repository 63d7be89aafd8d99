"""Embeddings that are there already, from any program: mapped, never read into memory as a whole.

A ``.npy`` file, a ``.safetensors`` file or a folder of such shards. Nothing in them can run code:
the header of a ``.npy`` file is matched, not evaluated, and an array of Python objects is refused
before anything of it is read.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.errors import CorruptError, UsageError

NAME = "embedding"
_SUFFIXES = (".npy", ".safetensors")
_HEADER = 1 << 16  # bytes; numpy writes 128
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the embeddings, as far as their files say; ``None`` is not said.

    Attributes:
        model: digest or name of the model. pooling: its pooling.
        prompts: prompt name to text. width: numbers of a vector. normalised: unit length.
    """

    model: str | None = None
    pooling: str | None = None
    prompts: dict[str, str] | None = None
    width: int | None = None
    normalised: bool | None = None


def load_vectors(path: Path | str) -> list[NDArray[Any]]:
    """Map embeddings as read-only arrays [*, d], float32 or float16, all of one width and type.

    Args:
        path: a ``.npy`` file in C order; a ``.safetensors`` file with a tensor ``embedding`` or one
            float tensor of two dimensions; or a folder of such files, which follow one another in
            the order of their names. Files that embkit wrote are verified here.

    Returns:
        One array a file; row ``i`` of the embeddings is row ``i`` of their concatenation.

    Raises:
        UsageError: not two-dimensional, another type, no rows, different widths, another order.
        CorruptError: truncated or damaged, an array of Python objects, a shard that is missing.
    """
    files = _files(Path(path))
    arrays = [_open(file)[0] for file in files]
    first = arrays[0]
    for file, array in zip(files, arrays, strict=True):
        if array.shape[1] != first.shape[1] or array.dtype != first.dtype:
            raise UsageError(
                f"Shards differ: {first.dtype} [*, {first.shape[1]}] in {files[0].name}, "
                f"{array.dtype} [*, {array.shape[1]}] here.",
                where=file,
                fix="give shards of one model, width and type",
            )
    return arrays


def vectors_origin(path: Path | str) -> Origin | None:
    """What the files of :func:`load_vectors` say of the model; ``None`` when they say nothing.

    Raises:
        UsageError: shards of different models. CorruptError: as :func:`load_vectors`.
    """
    files = _files(Path(path))
    origins = [_origin(file, _open(file)[1]) for file in files]
    for file, origin in zip(files, origins, strict=True):
        if origin != origins[0]:
            raise UsageError(
                f"Shards of different origin: {origins[0]} in {files[0].name}, {origin} here.",
                where=file,
                fix="give shards of one model with the same pooling, prompts and width",
            )
    return origins[0] if origins[0] != Origin() else None


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError("There are no such embeddings.", where=path)
    if path.is_file():
        return [path]
    files = sorted(
        (p for p in path.iterdir() if p.suffix in _SUFFIXES and not p.name.startswith(".")),
        key=lambda p: p.name,
    )
    if not files:
        raise UsageError("This folder has no .npy or .safetensors files.", where=path)
    if len({p.suffix for p in files}) > 1:
        raise UsageError(
            "This folder has both .npy and .safetensors files.",
            where=path,
            fix="keep the shards of one corpus in a folder of their own",
        )
    if files != sorted(files, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)]):
        raise UsageError(
            "The names of the shards and the numbers in them give different orders.",
            where=path,
            fix="fill the numbers with zeros to one length: part-02.npy before part-10.npy",
        )
    counts = {int(m[2]) for p in files if (m := _SHARD.search(p.stem))}
    if counts and counts != {len(files)}:
        raise CorruptError(
            f"{len(files)} shards are here, their names say {min(counts)}.",
            where=path,
            fix="bring the missing ones, or remove what does not belong here",
        )
    return files


def _open(path: Path) -> tuple[NDArray[Any], dict[str, str]]:
    if path.suffix == ".npy":
        array, meta = _open_npy(path), dict[str, str]()
    elif path.suffix == ".safetensors":
        array, meta = _open_safetensors(path)
    else:
        raise UsageError(
            f"Embeddings in a {path.suffix or 'nameless'} file are not read.",
            where=path,
            fix="numpy.save('vectors.npy', vectors.astype('float32')), and give that file",
        )
    if array.ndim != 2 or 0 in array.shape:
        raise UsageError(
            f"The array has the shape {list(array.shape)}; embeddings are [rows, width].",
            where=path,
        )
    return array, meta


def _open_npy(path: Path) -> NDArray[Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
        length = 2 if start[6:7] == b"\x01" else 4
        header = int.from_bytes(start[8 : 8 + length], "little")
        if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2, 3) or header > _HEADER:
            raise CorruptError(
                "This is not a .npy file of one array.",
                where=path,
                fix="write it with numpy.save(path, array)",
            )
        file.seek(8 + length)
        text = file.read(header).decode("latin-1")
    found = [
        re.search(pattern, text)
        for pattern in (
            r"""["']descr["']\s*:\s*["']([^"']{1,16})["']""",
            r"""["']fortran_order["']\s*:\s*(True|False)""",
            r"""["']shape["']\s*:\s*\(([0-9, ]{0,80})\)""",
        )
    ]
    kind, order, dims = (m[1] if m else "" for m in found)
    shape = [int(n) for n in dims.split(",") if n.strip()]
    if not all(found[1:]) or "O" in kind:
        raise CorruptError(
            "The array holds Python objects, which only pickle could read, or its header is "
            "damaged.",
            where=path,
            fix="numpy.save(path, numpy.stack(list_of_vectors).astype('float32'))",
        )
    if kind not in ("<f4", "<f2"):
        raise _wrong_type(path, kind or "a structure", "vectors.astype('float32')")
    if order == "True" and len(shape) == 2 and min(shape) > 1:
        raise UsageError(
            "The array is in Fortran order: a vector does not lie in one piece.",
            where=path,
            fix="numpy.save(path, numpy.ascontiguousarray(vectors))",
        )
    dtype = np.dtype(kind)
    needed = 8 + length + header + dtype.itemsize * int(np.prod(shape, dtype=object))
    if size != needed:
        raise CorruptError(
            f"The file has {size:,} bytes, its header says {needed:,}.",
            where=path,
            fix="write or copy it again",
        )
    if 0 in shape:
        return np.empty(shape, dtype)
    mapped = np.memmap(path, dtype, mode="r", offset=8 + length + header, shape=tuple(shape))
    return mapped.view(np.ndarray)


def _open_safetensors(path: Path) -> tuple[NDArray[Any], dict[str, str]]:
    tensors, meta = _rust.open_tensors(os.fspath(path), "foreign")
    if meta.get("format", "").startswith("embkit."):
        tensors, meta = _rust.open_tensors(os.fspath(path), "open")
    flat = [n for n, (code, a) in tensors.items() if a.ndim == 2 and code in ("F32", "F16", "BF16")]
    name = NAME if NAME in tensors else flat[0] if len(flat) == 1 else None
    if name is None:
        raise UsageError(
            f"No tensor {NAME!r} and {len(flat)} float tensors of two dimensions: "
            f"{', '.join(sorted(tensors)[:8]) or 'the file is empty'}.",
            where=path,
            fix=f"call the embeddings {NAME!r}",
        )
    code, array = tensors[name]
    if code == "BF16":
        raise _wrong_type(path, "bfloat16", "torch_vectors.float().numpy()")
    if code not in ("F32", "F16"):
        raise _wrong_type(path, code, "vectors.astype('float32')")
    return (array.view(np.float16) if code == "F16" else array), meta


def _wrong_type(path: Path, found: str, vectors: str) -> UsageError:
    return UsageError(
        f"The embeddings are {found}; float32 and float16 are read.",
        where=path,
        fix=f"import numpy\n         numpy.save('vectors.npy', {vectors})",
    )


def _origin(path: Path, meta: dict[str, str]) -> Origin:
    """The metadata of a safetensors file that embkit, or somebody with the same names, wrote."""
    try:
        prompts = json.loads(meta["prompts"]) if "prompts" in meta else None
        width = int(meta["width"]) if "width" in meta else None
    except ValueError as error:
        raise CorruptError(f"The metadata is damaged: {error}", where=path) from None
    if prompts is not None and not isinstance(prompts, dict):
        raise CorruptError("The metadata is damaged: prompts is no object.", where=path)
    normalised = {"true": True, "false": False}.get(meta.get("normalised", "").lower())
    return Origin(
        model=meta.get("model"),
        pooling=meta.get("pooling"),
        prompts=prompts,
        width=width,
        normalised=normalised,
    )
