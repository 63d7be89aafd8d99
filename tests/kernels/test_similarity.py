"""mrl_similarity: the chunked torch reference, and the Triton kernels in the interpreter."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import against
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embkit_kernels import _triton, mrl_similarity, mrl_similarity_naive
from embkit_kernels import mrl_similarity as function

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
MODULE = sys.modules[function.__module__]
TINY: dict[str, Any] = {
    "norms": {"BLOCK_R": 16, "BLOCK_K": 32},
    "product": {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32},
    "product_odd": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16},
    "product_fp32": {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32},
    "select": {"BLOCK": 32},
}
# (queries, passages, width, widths, k)
SHAPES = [
    (1, 1, 16, (16,), 1),
    (1, 40, 32, (32,), 40),
    (2, 17, 32, (16, 32), 5),
    (15, 16, 64, (32, 64), 16),
    (16, 33, 64, (64, 32), 1),
    (17, 64, 48, (16, 48, 32), 7),
    (33, 31, 20, (20,), 3),
    (3, 70, 37, (5, 37, 11), 20),
    (5, 129, 8, (3, 8), 64),
    (8, 200, 16, (16,), 3),
    (40, 5, 64, (64,), 5),
    (4, 90, 96, (96, 64), 33),
]


@pytest.fixture
def tiny(interpreter: None) -> Iterator[None]:
    with _triton.replaced("similarity", **TINY):
        yield


@pytest.fixture(params=["ref", "triton"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both implementations, in blocks of few columns and of 2 queries."""
    if request.param == "triton":
        request.getfixturevalue("tiny")
    monkeypatch.setitem(MODULE.WORKSPACE, "cpu", 1 << 8)
    monkeypatch.setattr(MODULE, "ROWS", 2)
    return str(request.param)


def sides(
    shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    q, p = (torch.randn(n, shape[2], generator=rng).to(dtype) for n in shape[:2])
    return q.requires_grad_(), p.requires_grad_()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_similarities(shape: Any, provider: str, rng: torch.Generator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        against(
            lambda q, p: mrl_similarity(q, p, shape[3]),
            lambda q, p: mrl_similarity_naive(q, p, shape[3]),
            sides(shape, rng, dtype),
            forward=1e-6,
            tolerance=3e-6 if dtype == torch.float32 else 6e-3,
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_best(shape: Any, provider: str, rng: torch.Generator) -> None:
    dims, k = shape[3:]
    # Small whole numbers: products are exact in any order, and many scores are equal.
    q, p = (torch.randint(-2, 3, (n, shape[2]), generator=rng).float() for n in shape[:2])
    q = q if FULL else q[:3]
    scores, index = mrl_similarity(q, p, dims, k=k)
    assert scores.shape == index.shape == (len(dims), len(q), k)
    every = mrl_similarity(q, p, dims)
    want, place = every.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, want[..., :k])
    assert torch.equal(index, place[..., :k])


def test_float64(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULE.WORKSPACE, "cpu", 1 << 9)
    q, p = sides((6, 50, 20), rng, torch.float64)
    p = p.detach()[torch.arange(50) // 3]
    got, want = mrl_similarity(q, p, (20, 7), k=10), mrl_similarity_naive(q, p, (20, 7), k=10)
    torch.testing.assert_close(got[0], want[0].detach(), rtol=1e-12, atol=0)
    assert got[0].dtype == torch.float64
    assert torch.equal(got[1] // 3, want[1] // 3)
    short, dims = p[:4].clone().requires_grad_(), (3, 20)
    for f in (mrl_similarity, mrl_similarity_naive):
        assert torch.autograd.gradcheck(lambda a, b, f=f: f(a, b, dims), (q, short))


def test_zeros_and_signs(provider: str) -> None:
    """A zero prefix has cosine 0, whose sign may be negative: it still ties with other zeros."""
    q = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    p = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.0], [-2.0, 0.0], [3.0, 0.0]])
    scores, index = mrl_similarity(q, p, (1, 2), k=5)
    assert index.tolist() == [[[4, 0, 1, 2, 3], [3, 0, 1, 2, 4]]] * 2
    assert scores[1].tolist() == [[1, 0, 0, 0, -1]] * 2
    # An underflow from below is -0.0, and ties too.
    q3, p3 = torch.tensor([[1.0, -1e-38, 0.0]]), torch.tensor([[0.0, 1e-5, 1e10], [0.0, 0.0, 1.0]])
    assert str(mrl_similarity(q3, p3).tolist()) == "[[[-0.0, 0.0]]]"
    assert mrl_similarity(q3, p3, k=2)[1].tolist() == [[[0, 1]]]
    leaves = q.requires_grad_(), p.requires_grad_()
    grads = torch.autograd.grad(mrl_similarity(*leaves, (1, 2)).sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)


def test_what_does_not_matter(provider: str, rng: torch.Generator) -> None:
    """Scale, the order of widths, other queries; and a permutation of passages is undone."""
    q, p = (x.detach() for x in sides((3, 60, 32), rng))
    scores, index = mrl_similarity(q, p, (32, 16), k=9)
    swapped = mrl_similarity(q, p, (16, 32), k=9)
    assert torch.equal(swapped[0].flip(0), scores)
    assert torch.equal(swapped[1].flip(0), index)
    grown = mrl_similarity(q * 4, p * 0.5, (32, 16), k=9)
    assert torch.equal(grown[1], index)
    alone = mrl_similarity(q[2:3], p, (32, 16), k=9)
    assert torch.equal(alone[1], index[:, 2:3])
    order = torch.randperm(60, generator=rng)
    moved = mrl_similarity(q, p[order], (32, 16), k=9)
    assert torch.equal(order[moved[1]], index)
    again = mrl_similarity(q, p, (32, 16), k=9)
    assert torch.equal(again[0], scores)


@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_blocks_do_not_matter(
    workspace: int, tiny: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few columns in a block, or all; k of 1 and above the size of a block."""
    q, p = (x.detach() for x in sides((2, 150, 16), rng))
    monkeypatch.setitem(MODULE.WORKSPACE, "cpu", workspace)
    for k in (1, 30):
        got, want = mrl_similarity(q, p, k=k), mrl_similarity_naive(q.double(), p.double(), k=k)
        assert torch.equal(got[1], want[1])


def test_memory_of_the_best_is_bounded(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, Tensor):
                    self.bytes = max(self.bytes, t.untyped_storage().nbytes())
            return out

    monkeypatch.setitem(MODULE.WORKSPACE, "cpu", 1 << 13)
    q, p = torch.randn(200, 8, generator=rng), torch.randn(4000, 8, generator=rng)
    with Largest() as largest:
        MODULE.similarity_topk._init_fn(q, p, [4, 8], 10)
    # Keys are int64, twice the scores; the inputs themselves are 128 kB.
    assert 0 < largest.bytes <= 2 * 4 * (2 << 13) < 2 * 200 * 4000 * 4 // 20


def test_pack_orders_as_floats_do() -> None:
    values = torch.tensor([-torch.inf, -3.0, -1e-40, -0.0, 0.0, 1e-40, 0.5, 1.0, torch.inf])
    keys = MODULE.pack(values, torch.zeros(9, dtype=torch.int64))
    assert keys[3] == keys[4]
    assert bool((keys.diff() >= 0).all())
    assert int((keys.diff() == 0).sum()) == 1
    back, index = MODULE.unpack(MODULE.pack(values, torch.arange(9)))
    assert back.tolist() == values.tolist()
    assert index.tolist() == list(range(9))


def test_ops_are_sound(provider: str, rng: torch.Generator) -> None:
    q, p = sides((5, 20, 16), rng)
    torch.library.opcheck(MODULE.similarity_scores, (q, p, [4, 16]))
    torch.library.opcheck(MODULE.similarity_topk, (q.detach(), p.detach(), [4, 16], 3))
    torch._dynamo.reset()

    def both(q: Tensor, p: Tensor) -> Tensor:
        scores, index = mrl_similarity(q, p, (16, 4), k=2)
        return mrl_similarity(q, p, (16, 4)).square().sum() + scores.sum() + index.sum()

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(both(q, p), (q, p))
    for a, b in zip(torch.autograd.grad(compiled(q, p), (q, p)), want, strict=True):
        assert torch.equal(a, b)


def test_frozen_sides_and_mixed_types(provider: str, rng: torch.Generator) -> None:
    q, p = sides((4, 6, 16), rng)
    half = p.detach().to(torch.bfloat16)
    scores = mrl_similarity(q, half)
    torch.testing.assert_close(scores, mrl_similarity_naive(q, half))
    assert torch.autograd.grad(scores.sum(), q)[0].dtype == torch.float32
    assert mrl_similarity(q[:0], p).shape == (1, 0, 6)
    assert mrl_similarity(q, p[:0]).shape == (1, 4, 0)
    assert mrl_similarity(q[:0], p, k=2)[1].shape == (1, 0, 2)


def test_bad_arguments_say_what_is_wrong() -> None:
    q, p = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="want \\[B, D\\] and \\[N, D\\]"):
        mrl_similarity(q, p[:, :3])
    with pytest.raises(ValueError, match="k = 4 is not between 1 and the 3 passages"):
        mrl_similarity(q, p, k=4)
    with pytest.raises(ValueError, match="k = 0"):
        mrl_similarity(q, p, k=0)
    with pytest.raises(ValueError, match="dims has 5"):
        mrl_similarity(q, p, (5,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [768, 100])
def test_on_a_gpu(
    width: int, dtype: torch.dtype, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    monkeypatch.setitem(MODULE.WORKSPACE, "cuda", 1 << 20)
    q, p = (x.detach().to(dtype).cuda() for x in sides((300, 20000, width), rng))
    dims = (width, width // 2)
    every = mrl_similarity(q, p, dims)
    exact = mrl_similarity_naive(q.double(), p.double(), dims)
    assert (every.double() - exact).abs().max() < 1e-5
    scores, index = mrl_similarity(q, p, dims, k=100)
    want, place = every.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, want[..., :100])
    assert torch.equal(index, place[..., :100])
