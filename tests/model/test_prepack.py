"""Weights laid out for oneDNN: the same embeddings to rounding, and the encoder as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from embkit.model import prepack

pytestmark = pytest.mark.skipif(not prepack.available(), reason="this torch has no oneDNN")


class Block(nn.Module):
    """A linear layer and GELU, named as in BERT, and one more layer."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(24, 40), nn.Linear(40, 8, bias=False)
        self.intermediate_act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.intermediate_act_fn(self.dense(x))


class Net(nn.Module):
    def __init__(self, act: Any) -> None:
        super().__init__()
        self.block = Block(act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.out(self.block(x))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_to_rounding(act: nn.Module, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    torch.manual_seed(0)
    net = Net(act).to(dtype).eval()
    x = torch.randn(3, 7, 24, dtype=dtype)
    with torch.inference_mode():
        plain = net(x)
        with prepack.prepacked(net, 10**6):
            assert "forward" in vars(net.block.dense)
            assert ("forward" in vars(net.block)) == (str(act) == str(nn.GELU()))
            inside = net(x)
        after = net(x)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(inside, plain, rtol=limit, atol=limit)
    assert torch.equal(after, plain)
    assert not [m for m in net.modules() if "forward" in vars(m)]


def test_new_weights_are_seen_and_an_error_leaves_the_module_as_it_was() -> None:
    net, x = Net(nn.GELU()).eval(), torch.ones(2, 24)
    with torch.inference_mode(), prepack.prepacked(net, 10**6):
        before = net(x)
    with torch.no_grad():
        net.block.out.weight.mul_(2)
    with torch.inference_mode():
        with prepack.prepacked(net, 10**6):
            torch.testing.assert_close(net(x), 2 * before)
        with pytest.raises(RuntimeError, match="dtype"), prepack.prepacked(net, 10**6):
            net(x.double())
    assert not [m for m in net.modules() if "forward" in vars(m)]


def test_few_tokens_and_large_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(nn.GELU())
    with prepack.prepacked(net, 10):
        assert "forward" not in vars(net.block.dense)
    monkeypatch.setattr(prepack, "_MOST_BYTES", 100)
    with prepack.prepacked(net, 10**6):
        assert "forward" not in vars(net.block.dense)


def test_encode(make_encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "_LEAST_TOKENS", 1)
    encoder = make_encoder()
    texts = [f"w{i} " * (i + 1) for i in range(9)]
    plain = encoder.encode(texts)
    packed = encoder.prepack().encode(texts)
    np.testing.assert_allclose(packed, plain, atol=1e-6)
    assert np.array_equal(encoder.prepack(False).encode(texts), plain)
