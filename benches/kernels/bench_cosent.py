"""cosent against the B x B formulation of sentence-transformers' CoSENTLoss, at several widths."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embkit_kernels import cosent

CASES = {
    "b256_d256_k3": (256, (256, 128, 64)),
    "b2048_d256_k3": (2048, (256, 128, 64)),
    "b4096_d768_k1": (4096, (768,)),
}


def eager(a: Tensor, b: Tensor, labels: Tensor, dims: Sequence[int]) -> Tensor:
    loss = a.new_zeros(())
    for d in dims:
        s = 20.0 * (F.normalize(a[:, :d], dim=1) * F.normalize(b[:, :d], dim=1)).sum(1)
        # terms[i, j] = s_i - s_j counts where pair i should score lower than pair j.
        terms = s[:, None] - s[None, :]
        terms = terms - (1 - (labels[:, None] < labels[None, :]).float()) * 1e12
        loss = loss + torch.logsumexp(torch.cat([s.new_zeros(1), terms.reshape(-1)]), 0)
    return loss


def ours(a: Tensor, b: Tensor, labels: Tensor, dims: Sequence[int]) -> Tensor:
    return cosent((a, b), labels, dims, scale=20.0)[0]


@pytest.mark.parametrize("provider", [eager, ours], ids=["eager", "ours"])
@pytest.mark.parametrize("case", CASES)
def test_cosent(
    case: str,
    provider: Callable[..., Tensor],
    device: torch.device,
    compare: Callable[..., None],
) -> None:
    batch, dims = CASES[case]
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(batch, max(dims), generator=rng)
    b = (a + torch.randn(batch, max(dims), generator=rng)).to(device)
    labels = torch.randint(0, 26, (batch,), generator=rng).to(device) / 5
    compare(
        lambda a, b: provider(a, b, labels, dims),
        lambda a, b: eager(a, b, labels, dims),
        [a.to(device), b],
        2e-5,
        dims=list(dims),
        pairs=batch**2,
    )
