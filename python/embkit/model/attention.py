"""Attention on packed sequences, and a mask that opens slowly, through transformers' interfaces.

Under the name ``embkit`` two functions are registered with transformers. The mask function is told
by each model which tokens may see which; on a padded batch it gives SDPA's mask, or with an opening
the soft mask; on a packed one it reads from the model's own rule how far a token sees to each side,
so sliding windows come out right whatever the family calls them. The attention function takes
``cu_seq_lens_q``: with it, tokens of all sequences lie one after another and none sees another's.

Shape suffixes: T tokens of all sequences, B sequences, N heads, L tokens of one sequence, D width
of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from embkit.errors import UsageError

NAME = "embkit"
_HALF = (torch.float16, torch.bfloat16)


class Window(NamedTuple):
    """How many tokens a token sees before and after itself; the longest sequence is all."""

    left: int
    right: int


@dataclass(frozen=True)
class _Pass:
    """What the masks of one forward depend on: packed tokens, or an opening below 1."""

    longest: int | None = None
    opening: float | None = None


_PASS: ContextVar[_Pass] = ContextVar("embkit_attention", default=_Pass())  # noqa: B039


def use(backbone: Any) -> bool:
    """Let a transformers model take packed input; False where its family cannot.

    Only a model that would use SDPA is changed, and on padded input it computes what it did; but
    for one that caps its scores (Gemma 2), which SDPA would leave out and we do not.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not getattr(backbone, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    if backbone.config._attn_implementation == "sdpa" or (
        caps_scores(backbone.config) and backbone.config._attn_implementation == "eager"
    ):
        backbone.config._attn_implementation = NAME
    return bool(backbone.config._attn_implementation == NAME)


def caps_scores(config: Any) -> bool:
    """Whether attention scores s become ``c tanh(s / c)``; of transformers' forms eager does so."""
    return bool(getattr(config, "attn_logit_softcapping", None))


@contextmanager
def packed(longest: int) -> Iterator[None]:
    """Masks of a forward inside are for packed sequences of at most ``longest`` tokens."""
    token = _PASS.set(_Pass(longest=longest))
    try:
        yield
    finally:
        _PASS.reset(token)


@contextmanager
def opening(alpha: float) -> Iterator[None]:
    """Masks of a forward inside are Conan-v2's soft mask: causal at 0, bidirectional at 1."""
    token = _PASS.set(_Pass(opening=alpha))
    try:
        yield
    finally:
        _PASS.reset(token)


# ---------------------------------------------------------------- masks


def mask(**options: Any) -> Any:
    """transformers' mask interface: SDPA's mask, the soft mask, or a :class:`Window`.

    The options are handed on as they come: which there are differs between versions.
    """
    from transformers.masking_utils import sdpa_mask

    now = _PASS.get()
    if now.longest is not None:
        return window(options["mask_function"], now.longest)
    if now.opening is None:
        return sdpa_mask(**options)
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(**options)
    real = options.get("attention_mask")
    if real is None:
        real = allowed.new_ones(len(allowed), allowed.shape[-1])
    return soft_mask(allowed, real, now.opening, options.get("dtype", torch.float32))


def window(mask_function: Callable[..., torch.Tensor], longest: int) -> Window:
    """How far a token sees to each side under a mask rule that is one run around each token.

    The rule is asked about two neighbours in the middle of ``2 longest + 2`` tokens. Full, causal
    and sliding masks answer the same for both; one that depends on the place, such as chunks, does
    not, and is refused.
    """
    first, second = (_sees(mask_function, longest + i, 2 * longest + 2) for i in (0, 1))
    left = int(first[:longest].sum())
    right = int(first[longest + 1 : 2 * longest + 1].sum())
    run = first[longest - left : longest + right + 1]
    if not bool(run.all()) or not torch.equal(first[:-1], second[1:]):
        raise UsageError(
            "This model's attention mask is not one window around each token.",
            fix="use padded batches with it",
        )
    return Window(left, right)


def _sees(mask_function: Callable[..., torch.Tensor], place: int, count: int) -> torch.Tensor:
    """Bool [count]: which tokens the token at a place sees."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    there = torch.arange(count)[None, None, None, :]
    sees = torch.as_tensor(mask_function(zero, zero, zero + place, there))
    return sees.expand(1, 1, 1, count).reshape(-1)


def soft_mask(
    allowed: torch.Tensor, real: torch.Tensor, alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """log M as an additive mask [B, 1, L, L], with M of Conan-embedding-v2.

        M_ij = 1 for j <= i, min(alpha l / i, 1) for j > i        i, j from 1; l = tokens of the row

    Args:
        allowed: bool [B, 1, L, L], the bidirectional mask of the layer, padding excluded.
        real: nonzero for tokens, [B, L]. Padding may be on either side.
        alpha: 0 gives the causal mask, 1 the bidirectional one, both exactly.
        dtype: of the result.
    """
    real = real != 0
    place = real.cumsum(1).clamp_(min=1).to(torch.float32)
    length = real.sum(1, keepdim=True).to(torch.float32)
    ahead = (alpha * length / place).clamp_(max=1).log().clamp_(min=torch.finfo(dtype).min)
    size = real.shape[1]
    future = torch.ones(size, size, dtype=torch.bool, device=real.device).triu(1)
    bias = torch.where(future, ahead[:, None, :, None].to(dtype), torch.zeros((), dtype=dtype))
    return torch.where(allowed, bias, torch.finfo(dtype).min)


# ---------------------------------------------------------------- attention


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: SDPA, or attention within each packed sequence.

    Args:
        query, key, value: [B, N, L, D] padded, or [1, N, T, D] with ``cu_seq_lens_q``.
        attention_mask: of :func:`mask`. softcap: c of :func:`caps_scores`, None for no cap.
        max_length_q: tokens of the longest packed sequence.

    Returns:
        [B, L, N, D] or [1, T, N, D], and None in place of weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (softcap is not None or cu_seq_lens_q is not None):
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if cu_seq_lens_q is None and softcap is not None:
        said = options.get("is_causal")
        if attention_mask is None and (
            getattr(module, "is_causal", True) if said is None else said
        ):
            size = query.shape[2]
            attention_mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
        out_BNLD = _capped(
            query, key, value, attention_mask, softcap, dropout=dropout, scale=scaling
        )
        return out_BNLD.transpose(1, 2).contiguous(), None
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in ("position_bias", "s_aux"):
        if options.get(name) is not None:
            raise UsageError(
                f"Packed attention has no {name}, which this model needs.",
                fix="use padded batches with it",
            )
    if not isinstance(attention_mask, Window) or max_length_q is None:
        raise UsageError("Packed input goes through Encoder.packed.")
    form = _varlen if _has_kernel(query) and softcap is None else partial(_by_length, cap=softcap)
    out_TND = form(
        query[0], key[0], value[0], cu_seq_lens_q, int(max_length_q), attention_mask,
        dropout=dropout, scale=scaling,
    )  # fmt: skip
    return out_TND[None], None


def _has_kernel(query: torch.Tensor) -> bool:
    """Whether a varlen kernel takes these queries: half precision on CUDA, heads up to 256 wide."""
    if query.device.type != "cuda" or query.shape[-1] > 256:
        return False
    return torch.is_autocast_enabled("cuda") or query.dtype in _HALF


def kernel_takes(config: Any) -> bool:
    """Whether a varlen kernel can train a model of this config: torch's has no dropout, and no cap
    of the scores."""
    if caps_scores(config):
        return False
    names = ("attention_probs_dropout_prob", "attention_dropout")
    if not any(getattr(config, name, 0) or 0 for name in names):
        return True
    return importlib.util.find_spec("flash_attn") is not None


def _varlen(
    q_NTD: torch.Tensor,
    k_NTD: torch.Tensor,
    v_NTD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    seen: Window,
    *,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """One kernel over all sequences: torch's varlen attention, or flash-attn for dropout."""
    q, k, v = (t.transpose(0, 1) for t in (q_NTD, k_NTD, v_NTD))
    if torch.is_autocast_enabled("cuda"):
        half = torch.get_autocast_dtype("cuda")
        q, k, v = q.to(half), k.to(half), v.to(half)
    # -1 is "all": a window that no sequence reaches the end of costs a slower kernel.
    left, right = (-1 if side >= longest - 1 else side for side in seen)
    bounds = cu_seqlens.to(device=q.device, dtype=torch.int32)
    if dropout > 0:
        try:
            from flash_attn import flash_attn_varlen_func
        except ImportError as error:
            raise UsageError(
                "torch's varlen attention has no dropout, and this model asks for "
                f"{dropout} in its attention.",
                fix="load it with dropout = 0, install flash-attn, or use padded batches",
            ) from error
        return flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scale,
            causal=(left, right) == (-1, 0), window_size=(left, right),
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest,
        scale=scale, window_size=(left, right),
    )  # type: ignore[return-value] # fmt: skip


def _by_length(
    q_NTD: torch.Tensor,
    k_NTD: torch.Tensor,
    v_NTD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    seen: Window,
    *,
    dropout: float,
    scale: float | None,
    cap: float | None = None,
) -> torch.Tensor:
    """SDPA on each run of neighbours of the same length: no padding, and no mask but a window's.

    Rows of a micro-batch are sorted by length, so the runs are few.
    """
    heads, _, width = q_NTD.shape
    out = []
    for start, count, length in _runs(cu_seqlens.tolist()):
        part = slice(start, start + count * length)
        q, k, v = (
            t[:, part].reshape(heads, count, length, width).transpose(0, 1)
            for t in (q_NTD, k_NTD, v_NTD)
        )
        is_causal, allowed = _segment_mask(length, seen, q.device)
        if cap is None:
            o_BNLD = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=allowed, dropout_p=dropout, scale=scale, is_causal=is_causal
            )
        else:
            if is_causal:
                allowed = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            o_BNLD = _capped(q, k, v, allowed, cap, dropout=dropout, scale=scale)
        out.append(o_BNLD.transpose(1, 2).reshape(count * length, heads, width))
    return torch.cat(out) if out else q_NTD.transpose(0, 1)


def _capped(
    q_BNLD: torch.Tensor,
    k_BNLD: torch.Tensor,
    v_BNLD: torch.Tensor,
    allowed: torch.Tensor | None,
    cap: float,
    *,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Attention with capped scores, all of them in memory: there is no kernel for it in torch.

    Args:
        allowed: bool, or an additive mask, that broadcasts to [B, N, L, L]; None for all.
    """
    scores = q_BNLD @ k_BNLD.transpose(2, 3) * (scale or q_BNLD.shape[3] ** -0.5)
    scores = cap * torch.tanh(scores / cap)
    if allowed is not None and allowed.dtype == torch.bool:
        # Not minus infinity: a row of padding may see nothing, and must stay a number.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    elif allowed is not None:
        scores = scores + allowed
    weights = scores.softmax(-1, dtype=torch.float32).to(q_BNLD.dtype)
    return nn.functional.dropout(weights, dropout) @ v_BNLD


def _runs(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(first token, sequences, length) of each run of neighbours of the same length above 0."""
    runs: list[tuple[int, int, int]] = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        length = end - start
        if length == 0:
            continue
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        else:
            runs.append((start, 1, length))
    return runs


def _segment_mask(
    length: int, seen: Window, device: torch.device
) -> tuple[bool, torch.Tensor | None]:
    """``is_causal`` and mask [L, L] of SDPA for one sequence."""
    all_left, all_right = seen.left >= length - 1, seen.right >= length - 1
    if all_left and all_right:
        return False, None
    if all_left and seen.right == 0:
        return True, None
    place = torch.arange(length, device=device)
    ahead = place[None, :] - place[:, None]
    return False, (ahead >= -seen.left) & (ahead <= seen.right)
