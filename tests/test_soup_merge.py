"""The arithmetic of soups: every type against float64, and how little memory it takes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory import growth
from safetensors.torch import load_file, save_file

from embkit.errors import CorruptError, UsageError
from embkit.soup import merge
from embkit.soup.files import BLOCK
from embkit.soup.merge import slerp_weights

# Half a unit in the last place of the type, and what three sums in fp32 may add to it.
ROUNDING = {
    torch.float64: 1e-15,
    torch.float32: 3e-7,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def write(folder: Path, tensors: dict[str, torch.Tensor], *, parts: int = 1) -> Path:
    """A model directory: weights alone, in as many files."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    for i in range(parts):
        name = (
            "model.safetensors" if parts == 1 else f"model-{i + 1:05d}-of-{parts:05d}.safetensors"
        )
        save_file(
            {n: tensors[n] for n in names[i::parts]}, folder / name, metadata={"format": "pt"}
        )
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def drawn(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Odd sizes: empty, one, below, at and beyond a block."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(0,), (1,), (7, 3), (BLOCK,), (BLOCK + 5,), ()]
    found = {
        f"w{i}": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for i, shape in enumerate(shapes)
    }
    return found | {"ids": torch.arange(5), "flag": torch.tensor([True, False])}


def wanted(parts: list[dict[str, torch.Tensor]], name: str, weights: Any) -> torch.Tensor:
    terms = [w * part[name].double() for w, part in zip(weights, parts, strict=True)]
    return torch.stack(terms).sum(0)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("weights", [None, [0.5, 0.1, 0.4]])
def test_every_type_against_float64(
    tmp_path: Path, dtype: torch.dtype, weights: list[float] | None
) -> None:
    parts = [drawn(seed, dtype) for seed in range(3)]
    models = [write(tmp_path / str(i), part) for i, part in enumerate(parts)]
    got = read(merge(models, tmp_path / "out", weights=weights))
    assert set(got) == set(parts[0])
    for name, value in got.items():
        assert value.dtype == parts[0][name].dtype and value.shape == parts[0][name].shape
        if not value.is_floating_point():
            assert torch.equal(value, parts[0][name])
            continue
        want = wanted(parts, name, weights or [1 / 3] * 3)
        scale = wanted([{name: p[name].abs()} for p in parts], name, weights or [1 / 3] * 3)
        limit = ROUNDING[dtype] * (want.abs() + 2e-7 / ROUNDING[dtype] * scale + 1e-7)
        assert bool(((value.double() - want).abs() <= limit).all()), name


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_mixed_types_are_promoted_and_the_order_of_runs_changes_nothing(
    tmp_path: Path, types: tuple[torch.dtype, ...], expected: torch.dtype
) -> None:
    parts = [drawn(seed, dtype) for seed, dtype in enumerate(types)]
    models = [write(tmp_path / str(i), part) for i, part in enumerate(parts)]
    for at, order in enumerate(itertools.permutations(range(2))):
        got = read(merge([models[i] for i in order], tmp_path / f"out-{at}"))
        for name in ("w2", "w4"):
            assert got[name].dtype == expected
            want = wanted(parts, name, [0.5, 0.5]).to(expected)
            torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-7)
        assert torch.equal(got["ids"], torch.arange(5))


def test_weights_in_several_files_average_with_weights_in_one(tmp_path: Path) -> None:
    parts = [drawn(seed, torch.float32) for seed in range(2)]
    models = [
        write(tmp_path / str(i), part, parts=n)
        for i, (part, n) in enumerate(zip(parts, (3, 1), strict=True))
    ]
    out = merge(models, tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) == 3
    got = read(out)
    for name in ("w0", "w1", "w2", "w3", "w4", "w5"):
        want = wanted(parts, name, [0.5, 0.5]).float()
        torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("how", ["mean", "slerp"])
def test_a_mix_with_the_base_adds_the_task_vector(tmp_path: Path, alpha: float, how: str) -> None:
    """base + alpha * (soup - base), the soup being what it is without a base."""
    parts = [drawn(seed, torch.float32) for seed in range(3)]
    base, *models = (write(tmp_path / str(i), part) for i, part in enumerate(parts))
    alone = read(merge(models, tmp_path / "alone", weights=[1, 3], how=how))
    got = read(merge(models, tmp_path / "out", weights=[1, 3], how=how, base=base, alpha=alpha))
    for name in ("w0", "w1", "w2", "w3", "w4", "w5"):
        start = parts[0][name].double()
        want = start + alpha * (alone[name].double() - start)
        torch.testing.assert_close(got[name].double(), want, rtol=1e-6, atol=1e-6)
    if alpha == 0:
        assert all(torch.equal(got[name], parts[0][name]) for name in got)


def test_slerp_against_float64(tmp_path: Path) -> None:
    """Folded in the order of the runs, each tensor as one vector."""
    parts = [drawn(seed, torch.float32) for seed in range(4)]
    models = [write(tmp_path / str(i), part) for i, part in enumerate(parts)]
    share = [0.4, 0.3, 0.2, 0.1]
    got = read(merge(models, tmp_path / "out", weights=share, how="slerp"))
    for name in ("w1", "w2", "w3", "w4"):
        total, before = parts[0][name].double(), share[0]
        for part, w in zip(parts[1:], share[1:], strict=True):
            before += w
            t, other = w / before, part[name].double()
            cosine = torch.sum(total * other) / (total.norm() * other.norm())
            angle = torch.acos(cosine.clamp(-1, 1))
            if abs(cosine) > 1 - 1e-9:
                total = (1 - t) * total + t * other
            else:
                total = (
                    torch.sin((1 - t) * angle) * total + torch.sin(t * angle) * other
                ) / torch.sin(angle)
        torch.testing.assert_close(got[name].double(), total, rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_length_and_the_order_matters_little() -> None:
    """Of unit vectors the fold is a unit vector; of three the order changes it, as documented."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 50))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for order in itertools.permutations(range(3)):
        rows = vectors[list(order)]
        point = slerp_weights(rows @ rows.T, [1 / 3] * 3) @ rows
        assert np.linalg.norm(point) == pytest.approx(1)
        found.append(point)
    spread = max(np.abs(a - b).max() for a in found for b in found)
    assert 1e-6 < spread < 0.1
    two = slerp_weights(vectors[:2] @ vectors[:2].T, [0.5, 0.5])
    assert two[0] == pytest.approx(two[1])


@pytest.mark.parametrize(("how", "dtype"), [("mean", torch.float32), ("slerp", torch.bfloat16)])
def test_memory_is_some_blocks_however_large_the_tensor(
    tmp_path: Path, how: str, dtype: torch.dtype
) -> None:
    """The promise is three times the largest tensor; a few blocks are less than that."""
    value = torch.ones(6_000_000, dtype=dtype)
    models = [write(tmp_path / str(i), {"w": value * (i + 1)}) for i in range(4)]
    largest = value.nbytes
    merge(models, tmp_path / "warm", how=how)  # threads and buffers of torch are not the merge's
    taken = growth(lambda: merge(models, tmp_path / "out", how=how))
    assert taken < min(3 * largest, 20 << 20), f"{taken / 2**20:.0f} MiB"


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {"w": torch.ones(3), "n": torch.arange(3)})
    with pytest.raises(UsageError, match="1 are in one alone, first 'more'"):
        other = {"w": torch.ones(3), "n": torch.arange(3), "more": torch.ones(1)}
        merge([first, write(tmp_path / "b", other)], tmp_path / "x")
    with pytest.raises(UsageError, match=r"Tensor 'w' is F32 \[4\], in the first run F32 \[3\]"):
        merge(
            [first, write(tmp_path / "c", {"w": torch.ones(4), "n": torch.arange(3)})],
            tmp_path / "x",
        )
    with pytest.raises(UsageError, match="The integer tensor 'n' differs"):
        other = {"w": torch.ones(3), "n": torch.arange(3) + 1}
        merge([first, write(tmp_path / "d", other)], tmp_path / "x")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("what a merge that is refused leaves alone")
    with pytest.raises(UsageError, match="Tensor 'w' is"):
        merge([first, tmp_path / "c"], tmp_path / "there")
    assert (tmp_path / "there" / "kept").is_file()
    with pytest.raises(UsageError, match="lies in"):
        merge([first, tmp_path / "d"], tmp_path / "a")
    with pytest.raises(UsageError, match="type F8_E4M3"):
        small = {"w": torch.ones(3).to(torch.float8_e4m3fn), "n": torch.arange(3)}
        merge([first, write(tmp_path / "e", small)], tmp_path / "x")
    cut = write(tmp_path / "f", {"w": torch.ones(3), "n": torch.arange(3)}) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(CorruptError, match="cannot be read"):
        merge([first, cut.parent], tmp_path / "x")
    with pytest.raises(UsageError, match="did you mean 'slerp'"):
        merge([first], tmp_path / "x", how="slrp")


def test_weights_in_other_forms_are_left_out(tmp_path: Path) -> None:
    """A pickle or an ONNX file beside the weights would be those of the first run alone."""
    models = [write(tmp_path / str(i), {"w": torch.full((2,), float(i))}) for i in range(2)]
    for model in models:
        (model / "onnx").mkdir()
        (model / "onnx" / "model.onnx").write_bytes(b"graph")
        (model / "pytorch_model.bin").write_bytes(b"pickle")
        (model / "config.json").write_text("{}")
    out = merge(models, tmp_path / "out")
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {"model.safetensors", "config.json"}
