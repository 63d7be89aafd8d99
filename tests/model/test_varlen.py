"""The varlen kernels of packed input: what they are asked for, and on a GPU what they answer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen
from families import DECODERS, FAMILIES
from tokenizers import Tokenizer

from embkit.errors import UsageError
from embkit.model import attention

from .test_families import batch, encoder_of, unit


def naive_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """torch's varlen_attn by its documentation: [T, N, D], windows (left, right), -1 for all."""
    assert query.shape == key.shape == value.shape and query.is_contiguous()
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    assert max_q == int(cu_seq_q.diff().max())
    left, right = window_size
    out = torch.empty_like(query)
    for start, end in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q, k, v = (t[start:end].double() for t in (query, key, value))
        scores = torch.einsum("qnd,knd->nqk", q, k) * scale
        ahead = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]
        far = ((ahead < -left) & (left >= 0)) | ((ahead > right) & (right >= 0))
        weights = scores.masked_fill(far, -torch.inf).softmax(-1)
        out[start:end] = torch.einsum("nqk,knd->qnd", weights, v).to(out.dtype)
    return out


@pytest.mark.parametrize("family", ["bert", "modernbert", "mistral", "gemma3"])
def test_the_kernel_is_asked_for_the_right_thing(
    family: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds, windows, scale and groups of heads, with a reference in the kernel's place."""
    _, _, flat, bounds = batch()
    asked: list[tuple[int, int]] = []

    def kernel(*arguments: Any, **options: Any) -> torch.Tensor:
        asked.append(options["window_size"])
        return naive_varlen(*arguments, **options)

    for bidirectional in (False, True) if family in DECODERS else (False,):
        encoder = encoder_of(family, tokenizer, bidirectional=bidirectional)
        want = unit(encoder.packed(flat, bounds))
        with monkeypatch.context() as patch:
            patch.setattr(attention, "_has_kernel", lambda _: True)
            patch.setattr(torch_varlen, "varlen_attn", kernel)
            got = unit(encoder.packed(flat, bounds))
        assert (got - want).abs().max() < 2e-6
    full = (-1, -1)
    expected = {
        "bert": {full},
        "modernbert": {full, (3, 3)},
        "mistral": {(3, 0), (4, 4)},
        "gemma3": {(-1, 0), (3, 0), full, (2, 2)},
    }
    assert set(asked) == expected[family]


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_dropout_in_a_kernel_without_it(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, flat, bounds = batch()
    changes = {"attention_probs_dropout_prob": 0.1}
    encoder = encoder_of("bert", tokenizer, changes=changes)
    monkeypatch.setattr(attention, "_has_kernel", lambda _: True)
    monkeypatch.setattr(torch_varlen, "varlen_attn", naive_varlen)
    assert encoder.can_pack and not encoder.packs_fast  # so a run on a GPU chooses padded batches
    assert encoder_of("bert", tokenizer, changes={"attention_probs_dropout_prob": 0.0}).packs_fast
    encoder.packed(flat, bounds)  # in evaluation there is none
    with pytest.raises(UsageError, match=r"no dropout, and this model asks for 0\.1"):
        encoder.train().packed(flat, bounds)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_packed_equals_padded(
    family: str, dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    """Twice the error of padded SDPA in the same type, against fp64 on the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    ids, mask, flat, bounds = batch()
    weights = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(1))
    for bidirectional in (False, True) if family in DECODERS else (False,):
        encoder = encoder_of(family, tokenizer, bidirectional=bidirectional)
        want = unit(encoder.double()(ids, mask))
        encoder = encoder.to("cuda", torch.float32)
        grads, errors = [], []
        for inputs in ((ids.cuda(), mask.cuda()), (flat.cuda(), bounds.cuda())):
            encoder.zero_grad()
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                out = encoder(*inputs) if inputs[0].ndim == 2 else encoder.packed(*inputs)
            out = torch.nn.functional.normalize(out.float(), dim=1)
            (out * weights.cuda()).sum().backward()
            errors.append(float((out.detach().cpu().double() - want).abs().max()))
            grads.append(torch.cat([p.grad.reshape(-1) for p in encoder.parameters()]))
        floor = 1e-5 if dtype == torch.float32 else 5e-3
        assert errors[1] <= 2 * errors[0] + floor
        assert (grads[0] - grads[1]).norm() <= (1e-3 if dtype == torch.float32 else 0.1) * grads[
            0
        ].norm()
