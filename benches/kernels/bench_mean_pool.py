"""mean_pool beside the usual masked average, padded and packed: both passes.

The rival of the packed form pads first, as a pooling layer that only knows [B, L, H] must.
`floor_bytes` is one read of the kept states and one write of the gradient.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embkit.bench import kernel_ways as ways
from embkit_kernels import mean_pool

CASES = {
    "b256_l96_h256": (256, 96, 256),
    "b64_l512_h768": (64, 512, 768),
    "gpu_b2048_l512_h768": (2048, 512, 768),
    "gpu_b2048_l512_h3072": (2048, 512, 3072),
}


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_mean_pool(
    case: str, layout: str, provider: str, device: torch.device, compare: Callable[..., None]
) -> None:
    batch, length, width = CASES[case]
    if case.startswith("gpu") and device.type == "cpu":
        pytest.skip("a size of the other device")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rng = torch.Generator(device).manual_seed(0)
    lengths = torch.randint(1, length + 1, (batch,), generator=rng, device=device)
    real = torch.arange(length, device=device) < lengths[:, None]
    mask = real.to(dtype)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shape = (int(lengths.sum()), width) if layout == "packed" else (batch, length, width)
    x = torch.randn(shape, generator=rng, device=device).to(dtype)
    weight = torch.randn(batch, width, generator=rng, device=device)

    def ours(x: Tensor) -> Tensor:
        y = mean_pool(x, lengths=lengths) if layout == "padded" else mean_pool(x, cu_seqlens=cu)
        return (y * weight).sum()

    def eager(x: Tensor) -> Tensor:
        packed = layout == "packed"
        y = ways.pool_packed_eager(x, real) if packed else ways.pool_eager(x, mask)
        return (y * weight).sum()

    compare(
        ours if provider == "ours" else eager,
        eager,
        [x],
        1e-5 if dtype == torch.float32 else 5e-2,
        floor_bytes=x.element_size() * (width * int(lengths.sum()) + x.numel()),
    )
