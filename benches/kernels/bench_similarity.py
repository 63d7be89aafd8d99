"""mrl_similarity beside a product and a top-k for each width: the best k of all passages.

Scores are compared, not indexes: where two scores are equal, eager torch's order is its own.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import embkit_kernels
from embkit.bench import kernel_ways as ways

K = 100
CASES = {
    "q256_p4096_d256_k3": (256, 4096, (64, 128, 256)),
    "q512_p16384_d768_k1": (512, 16384, (768,)),
    "gpu_q8192_p65536_d768_k3": (8192, 65536, (256, 512, 768)),
}


@pytest.mark.skipif(not hasattr(embkit_kernels, "mrl_similarity"), reason="no mrl_similarity")
@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("case", CASES)
def test_similarity(case: str, provider: str, device: torch.device, benchmark: Any) -> None:
    queries, passages, dims = CASES[case]
    if case.startswith("gpu") != (device.type == "cuda"):
        pytest.skip("a size of the other device")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(0)
    q, p = (
        torch.randn(n, max(dims), generator=rng, device=device).to(dtype)
        for n in (queries, passages)
    )

    def eager() -> Tensor:
        return ways.similarity_eager(q, p, dims, K)[0]

    def ours() -> Tensor:
        return embkit_kernels.mrl_similarity(q, p, dims, k=K)[0]

    got, want = ours(), eager()
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error <= (1e-5 if dtype == torch.float32 else 1e-2), f"results differ by {error:.1e}"

    def step() -> None:
        (ours if provider == "ours" else eager)()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(floor_flop=2 * queries * passages * max(dims), dims=list(dims))
    benchmark.pedantic(step, rounds=7, warmup_rounds=2)
