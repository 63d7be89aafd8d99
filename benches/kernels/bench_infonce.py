"""infonce beside the formulation of sentence-transformers and other fused losses: both passes.

The rivals are written out in `embkit.bench.kernel_ways`; those of other packages and torch.compile
run on CUDA, where they are installed. The floor is three B x N x D products.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embkit.bench import kernel_ways as ways

TAU = 0.05
CASES = {
    "b256_d256_k3": (256, (64, 128, 256)),
    "b1024_d256_k3": (1024, (64, 128, 256)),
    "b2048_d256_k1": (2048, (256,)),
    "b1024_d768_k2": (1024, (256, 768)),
    "gpu_b8192_d768_k3": (8192, (256, 512, 768)),
    "gpu_b8192_d1024_k3": (8192, (256, 512, 1024)),
    "gpu_b8192_d3072_k3": (8192, (768, 1536, 3072)),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "eager": ways.infonce_eager,
    "compiled": torch.compile(ways.infonce_eager),
    "compiled_segments": torch.compile(ways.infonce_segments),
    "memeff": ways.infonce_memeff,
    "infcl": ways.infonce_infcl,
    "liger": ways.infonce_liger,
    "ours": ways.infonce_ours,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_infonce(
    case: str, provider: str, device: torch.device, compare: Callable[..., None]
) -> None:
    batch, dims = CASES[case]
    if case.startswith("gpu") != (device.type == "cuda"):
        pytest.skip("a size of the other device")
    if provider not in ("eager", "ours") and device.type == "cpu":
        pytest.skip("inductor needs a C++ compiler, the others CUDA")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(0)
    p = torch.randn(batch, max(dims), generator=rng, device=device)
    # Hard enough that the loss is not tiny: there eager cancels and only ours stays exact.
    q = torch.randn(batch, max(dims), generator=rng, device=device) + 0.2 * p
    try:
        compare(
            lambda q, p: PROVIDERS[provider](q, p, dims, TAU),
            lambda q, p: ways.infonce_eager(q, p, dims, TAU),
            [x.to(dtype) for x in (q, p)],
            TOLERANCE[dtype],
            dims=list(dims),
            floor_flop=3 * 2 * batch**2 * max(dims),
        )
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
