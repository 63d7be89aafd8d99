"""Bench group `soup`: streaming averages of models beside the same in torch.

Files lie in the page cache after the first round; a round reads every model and writes one, fsync
included. `limit` is the same bytes read and written with nothing done to them.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from embkit.bench import Case, peak_of
from embkit.soup import merge, slerp

_MODELS = 4
_BLOCK = 1 << 20


def uniform(quick: bool) -> Case:
    """The mean of float32 models."""
    return _case("soup.uniform", quick, torch.float32, "mean", _mean_at_once, goal="1 GB/s")


def bf16(quick: bool) -> Case:
    """The mean of bfloat16 models, summed in float32."""
    return _case("soup.bf16", quick, torch.bfloat16, "mean", _mean_at_once, goal="1 GB/s")


def arcs(quick: bool) -> Case:
    """Slerp of float32 models, folded."""
    return _case("soup.slerp", quick, torch.float32, "slerp", _slerp_by_tensor, goal="1 GB/s")


def memory(quick: bool) -> Case:
    """Bytes at the peak of a merge over those of the largest tensor."""
    home, paths, sizes = _models(quick, torch.float32)
    largest = 4 * max(a * b for a, b in sizes)
    out = Path(home.name) / "out"
    merge([p.parent for p in paths], out)  # what torch keeps from its first call is not the merge's

    def measured(way: Callable[[], Any]) -> Callable[[], float]:
        def fresh() -> float:
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # what was freed before would be there to take, uncounted
            return peak_of(way) / largest

        return fresh

    return Case(
        name="soup.memory",
        unit="largest tensors",
        work=1,
        ours=measured(lambda: merge([p.parent for p in paths], out)),
        rivals={"torch, all in memory": measured(lambda: _mean_at_once(paths, out))},
        goal="3 or less",
        score=float,
        rounds=1,
        facts={"models": _MODELS, "largest_bytes": largest},
        close=home.cleanup,
    )


def _case(
    name: str,
    quick: bool,
    dtype: torch.dtype,
    how: str,
    eager: Callable[[list[Path], Path], Any],
    *,
    goal: str,
) -> Case:
    home, paths, _ = _models(quick, dtype)
    size = sum(p.stat().st_size for p in paths)
    ours_out, eager_out = Path(home.name) / "ours", Path(home.name) / "eager"
    eager_out.mkdir()

    def ours() -> Path:
        return merge([path.parent for path in paths], ours_out, how=how) / "model.safetensors"

    def theirs() -> Path:
        eager(paths, eager_out)
        return eager_out / "model.safetensors"

    def same(a: Path, b: Path) -> None:
        mine, other = load_file(a), load_file(b)
        assert set(mine) == set(other)
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, rtol=2.0**-7, atol=1e-5)
            assert mine[key].dtype == value.dtype == dtype

    return Case(
        name=name,
        unit="B/s",
        work=size,
        ours=ours,
        rivals={eager.__doc__ or "torch": theirs},
        check=same,
        limit=("the same bytes, read and written", _copying(paths, size, Path(home.name) / "copy")),
        goal=goal,
        facts={"models": _MODELS, "bytes": size, "dtype": str(dtype)[6:]},
        close=home.cleanup,
    )


def _models(
    quick: bool, dtype: torch.dtype
) -> tuple[tempfile.TemporaryDirectory[str], list[Path], list[tuple[int, int]]]:
    """Models of BERT-base's shape (with ``quick`` of a small one), random weights."""
    hidden, layers, words = (256, 4, 16_000) if quick else (768, 12, 30_522)
    sizes = [(words, hidden)]
    for _ in range(layers):
        sizes += [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
        sizes += [(1, hidden)] * 9
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    paths = []
    for i in range(_MODELS):
        generator = torch.Generator().manual_seed(i)
        tensors = {
            f"w{j}": torch.randn(s, generator=generator).to(dtype) for j, s in enumerate(sizes)
        }
        folder = Path(home.name) / f"model-{i}"
        folder.mkdir()
        paths.append(folder / "model.safetensors")
        save_file(tensors, paths[-1])
    return home, paths, sizes


def _mean_at_once(paths: list[Path], out: Path) -> None:
    """torch, all in memory"""
    states = [load_file(path) for path in paths]
    mean = {k: torch.stack([s[k].float() for s in states]).mean(0) for k in states[0]}
    out.mkdir(exist_ok=True)
    save_file({k: v.to(states[0][k].dtype) for k, v in mean.items()}, out / "model.safetensors")


def _slerp_by_tensor(paths: list[Path], out: Path) -> None:
    """torch, tensor by tensor"""
    found = {}
    files = [safe_open(path, framework="pt") for path in paths]
    for name in files[0].keys():  # noqa: SIM118
        total = files[0].get_tensor(name)
        for k, file in enumerate(files[1:], 2):
            total = slerp(total, file.get_tensor(name), 1 / k)
        found[name] = total
    save_file(found, out / "model.safetensors")


def _copying(paths: list[Path], size: int, out: Path) -> float:
    """Bytes per CPU-second of reading all files, and writing as much as one of them has."""
    buffer = bytearray(_BLOCK)

    def copy() -> None:
        with out.open("wb", buffering=0) as target:
            for i, path in enumerate(paths):
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(buffer):
                        if i == 0:
                            target.write(memoryview(buffer)[:count])
            os.fsync(target.fileno())

    taken = []
    for _ in range(3):
        began = time.process_time()
        copy()
        taken.append(time.process_time() - began)
    out.unlink()
    return size / max(sorted(taken)[1], 1e-9)


CASES = (uniform, bf16, arcs, memory)
