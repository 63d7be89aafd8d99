"""A soup's weights are plain safetensors: the golden average, byte for byte and value by value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from embkit.soup import merge

GOLDEN = Path(__file__).with_name("soup-model.safetensors")


def ingredients(folder: Path) -> list[Path]:
    """Two models whose weights are small dyadic numbers, so that their average is exact."""
    models = []
    for i in (1, 3):
        model = folder / f"model-{i}"
        model.mkdir()
        weight = np.arange(6, dtype=np.float32).reshape(2, 3) * i
        tensors = {
            "a.weight": weight,
            "b.half": weight[0].astype(np.float16),
            "c.ids": np.arange(3),
        }
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        models.append(model)
    return models


def test_todays_soup_repeats_the_golden_bytes(tmp_path: Path) -> None:
    out = merge(ingredients(tmp_path), tmp_path / "soup")
    assert (out / "model.safetensors").read_bytes() == GOLDEN.read_bytes()


def test_any_reader_finds_the_average_in_it() -> None:
    found = load_file(GOLDEN)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3) * 2
    np.testing.assert_array_equal(found["a.weight"], weight)
    np.testing.assert_array_equal(found["b.half"], weight[0].astype(np.float16))
    np.testing.assert_array_equal(found["c.ids"], np.arange(3))
