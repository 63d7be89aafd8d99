"""score_distill against each row and width in float64."""

import pytest
import torch

from embkit_kernels import score_distill, score_distill_naive


def test_by_hand() -> None:
    """Cosines 1 and 0 over 0.5, teacher 3 : 1."""
    q = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    hard = torch.tensor([[[0.0, 5.0], [9.0, 9.0]]], dtype=torch.float64)
    gold = torch.tensor([[3.0, 1.0, torch.nan]]).log()
    rows, used = score_distill(q, q, hard, gold, temperature=0.5)
    s = torch.tensor([2.0, 0.0], dtype=torch.float64).softmax(0)
    want = 0.75 * (0.75 / s[0]).log() + 0.25 * (0.25 / s[1]).log()
    assert rows.item() == pytest.approx(want.item(), rel=1e-7) and used.tolist() == [True]
    # A student that agrees has no loss and no gradient.
    same = torch.tensor([[1 / 0.5, 0.0, torch.nan]])
    leaf = q.clone().requires_grad_()
    rows, _ = score_distill(leaf, q, hard, same, temperature=0.5)
    rows.sum().backward()
    assert rows.item() == pytest.approx(0, abs=1e-12) and leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_float64(dtype: torch.dtype, rng: torch.Generator) -> None:
    q, p, hard = (torch.randn(*s, generator=rng) for s in ((17, 24), (17, 24), (17, 4, 24)))
    scores = torch.randn(17, 5, generator=rng)
    scores[torch.rand(17, 5, generator=rng) < 0.2] = torch.nan
    scores[0, 0] = scores[1, 1:] = -torch.inf
    weight = torch.rand(3, 17, generator=rng)
    found = []
    for function, kind in ((score_distill, dtype), (score_distill_naive, torch.float64)):
        leaves = [x.to(dtype).to(kind).detach().clone().requires_grad_() for x in (q, p, hard)]
        tau = torch.tensor(0.2, dtype=torch.float64 if kind == torch.float64 else torch.float32)
        leaves.append(tau.requires_grad_())
        rows, used = function(
            *leaves[:3], scores, (24, 5, 11), temperature=tau, teacher_temperature=0.7
        )
        (rows * weight).sum().backward()
        grads = [x.grad.double() for x in leaves if x.grad is not None]
        found.append((rows.double(), used, *grads))
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 8e-3}[dtype]
    got, want = found
    assert torch.equal(got[1], want[1]) and not want[1][:2].any() and want[1].sum() > 8
    assert len(got) == 6
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * max(1e-3, b.double().norm().item())
    assert not got[0][:, :2].any()


def test_wrong_shapes() -> None:
    x, scores = torch.eye(2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"hard \(2, 2\)"):
        score_distill(x, x, x, scores)
    with pytest.raises(ValueError, match=r"want \(2, 2\)"):
        score_distill(x, x, x[:, None], scores[:1])
