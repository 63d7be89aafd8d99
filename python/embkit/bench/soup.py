"""Bench group `soup`: the streaming average of models beside loading them all in torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from embkit.bench import Case
from embkit.soup import merge


def uniform(quick: bool) -> Case:
    """Four models of one shape, float32."""
    home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
    sizes = [(16_000, 256), *[(256, 256)] * (4 if quick else 64), *[(1024, 256)] * 16]
    paths = []
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        tensors = {f"w{j}": torch.randn(*s, generator=generator) for j, s in enumerate(sizes)}
        folder = Path(home.name) / f"model-{i}"
        folder.mkdir()
        paths.append(folder / "model.safetensors")
        save_file(tensors, paths[-1])
    size = sum(p.stat().st_size for p in paths)

    def ours() -> dict[str, Any]:
        out = merge([path.parent for path in paths], Path(home.name) / "ours")
        return load_file(out / "model.safetensors")

    def eager() -> dict[str, Any]:
        states = [load_file(p) for p in paths]
        mean = {k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]}
        save_file(mean, Path(home.name) / "eager.safetensors")
        return mean

    def same(a: Any, b: Any) -> None:
        for name in b:
            np.testing.assert_allclose(a[name].numpy(), b[name].numpy(), atol=1e-6)

    case = Case(
        name="soup.uniform",
        unit="B/s",
        work=size,
        ours=ours,
        rivals={"torch, all in memory": eager},
        check=same,
        goal="1 GB/s",
        facts={"models": 4, "bytes": size},
    )
    case.ours.__dict__["folder"] = home  # lives as long as the case
    return case


CASES = (uniform,)
