"""Token states of a backbone and their pooling, for padded and for packed batches.

Shape suffixes as in encoder.py: B rows, L tokens of the longest, T tokens of all, H width.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch

from embkit import kernels
from embkit.model import attention
from embkit.model.convert import position_offset


def takes_positions(backbone: Any) -> bool:
    """Whether the model can be told where in its text each token is."""
    return "position_ids" in inspect.signature(backbone.forward).parameters


def padded(
    backbone: Any, ids: torch.Tensor, mask: torch.Tensor, *, opening: float = 1.0
) -> torch.Tensor:
    """States [B, L, H] of ids int64 [B, L], padded on either side.

    Args:
        mask: 1 for tokens, 0 for padding, int64 [B, L].
        opening: of the soft mask; 1 is the model as it is built.
    """
    options: dict[str, Any] = {}
    # Positions count from a text's first token. With padding on the right that is what every model
    # does by itself, and RoBERTa's do it always. A compiled graph cannot look at the mask.
    left = torch.compiler.is_compiling() or not bool(mask[:, 0].all())
    if left and not position_offset(backbone) and takes_positions(backbone):
        options["position_ids"] = ((mask != 0).cumsum(1) - 1).clamp_(min=0)
    with attention.opening(opening) if opening < 1.0 else nullcontext():
        return backbone(input_ids=ids, attention_mask=mask, **options).last_hidden_state


def packed(
    backbone: Any, ids: torch.Tensor, cu_seqlens: torch.Tensor, *, longest: int | None = None
) -> torch.Tensor:
    """States [T, H] of ids int64 [T]; sequence b is ids[cu_seqlens[b]:cu_seqlens[b + 1]]."""
    bounds = cu_seqlens.to(device=ids.device, dtype=torch.int32)
    lengths = bounds.diff()
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    place = torch.arange(len(ids), device=ids.device)
    start = torch.repeat_interleave(bounds[:-1].long(), lengths, output_size=len(ids))
    with attention.packed(longest):
        out = backbone(
            input_ids=ids[None],
            # Without a mask transformers would look for sequences in the positions itself.
            attention_mask=torch.ones(1, len(ids), dtype=torch.bool, device=ids.device),
            position_ids=(place - start + position_offset(backbone))[None],
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=longest,
            max_length_k=longest,
        )
    return out.last_hidden_state[0]


def pool(
    h_BLH: torch.Tensor, mask: torch.Tensor, *, pooling: str, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """One state a row [B, H]: mean, cls or last; ``skip`` tokens [B] in front are left out."""
    if pooling == "mean":
        return kernels.mean_pool(h_BLH, mask=mask, prompt_len=skip)
    if pooling == "cls":
        return kernels.cls_pool(h_BLH, mask=mask)
    return kernels.last_token_pool(h_BLH, mask=mask)


def pool_packed(
    h_TH: torch.Tensor, cu_seqlens: torch.Tensor, *, pooling: str, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`pool`, of packed states."""
    bounds = cu_seqlens.to(h_TH.device).long()
    if pooling == "mean":
        return kernels.mean_pool(h_TH, cu_seqlens=bounds, prompt_len=skip)
    real = bounds.diff() > 0
    place = bounds[:-1] if pooling == "cls" else bounds[1:] - 1
    picked = h_TH[place.clamp(min=0, max=max(len(h_TH) - 1, 0))]
    return torch.where(real[:, None], picked, torch.zeros((), dtype=h_TH.dtype))
