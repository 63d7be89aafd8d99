"""cosent beside the B x B formulation of sentence-transformers' CoSENTLoss, at several widths."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embkit.bench import kernel_ways as ways
from embkit_kernels import cosent

CASES = {
    "b256_d256_k3": (256, (64, 128, 256)),
    "b2048_d256_k3": (2048, (64, 128, 256)),
    "b4096_d768_k1": (4096, (768,)),
    "gpu_b8192_d768_k3": (8192, (256, 512, 768)),
}


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("case", CASES)
def test_cosent(
    case: str, provider: str, device: torch.device, compare: Callable[..., None]
) -> None:
    batch, dims = CASES[case]
    if case.startswith("gpu") and device.type == "cpu":
        pytest.skip("a size of the other device")
    rng = torch.Generator(device).manual_seed(0)
    a = torch.randn(batch, max(dims), generator=rng, device=device)
    b = a + torch.randn(batch, max(dims), generator=rng, device=device)
    labels = torch.randint(0, 26, (batch,), generator=rng, device=device) / 5

    def eager(a: Tensor, b: Tensor) -> Tensor:
        return ways.cosent_eager(a, b, labels, dims)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return cosent((a, b), labels, dims, scale=20.0)[0]

    compare(
        ours if provider == "ours" else eager,
        eager,
        [a, b],
        2e-5,
        dims=list(dims),
        pairs=batch**2,
    )
