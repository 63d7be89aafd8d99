"""mean_pool against the usual masked average, padded and packed: forward and backward.

The rival of the packed form pads first, as a pooling layer that only knows [B, L, H] must.
`floor_bytes` is one read of the kept states and one write of the gradient.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embkit_kernels import mean_pool

CASES = {"b256_l96_h256": (256, 96, 256), "b64_l512_h768": (64, 512, 768)}


def eager_padded(x: Tensor, mask: Tensor) -> Tensor:
    m = mask[..., None].to(x.dtype)
    return (x * m).sum(1) / m.sum(1).clamp(min=1e-9)


def eager_packed(x: Tensor, mask: Tensor) -> Tensor:
    padded = x.new_zeros(*mask.shape, x.shape[1])
    padded[mask] = x
    return eager_padded(padded, mask)


@pytest.mark.parametrize("provider", ["eager", "ours"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_mean_pool(
    case: str, layout: str, provider: str, device: torch.device, compare: Callable[..., None]
) -> None:
    batch, length, width = CASES[case]
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, length + 1, (batch,), generator=rng)
    mask = (torch.arange(length) < lengths[:, None]).to(device)
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    x = torch.randn(batch, length, width, generator=rng).to(device)
    weight = torch.randn(batch, width, generator=rng).to(device)
    eager = eager_padded
    if layout == "packed":
        x, eager = x[mask], eager_packed

    def ours(x: Tensor) -> Tensor:
        y = mean_pool(x, mask=mask) if layout == "padded" else mean_pool(x, cu_seqlens=cu)
        return (y * weight).sum()

    def rival(x: Tensor) -> Tensor:
        return (eager(x, mask) * weight).sum()

    compare(
        ours if provider == "ours" else rival,
        rival,
        [x],
        1e-5,
        floor_bytes=4 * width * int(lengths.sum()) + 4 * x.numel(),
    )
