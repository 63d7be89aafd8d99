"""The torch engine beside float64 brute force: nothing is lost, whatever is rounded or tied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embkit import search_torch
from embkit.errors import UsageError


def unit(rng: np.random.Generator, n: int, d: int, clusters: int = 0) -> np.ndarray:
    x = rng.standard_normal((n, d))
    if clusters:
        x = 0.5 * x + 2 * rng.standard_normal((clusters, d))[rng.integers(clusters, size=n)]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def check(q: np.ndarray, c: np.ndarray, k: int, row: np.ndarray, score: np.ndarray) -> None:
    """Rows and scores as float64 has them; places may swap where its scores tie within 1e-6."""
    assert row.dtype == np.uint32 and score.dtype == np.float32
    exact = q.astype(np.float64) @ c.astype(np.float64).T
    order = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    want = np.take_along_axis(exact, order, 1)
    own = np.take_along_axis(exact, row.astype(np.int64), 1)
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(score, own, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(own, want, rtol=0, atol=1e-6 * scale)  # recall by score is 1.0
    clear = np.ones_like(want, bool)
    gap = np.diff(want, axis=1) > -2e-6 * scale
    clear[:, 1:] &= ~gap
    clear[:, :-1] &= ~gap
    clear[:, -1] = False  # its rival may lie beyond the edge
    np.testing.assert_array_equal(row[clear], order[clear])
    assert all(len(set(r)) == k for r in row.tolist())
    tied = score[:, 1:] == score[:, :-1]
    assert (row[:, 1:] > row[:, :-1])[tied].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_equals_brute_force(dtype: str, memory: int) -> None:
    rng = np.random.default_rng(2)
    for n, d, k, clusters in ((1500, 64, 10, 30), (999, 33, 100, 5), (700, 48, 1, 0)):
        c, q = unit(rng, n, d, clusters), unit(rng, 67, d)
        row, score, report = search_torch.search(q, c, k, dtype=dtype, memory=memory, device="cpu")
        check(q, c, k, row, score)
        assert report["recall"] == 1.0 and report["dtype"] == dtype


def test_neither_type_nor_blocks_nor_parts_change_the_result() -> None:
    rng = np.random.default_rng(3)
    c, q = unit(rng, 2000, 40, 20), unit(rng, 50, 40)
    c[500:900] = c[100:500]  # ties
    ways = [
        search_torch.search(q, c, 30, device="cpu"),
        search_torch.search(q, c, 30, device="cpu", dtype="float32"),
        search_torch.search(q, c, 30, device="cpu", memory=1 << 19),
        search_torch.search([q[:7], q[7:]], [c[:3], c[3:1200], c[1200:]], 30, device="cpu"),
    ]
    for row, score, _ in ways[1:]:
        np.testing.assert_array_equal(row, ways[0][0])
        np.testing.assert_array_equal(score, ways[0][1])


def test_many_equal_vectors_are_scanned_again_and_come_in_row_order() -> None:
    rng = np.random.default_rng(4)
    c = unit(rng, 1200, 32)
    c[200:1000] = c[7]
    q = np.concatenate([c[7:8], unit(rng, 5, 32)])
    for dtype in search_torch.DTYPES:
        row, score, report = search_torch.search(q, c, 50, dtype=dtype, device="cpu")
        assert report["rescanned"] >= 1
        check(q, c, 50, row, score)
        np.testing.assert_array_equal(row[0], [7, *range(200, 249)])


def test_scores_closer_than_bfloat16_can_tell() -> None:
    """Fails when the certificate is left out: bfloat16 puts these in the order of their rows."""
    rng = np.random.default_rng(5)
    base = unit(rng, 1, 96)
    c = base + 1e-4 * rng.standard_normal((3000, 96)).astype(np.float32)
    q = unit(rng, 4, 96) + base
    row, score, report = search_torch.search(q, c, 20, device="cpu")
    check(q, c, 20, row, score)
    assert report["rescanned"] == 4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_any_length_and_negative_scores(scale: float) -> None:
    rng = np.random.default_rng(6)
    c = unit(rng, 800, 24) * rng.uniform(0.1 * scale, scale, (800, 1)).astype(np.float32)
    q = -np.abs(unit(rng, 9, 24))
    c = np.abs(c)
    for k in (10, 800):
        row, score, _ = search_torch.search(q, c, k, device="cpu")
        check(q, c, k, row, score)


def test_half_precision_inputs() -> None:
    rng = np.random.default_rng(7)
    c, q = unit(rng, 500, 16).astype(np.float16), unit(rng, 9, 16).astype(np.float16)
    row, score, _ = search_torch.search(q, [c[:200], c[200:]], 10, device="cpu")
    check(q, c, 10, row, score)


def test_progress_and_settings_come_back() -> None:
    rng = np.random.default_rng(8)
    seen: list[int] = []
    torch.set_float32_matmul_precision("high")
    try:
        c = unit(rng, 3000, 8)
        search_torch.search(c, c, 3, device="cpu", memory=1 << 20, progress=seen.append)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) > 1 and seen == sorted(seen) and seen[-1] == 3000


def test_refusals() -> None:
    x = np.ones((4, 3), np.float32)
    bad = x.copy()
    bad[2, 1] = np.nan
    for q, c, k, says in (
        (x, x[:, :2], 1, "3 numbers"),
        (x, x, 5, "k = 5"),
        (x, x, 0, "k = 0"),
        (x[0], x, 1, "not arrays"),
        (x.astype(np.float64), x, 1, "not float32"),
        (bad, x, 1, "Query 2"),
        (x, bad, 1, "corpus row"),
    ):
        with pytest.raises(UsageError, match=says):
            search_torch.search(q, c, k, device="cpu")
    with pytest.raises(UsageError, match="float8"):
        search_torch.search(x, x, 1, dtype="float8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("memory", [0, 8 << 20])
def test_cuda(dtype: str, memory: int) -> None:
    rng = np.random.default_rng(10)
    c, q = unit(rng, 20_000, 384, 300), unit(rng, 500, 384)
    c[9000:9800] = c[77]
    q[0] = c[77]
    row, score, report = search_torch.search(q, [c[:777], c[777:]], 100, dtype=dtype, memory=memory)
    assert report["device"].startswith("cuda")
    check(q, c, 100, row, score)
    np.testing.assert_array_equal(row[0], [77, *range(9000, 9099)])
