"""cosent and spread_out against every pair in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from embkit_kernels import cosent, cosent_naive, prefix_cosine, spread_out, spread_out_naive
from embkit_kernels import cosent as function

SCORES, LABELS = torch.tensor([0.9, 0.2, 0.5, 0.6]), torch.tensor([1.0, 0.0, 0.5, 0.5])
Q = torch.tensor([[1, 2, 0, 1], [0, 1, 3, 1], [2, 0, 1, 1]], dtype=torch.float64)
P = torch.tensor([[1, 1, 0, 2], [1, 1, 2, 0], [2, 1, 1, 0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(dtype: torch.dtype) -> None:
    scores = SCORES.to(dtype)
    assert function(scores, LABELS)[0].item() == pytest.approx(0.005613, abs=1e-6)
    assert function(scores.flip(0), LABELS)[0].item() == pytest.approx(6.694554, abs=1e-6)
    sides = spread_out(Q.to(dtype))[0].item(), spread_out(P.to(dtype))[0].item()
    assert sides == pytest.approx((0.209596, 0.351852), abs=1e-6)
    assert sum(sides) == pytest.approx(0.561448, abs=1e-6)


def gradients(function: Any, a: Tensor, b: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    a, b = (t.detach().clone().requires_grad_() for t in (a, b))
    loss, per_dim = function((a, b), *args, **options)
    grads = torch.autograd.grad(loss, (a, b))
    return [loss.detach(), per_dim.detach(), *grads]


@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("batch", [1, 2, 127, 129, 1000])
def test_against_all_pairs(batch: int, scale: float, rng: torch.Generator) -> None:
    a = torch.randn(batch, 24, generator=rng, dtype=torch.float64)
    b = a + 2 * torch.randn(batch, 24, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 6, (batch,), generator=rng).float()
    options = {"dims": (24, 5), "scale": scale, "dim_weights": (0.5, 2.0)}
    want = gradients(cosent_naive, a, b, labels, **options)
    got = gradients(function, a, b, labels, **options)
    single = gradients(function, a.float(), b.float(), labels, **options)
    for name, w, g, s in zip(("loss", "per_dim", "a", "b"), want, got, single, strict=True):
        floor = max(w.norm().item(), 1e-6)
        assert (g - w).norm() <= 1e-11 * floor, name
        assert (s - w).norm() <= 1e-4 * floor, name
        assert s.dtype == torch.float32


def test_equal_labels_and_nan_take_part_in_nothing(rng: torch.Generator) -> None:
    scores = torch.randn(2, 6, generator=rng, requires_grad=True)
    loss, per_dim = cosent(scores, torch.ones(6))
    assert loss.item() == 0
    assert bool((torch.autograd.grad(loss, scores)[0] == 0).all())
    labels = torch.tensor([1.0, torch.nan, 0.0, torch.nan, 1.0, 0.5])
    real = ~labels.isnan()
    loss, _ = cosent(scores, labels)
    torch.testing.assert_close(loss, cosent(scores[:, real], labels[real])[0])
    grad = torch.autograd.grad(loss, scores)[0]
    assert bool((grad[:, ~real] == 0).all())
    assert bool((grad[:, real] != 0).all())


def test_invariant_to_monotone_labels_and_to_order(rng: torch.Generator) -> None:
    scores = torch.randn(700, generator=rng).tanh()
    labels = torch.randint(0, 50, (700,), generator=rng)
    loss, _ = cosent(scores, labels)
    assert torch.equal(cosent(scores, labels.double().exp())[0], loss)
    order = torch.randperm(700, generator=rng)
    torch.testing.assert_close(cosent(scores[order], labels[order])[0], loss)


def test_prefix_cosine_of_zero_rows_is_quiet() -> None:
    a = torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 0.0]], requires_grad=True)
    s = prefix_cosine(a, a.detach() * 2, (2, 3))
    torch.testing.assert_close(s.detach(), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    (grad,) = torch.autograd.grad(s.sum(), a)
    assert bool(grad.isfinite().all())


def test_gradcheck(rng: torch.Generator) -> None:
    a, b = (torch.randn(5, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 1, 1, 3, 2])
    leaves = (a.requires_grad_(), b.requires_grad_())
    for f in (cosent, cosent_naive):
        assert torch.autograd.gradcheck(lambda a, b, f=f: f((a, b), labels, (3, 6))[0], leaves)
    assert torch.autograd.gradcheck(lambda a: spread_out(a, (2, 6))[0], (a,))


@pytest.mark.parametrize("shape", [(1, 4), (2, 7), (9, 4), (33, 8)])
def test_spread_out_against_all_pairs(shape: tuple[int, int], rng: torch.Generator) -> None:
    x = torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)
    dims = (shape[1], 2)
    for got, want in zip(spread_out(x, dims), spread_out_naive(x, dims), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    ours = torch.autograd.grad(spread_out(x, dims)[0], x)[0]
    torch.testing.assert_close(
        ours, torch.autograd.grad(spread_out_naive(x, dims)[0], x)[0], rtol=1e-9, atol=1e-12
    )


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="two sides"):
        cosent(SCORES, LABELS, (2,))
    with pytest.raises(ValueError, match="differ"):
        cosent(SCORES, LABELS[:3])
    with pytest.raises(ValueError, match="equal \\[B, D\\]"):
        cosent((Q, P[:2]), LABELS[:3])
    with pytest.raises(ValueError, match="want \\[B, D\\]"):
        spread_out(SCORES)
