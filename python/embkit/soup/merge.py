"""Linear combinations of model directories, written block by block.

Every merge is one: the mean has the same weights for every tensor, a slerp has weights of each
tensor that follow from the inner products of its ingredients, and a mix with a base scales those
and gives the rest to the base. So a merge reads each ingredient once (twice for slerp) and holds a
few blocks of a megabyte in memory, however large the tensors and however many the models.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from embkit.errors import UsageError, nearest
from embkit.soup.files import (
    BLOCK,
    FLOATS,
    Key,
    Place,
    Reader,
    header_bytes,
    read_header,
    tensors_of,
    widest,
)

HOW = ("mean", "slerp")
# Weights in forms that are not merged: a copy would be of the first model alone.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".h5", ".msgpack", ".gguf")


def merge(
    models: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "mean",
    base: Path | None = None,
    alpha: float = 1.0,
) -> Path:
    """Write the weighted average of model directories, a block of a tensor at a time.

    Args:
        models: directories of the same tensors; files other than weights come from the first.
        out: replaced when it exists.
        weights: one per model, equal by default; divided by their sum.
        how: ``"mean"``, or ``"slerp"``, which takes weight w of the k-th model as the place
            w / (w_1 + ... + w_k) on the arc from what the models before it gave, tensor by tensor.
        base, alpha: write base + alpha * (average - base): 0 is the base, 1 the average.

    Raises:
        UsageError: tensors differ in name or shape, or integer tensors in value.
        CorruptError: damaged weights.
    """
    if how not in HOW:
        raise UsageError(f"Unknown merge {how!r}; {nearest(how, HOW)}", where="how")
    share = shares(weights, len(models))
    first = models[0]
    everything = [*models, *([base] if base is not None else [])]
    for model in everything:
        if Path(out).resolve() in (model.resolve(), *model.resolve().parents):
            raise UsageError(
                "The merge would replace what it reads: a model lies in its output directory.",
                where=out,
                fix="give another directory",
            )
    held = [tensors_of(model) for model in everything]
    check_tensors(everything, held)
    shutil.rmtree(out, ignore_errors=True)
    with Reader() as reader:
        for path in sorted(p for p in first.rglob("*") if p.is_file()):
            name = path.relative_to(first)
            target = out / name
            if path.suffix in _OTHER_WEIGHTS and len(everything) > 1:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors" and len(everything) > 1:
                folder = name.parent.as_posix()
                _merge_file(path, folder, target, held, share, how, alpha, reader)
            elif path.name == "embkit.json" and len(everything) > 1:  # its digest is of one model
                content = json.loads(path.read_text(encoding="utf-8"))
                write_json(target, {k: v for k, v in content.items() if k != "digest"})
            elif path.name != "manifest.json":
                shutil.copyfile(path, target)
    return out


def shares(weights: Sequence[float] | None, n: int) -> list[float]:
    """Weights that add up to 1, equal ones by default.

    Raises:
        UsageError: another number of weights than ``n``, a negative one, or none above zero.
    """
    if weights is None:
        return [1 / n] * n
    if len(weights) != n or not all(0 <= w < math.inf for w in weights) or sum(weights) <= 0:
        raise UsageError(
            f"{len(weights)} weights for {n} runs, or a negative one.", fix="one weight per run"
        )
    total = float(sum(weights))
    return [float(w) / total for w in weights]


def check_tensors(models: Sequence[Path], held: Sequence[dict[Key, Place]]) -> None:
    """Refuse models whose tensors have other names, shapes or kinds than the first one's."""
    for model, places in zip(models[1:], held[1:], strict=True):
        odd = sorted(set(places) ^ set(held[0]))
        if odd:
            folder, name = odd[0]
            where = "the first run" if odd[0] in held[0] else "this run"
            raise UsageError(
                f"The runs have different tensors: {len(odd)} are in one alone, first {name!r}, "
                f"which only {where} has.",
                where=model / folder,
                fix="average runs of the same architecture",
            )
        for key, place in places.items():
            want = held[0][key]
            floats = {place.dtype in FLOATS, want.dtype in FLOATS}
            if place.shape != want.shape or len(floats) > 1:
                raise UsageError(
                    f"Tensor {key[1]!r} is {place}, in the first run {want}.",
                    where=model,
                    fix="average runs of the same architecture",
                )


def _merge_file(
    path: Path,
    folder: str,
    out: Path,
    held: Sequence[dict[Key, Place]],
    share: Sequence[float],
    how: str,
    alpha: float,
    reader: Reader,
) -> None:
    """Write one file of the first model with the tensors of all."""
    header, own = read_header(path)
    parts = {name: [places[folder, name] for places in held] for name in header.names}
    dtypes = {name: widest(parts[name]) for name in header.names}
    with out.open("wb") as target:
        target.write(header_bytes(header, own, dtypes))
        for name in header.names:
            if dtypes[name] not in FLOATS:
                _copy_equal(name, parts[name], target, reader)
                continue
            weights = np.array(share, np.float64)
            if how == "slerp":
                weights = slerp_weights(_products(parts[name][: len(share)], reader), share)
            if len(held) > len(share):
                weights = np.append(alpha * weights, 1 - alpha)
            _add(parts[name], weights.tolist(), dtypes[name], target, reader)
        target.flush()
        os.fsync(target.fileno())


def _add(
    parts: Sequence[Place], weights: Sequence[float], dtype: str, out: BinaryIO, reader: Reader
) -> None:
    """Write the sum of ``weights`` times ``parts``, summed in fp32, or fp64 where the type is."""
    terms = [(part, weight) for part, weight in zip(parts, weights, strict=True) if weight != 0]
    if len(terms) == 1 and terms[0][1] == 1 and terms[0][0].dtype == dtype:
        for block in reader.bytes(terms[0][0]):  # one model as it is, to the bit
            out.write(block)
        return
    kind = torch.float64 if dtype == "F64" else torch.float32
    total, term = torch.empty(BLOCK, dtype=kind), torch.empty(BLOCK, dtype=kind)
    rounded = total if FLOATS[dtype] == kind else torch.empty(BLOCK, dtype=FLOATS[dtype])
    for at in range(0, parts[0].count, BLOCK):
        n = min(BLOCK, parts[0].count - at)
        if not terms:
            total.zero_()
        for i, (part, weight) in enumerate(terms):
            if i == 0:
                reader.into(total[:n], part, at)
                total[:n].mul_(weight)
            else:
                reader.into(term[:n], part, at)
                total[:n].add_(term[:n], alpha=weight)
        if rounded is not total:
            rounded[:n].copy_(total[:n])
        out.write(rounded[:n].view(torch.uint8).numpy().data)


def _copy_equal(name: str, parts: Sequence[Place], out: BinaryIO, reader: Reader) -> None:
    """Write a tensor that is no floating one, when all have the same."""
    for other in parts[1:]:
        with Reader() as second:
            same = parts[0].dtype == other.dtype and all(
                a == b for a, b in zip(reader.bytes(parts[0]), second.bytes(other), strict=True)
            )
        if not same:
            raise UsageError(f"The integer tensor {name!r} differs between runs.", where=other.file)
    for block in reader.bytes(parts[0]):
        out.write(block)


# ---------------------------------------------------------------- slerp


def _products(parts: Sequence[Place], reader: Reader) -> NDArray[np.float64]:
    """Inner products [k, k] of the ingredients of one tensor, in float64."""
    block = torch.empty(len(parts), BLOCK, dtype=torch.float64)
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for at in range(0, parts[0].count, BLOCK):
        n = min(BLOCK, parts[0].count - at)
        for i, part in enumerate(parts):
            reader.into(block[i, :n], part, at)
        total += block[:, :n] @ block[:, :n].T
    return np.asarray(total.numpy())


def slerp_weights(products: NDArray[np.float64], share: Sequence[float]) -> NDArray[np.float64]:
    """Weights [k] of the ingredients whose sum is the slerp of them all, folded in their order.

    Args:
        products: inner products of the ingredients, [k, k].
        share: weights w_k; the k-th is folded in at w_k / (w_1 + ... + w_k).
    """
    count = len(share)
    weights = np.zeros(count)
    weights[0], before = 1.0, share[0]
    for k in range(1, count):
        if before + share[k] <= 0:
            continue
        before += share[k]
        inner = float(weights @ products[:, k])
        squared = float(weights @ products @ weights)
        here, there = _arc(squared, inner, float(products[k, k]), share[k] / before)
        weights *= here
        weights[k] += there
    return weights


def _arc(aa: float, ab: float, bb: float, t: float) -> tuple[float, float]:
    """Weights of a and b at the place ``t`` of the arc between them, from their products."""
    lengths = math.sqrt(max(aa, 0.0) * max(bb, 0.0))
    cosine = ab / lengths if lengths > 0 else 1.0
    if abs(cosine) > 1 - 1e-9:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The place ``t`` of the arc from ``a`` to ``b``, each taken as one vector.

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between them; a straight line where
    they are almost parallel, opposite, or one is zero.
    """
    x, y = a.double().reshape(-1), b.double().reshape(-1)
    here, there = _arc(float(x @ x), float(x @ y), float(y @ y), t)
    return a * here + b * there


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented JSON with sorted keys, as the other files of a model directory have it."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
