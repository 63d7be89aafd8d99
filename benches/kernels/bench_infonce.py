"""infonce against the formulation of sentence-transformers: forward and backward.

The rival is written out here as MatryoshkaLoss over MultipleNegativesRankingLoss computes it: for
each width cut, normalise, one B x N product, cross-entropy. `unit` is one B x N x D product; the
floor is three of them.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from embkit_kernels import infonce

TAU = 0.05
CASES = {
    "b256_d256_k3": (256, (256, 128, 64)),
    "b1024_d256_k3": (1024, (256, 128, 64)),
    "b2048_d256_k1": (2048, (256,)),
    "b1024_d768_k2": (1024, (768, 256)),
    "gpu_b8192_d768_k3": (8192, (768, 512, 256)),
    "gpu_b8192_d3072_k3": (8192, (3072, 1536, 768)),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def eager(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    target = torch.arange(len(q), device=q.device)
    loss = q.new_zeros((), dtype=torch.float32)
    for d in dims:
        scores = F.normalize(q[:, :d], dim=1) @ F.normalize(p[:, :d], dim=1).t()
        loss = loss + F.cross_entropy(scores.float() / TAU, target)
    return loss


def ours(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    return infonce(q, p, dims, temperature=TAU)[0]


def compiled(q: Tensor, p: Tensor, dims: Sequence[int]) -> Tensor:
    return torch.compile(eager)(q, p, dims)


PROVIDERS: dict[str, Callable[..., Tensor]] = {"eager": eager, "compiled": compiled, "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_infonce(
    case: str, provider: str, device: torch.device, compare: Callable[..., None]
) -> None:
    batch, dims = CASES[case]
    if case.startswith("gpu") != (device.type == "cuda"):
        pytest.skip("a size of the other device")
    if provider == "compiled" and device.type == "cpu":
        pytest.skip("inductor needs a C++ compiler; timed on CUDA only")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator().manual_seed(0)
    p = torch.randn(batch, max(dims), generator=rng)
    # Hard enough that the loss is not tiny: there eager cancels and only ours stays exact.
    q = torch.randn(batch, max(dims), generator=rng) + 0.2 * p
    leaves = [x.to(device, dtype) for x in (q, p)]
    compare(
        lambda q, p: PROVIDERS[provider](q, p, dims),
        lambda q, p: eager(q, p, dims),
        leaves,
        TOLERANCE[dtype],
        dims=list(dims),
        floor_flop=3 * 2 * batch**2 * max(dims),
    )
