"""cosent's Triton kernels: in the interpreter with tiny tiles, on a GPU with those shipped."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import against
from torch import Tensor

from embkit_kernels import _triton, cosent, cosent_naive

MODULE = sys.modules[cosent.__module__]
TINY: dict[str, Any] = {
    "forward": {"BLOCK_I": 16, "BLOCK_J": 32},
    "backward": {"BLOCK_I": 16, "BLOCK_J": 32},
}


@pytest.fixture
def tiny(interpreter: None) -> Iterator[None]:
    with _triton.replaced("cosent", **TINY):
        yield


def case(size: int, widths: int, levels: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores [K, B] that lean towards their labels [B]."""
    labels = torch.randint(0, levels, (size,), generator=rng).float() / levels
    scores = torch.randn(widths, size, generator=rng).tanh() * 0.7 + 0.3 * labels
    return scores.requires_grad_(), labels


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 31, 33, 64, 100])
def test_against_float64(size: int, scale: float, tiny: None, rng: torch.Generator) -> None:
    scores, labels = case(size, 2, 6, rng)
    weights = (0.5, 2.0)
    # A float32 exponent of 2 * scale has an error of its own: eps * 2 * scale.
    bound = 2e-6 * max(1, scale / 20)
    against(
        lambda s: cosent(s, labels.to(s.dtype), scale=scale, dim_weights=weights)[0],
        lambda s: cosent_naive(s, labels.to(s.dtype), scale=scale, dim_weights=weights)[0],
        [scores],
        tolerance=bound,
    )


def test_embeddings_at_several_widths(tiny: None, rng: torch.Generator) -> None:
    labels = torch.randint(0, 4, (37,), generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(37, 24, generator=rng)
        b = (a + 2 * torch.randn(37, 24, generator=rng)).to(dtype).requires_grad_()
        a = a.to(dtype).requires_grad_()
        against(
            lambda a, b: cosent((a, b), labels, (24, 5, 11))[0],
            lambda a, b: cosent_naive((a, b), labels, (24, 5, 11))[0],
            [a, b],
            forward=2e-6,
            tolerance=6e-3 if dtype == torch.bfloat16 else 4e-6,
        )


def test_tiny_losses_keep_their_digits(tiny: None) -> None:
    """Every term far below 1: the loss is log1p of their sum, not a log of a rounded 1."""
    scores = torch.tensor([[0.95, 0.1, 0.15]])
    labels = torch.tensor([1.0, 0.0, 0.0])
    exact = cosent_naive(scores.double(), labels, scale=30.0)[0]
    loss, _ = cosent(scores, labels, scale=30.0)
    assert 0 < exact < 1e-10
    assert abs(loss.item() / exact.item() - 1) < 4e-6


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([3, 1, 1, 2, 3, 0]),
        torch.tensor([3, 1, 1, 2, 3, 0], dtype=torch.uint8),
        torch.tensor([1.5, 0.5, 0.5, 1.0, 1.5, 0.25], dtype=torch.float64),
        torch.tensor([1.5, 0.5, 0.5, 1.0, 1.5, 0.25], dtype=torch.bfloat16),
        torch.tensor([True, False, False, True, True, False]),
        torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0, 0.5]),
        torch.tensor([1 << 60, (1 << 60) + 1, 0, -5, 7, 7]),
    ],
)
def test_labels_of_any_type(labels: Tensor, tiny: None, rng: torch.Generator) -> None:
    scores = torch.randn(2, 6, generator=rng).requires_grad_()
    loss, _ = cosent(scores, labels)
    want, _ = cosent_naive(scores.double(), labels)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, scores)
    (exact,) = torch.autograd.grad(want, scores)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)
    if labels.is_floating_point():
        assert bool((grad[:, labels.isnan()] == 0).all())


def test_nothing_to_rank_is_zero(tiny: None) -> None:
    for labels in (torch.ones(20), torch.full((20,), torch.nan)):
        scores = torch.linspace(-1, 1, 20)[None].requires_grad_()
        loss, per_dim = cosent(scores, labels)
        assert loss.item() == 0
        assert per_dim.tolist() == [0]
        assert not torch.autograd.grad(loss, scores)[0].any()


def test_order_and_monotone_labels_do_not_matter(tiny: None, rng: torch.Generator) -> None:
    scores, labels = case(70, 1, 9, rng)
    loss, _ = cosent(scores, labels)
    assert torch.equal(cosent(scores, labels.double().exp())[0], loss)
    order = torch.randperm(70, generator=rng)
    torch.testing.assert_close(cosent(scores[:, order], labels[order])[0], loss)
    # Only differences of scores count, and what is added to all gets no gradient.
    torch.testing.assert_close(cosent(scores + 0.5, labels)[0], loss, rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss, scores)
    assert abs(grad.sum()) < 1e-5 * grad.norm()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(cosent(scores, labels)[0], scores)[0], grad)


def test_ops_are_sound(tiny: None, rng: torch.Generator) -> None:
    scores, labels = case(19, 2, 3, rng)
    torch.library.opcheck(MODULE.cosent_op, (scores, labels, 20.0))
    torch._dynamo.reset()
    compiled = torch.compile(cosent, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(cosent(scores, labels)[0], scores)
    assert torch.equal(torch.autograd.grad(compiled(scores, labels)[0], scores)[0], want[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [1, 500, 4099])
def test_on_a_gpu(size: int, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    scores, labels = case(size, 3, 26, rng)
    scores, labels = scores.detach().cuda().requires_grad_(), labels.cuda()

    def run() -> tuple[Tensor, Tensor]:
        loss, _ = cosent(scores, labels)
        return loss.detach(), torch.autograd.grad(loss, scores)[0]

    first, again = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    wide = scores.detach().double().requires_grad_()
    monkeypatch.setenv("EMBKIT_KERNELS", "ref")
    loss, _ = cosent(wide, labels)
    torch.testing.assert_close(first[0].double(), loss.detach(), rtol=1e-5, atol=1e-7)
    exact = torch.autograd.grad(loss, wide)[0]
    assert (first[1].double() - exact).norm() <= 1e-5 * exact.norm().clamp(min=1e-9)
