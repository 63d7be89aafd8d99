"""Linear layers in oneDNN's own layout while texts are encoded on a CPU.

A plain linear layer hands torch its weights as they lie in memory: products in float32 go to
another library, and in bfloat16 the weights are laid out anew for every micro-batch. Laid out once
per call of `encode`, both are faster, and GELU is taken while the product is still in registers.
Results are the same to rounding, not to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_TOKENS = 2048  # below, laying out costs more than it saves
_MOST_BYTES = 2 << 30  # of weights, which are held twice meanwhile
_BATCH = 4096  # tokens that the layout is made for; any number works


def available() -> bool:
    """Whether this torch has oneDNN and its operations on weights that are laid out."""
    ops = torch.ops.mkldnn
    names = ("_linear_pointwise", "_reorder_linear_weight")
    return bool(torch.backends.mkldnn.is_available()) and all(hasattr(ops, n) for n in names)


@contextmanager
def prepacked(module: nn.Module, tokens: int) -> Iterator[None]:
    """Use such weights inside, where that is of use; the module is as before afterwards.

    Args:
        module: any; its plain linear layers of one type, float32 or bfloat16, are taken.
        tokens: that will be encoded.
    """
    found = [m for m in module.modules() if type(m) is nn.Linear and _takes(m)]
    size = sum(m.weight.numel() * m.weight.element_size() for m in found)
    mixed = torch.is_autocast_enabled("cpu")  # layers cast by themselves there
    if tokens < _LEAST_TOKENS or size > _MOST_BYTES or mixed or not found or not available():
        yield
        return
    taken: list[nn.Module] = []
    try:
        for layer in found:
            layer.forward = _Packed(layer)  # type: ignore[assignment, method-assign]
            taken.append(layer)
        for block in module.modules():
            dense = getattr(block, "dense", None)
            if dense in found and _is_gelu(getattr(block, "intermediate_act_fn", None)):
                block.forward = _Packed(dense, "gelu")
                taken.append(block)
        yield
    finally:
        for one in taken:
            del one.forward


class _Packed:
    """What a linear layer computes, and an activation after it."""

    def __init__(self, layer: nn.Linear, after: str = "none") -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _BATCH)
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.after, self.dtype = after, layer.weight.dtype

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            raise RuntimeError(f"mat1 and mat2 must have the same dtype: {x.dtype}, {self.dtype}")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, self.after, [], "none"
        )
        return out


def _takes(layer: nn.Linear) -> bool:
    dtype, device = layer.weight.dtype, layer.weight.device.type
    if device != "cpu" or layer.weight.numel() == 0:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _is_gelu(act: Any) -> bool:
    """Whether an activation is GELU without an approximation."""
    if isinstance(act, nn.GELU):
        return act.approximate == "none"
    return (
        type(act).__name__ == "GELUActivation" and getattr(act, "act", None) is nn.functional.gelu
    )
