"""What every `*_triton.py` file shares: launch parameters, and what to compile ahead of time.

Launch parameters (block sizes, warps, stages) are in `_configs/<op>.json` and nowhere else:

    {"default":     {"forward": {"BLOCK": 64, "num_warps": 4, "num_stages": 3}},
     "sm_90":       {"forward": {...}},
     "NVIDIA H200": {"arch": "sm_90", "forward": {...}},
     "candidates":  {"forward": [{...}, {...}]}}

A launch takes the entry of its GPU by name, else of its architecture, else the untuned default;
candidates are what the tuner of `make gpu` tries. The ahead-of-time check (`aot.py`) compiles the
entries that launches take, so what ships is what was checked. This file needs no triton: the
kernels that a `Spec` holds are whatever `triton.jit` made.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHES = (80, 90, 100, 942)
"""Checked ahead of time: NVIDIA compute capabilities times ten, and 942 for AMD's gfx942."""

SMALLER = (86, 89, 120)
"""Workstation and consumer GPUs take the defaults, in less shared memory: `--arch 86,89,120`."""

CONFIGS = Path(__file__).parent / "_configs"

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One kernel in one shipped configuration, as the ahead-of-time check compiles it.

    Attributes:
        name: what the table calls it, e.g. ``"forward bf16 K=3"``; unique within an op.
        kernel: the `triton.jit` function.
        signature: type of each argument that is not a constexpr: ``"*bf16"``, ``"i32"``,
            ``"fp32"``, ``"tensordesc<bf16[128,64]>"``.
        constexprs: value of each constexpr argument; None for a pointer that is left out.
        aligned: arguments that are divisible by 16 at every launch: pointers, strides, sizes.
        num_warps, num_stages, maxnreg: launch options; maxnreg None means no cap on registers.
        arch: members of `ARCHES` and `SMALLER` to compile for; None means all.
        stack_budget: bytes of stack a thread may use; more than 0 means that registers spill.
        tensor_cores: the kernel must contain a tensor-core instruction.
        pipelined: its loads must overlap its loop: asynchronous copies into several buffers.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    arch: tuple[int, ...] | None = None
    stack_budget: int = 0
    tensor_cores: bool = False
    pipelined: bool = False


def config(op: str, key: str, device: torch.device | None = None) -> Config:
    """Launch parameters of one kernel on a device.

    Args:
        op: name of the file in `_configs`.
        key: name of the kernel in that file, e.g. ``"forward"``.
        device: where the tensors live; a device that is no GPU takes the default.

    Returns:
        A copy: parameters by name, `num_warps` and `num_stages` among them.

    Raises:
        KeyError: the table has no such kernel.
    """
    table = _table(op)
    entries = [*_names(device), "default"] if device is not None else ["default"]
    found = next((table[name][key] for name in entries if key in table.get(name, {})), None)
    if found is None:
        raise KeyError(f"_configs/{op}.json has no default entry {key!r}")
    return {**found, **_replaced.get((op, key), {})}


def shipped(op: str, key: str) -> Iterator[tuple[str, tuple[int, ...], Config]]:
    """Every entry of a kernel as (its name, the architectures it is for, launch parameters)."""
    table = _table(op)
    own = {
        name: _arch(name, entry)
        for name, entry in table.items()
        if key in entry and name != "candidates"
    }
    # A GPU that has an entry of its own does not take its architecture's, but its siblings do.
    taken = {arch for name, arch in own.items() if name.startswith(("sm_", "gfx"))}
    for name, arch in own.items():
        every = (*ARCHES, *SMALLER)
        arches = tuple(a for a in every if a not in taken) if arch is None else (arch,)
        if arches:
            yield name, arches, {**table[name][key], **_replaced.get((op, key), {})}


def keys(op: str) -> list[str]:
    """The kernels that an op's table has."""
    return list(_table(op)["default"])


def candidates(op: str, key: str) -> list[Config]:
    """Changes to the launch parameters of a kernel that are worth a try; may be empty."""
    return list(_table(op).get("candidates", {}).get(key, []))


@contextlib.contextmanager
def replaced(op: str, **parameters: Config) -> Iterator[None]:
    """Replace launch parameters inside a block: tests take tiny tiles, the tuner its candidates.

    with replaced("infonce", forward={"BLOCK_M": 16, "BLOCK_N": 16}): ...
    """
    before = dict(_replaced)
    for key, values in parameters.items():
        config(op, key)  # raises for a kernel that does not exist
        _replaced[op, key] = {**_replaced.get((op, key), {}), **values}
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


_replaced: dict[tuple[str, str], Config] = {}


@functools.cache
def _table(op: str) -> dict[str, dict[str, Any]]:
    return json.loads((CONFIGS / f"{op}.json").read_text())


def _names(device: torch.device) -> tuple[str, ...]:
    return gpu_names(device.index) if device.type == "cuda" else ()


@functools.cache
def gpu_names(index: int | None) -> tuple[str, str]:
    """Name and architecture of a GPU, as the tables spell them; None means the current one."""
    p = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return p.name, arch


def _arch(name: str, entry: dict[str, Any]) -> int | None:
    """The member of `ARCHES` that an entry of a table is for; None for the default."""
    label = entry.get("arch", name)
    return None if label == "default" else int(label.removeprefix("sm_").removeprefix("gfx"))
