"""Masked mean pooling of token states, padded or packed, without the prompt's tokens.

    m_b = (1 / n_b) sum over the n_b kept tokens t of b of x_t     y_b = m_b, or r_b m_b normalised
    dx_t = (1 / n_b) h_b if t is kept, else 0,      h_b = g_b, or r_b (g_b - (g_b . y_b) y_b)

with r_b = 1 / |m_b|. Sums run in float32 (float64 for float64 states). A sequence with no kept
token gives zeros and no gradient. States at dropped positions are never read into a sum, so NaN in
the padding is harmless. Every sum has a fixed order: no atomics, and nothing waits for the device.

Two custom ops: `mean_pool_packed` over spans of rows [start, end), which is also what padded states
with lengths are, and `mean_pool_padded` for states with a mask. Their Triton kernels are in
`mean_pool_triton.py`. Prefix norms of the result are not made here: between pooling and a loss
there is a projection or a gather over ranks, and the losses take raw embeddings.
"""

from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._common import MIN_NORM, NAMESPACE, accumulate_dtype

BLOCK = 1 << 20
"""Elements of the largest temporary of a padded sum on CUDA."""


def mean_pool(
    states: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prompt_len: Tensor | int | None = None,
    normalize: bool = False,
) -> Tensor:
    """Average the states of each sequence's kept tokens.

    Args:
        states: [B, L, H] padded, or [T, H] packed with `cu_seqlens`; any float dtype.
        lengths: int [B], real tokens of each right-padded row. Padding is then never read; a mask
            is read itself.
        mask: bool or int [B, L], nonzero where a token is real; any shape, left or right padding.
        cu_seqlens: int [B + 1], ascending; sequence b is states[cu_seqlens[b]:cu_seqlens[b + 1]].
        prompt_len: tokens to leave out at the start of each sequence (the first real ones),
            int [B] or one int.
        normalize: scale each result to unit length (a zero vector stays zero).

    Returns:
        [B, H] in the dtype of `states`. Padded states without lengths and mask average all L.

    Raises:
        ValueError: arguments that exclude each other, or shapes that do not fit.
        TypeError: a floating-point mask.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> mean_pool(x, lengths=torch.tensor([2])).item()
        2.0
    """
    if cu_seqlens is not None:
        if states.dim() != 2:
            raise ValueError(f"packed states are [T, H], got {tuple(states.shape)}")
        if lengths is not None or mask is not None:
            raise ValueError("cu_seqlens excludes lengths and mask")
        rows, start, end = states, cu_seqlens[:-1], cu_seqlens[1:]
    else:
        batch, length = _padded_shape(states, lengths, mask)
        if mask is not None:
            keep = _after_prompt(mask != 0, prompt_len)
            return mean_pool_padded(states, keep, normalize)[0].to(states.dtype)
        rows = states.reshape(batch * length, states.shape[2])
        start = torch.arange(batch, device=states.device) * length
        end = start + (length if lengths is None else lengths.clamp(0, length))
    if prompt_len is not None:
        _check_prompt(prompt_len, start.shape[0])
        start = torch.minimum(start + prompt_len, end)
    start, end = start.to(torch.int64), end.to(torch.int64)
    return mean_pool_packed(rows, start, end, normalize)[0].to(states.dtype)


def mean_pool_ref(
    states: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    prompt_len: Tensor | int | None = None,
    normalize: bool = False,
) -> Tensor:
    """The specification of `mean_pool`: a loop over sequences in plain autograd."""
    acc, out = accumulate_dtype(states), []
    count = states.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    prompts = torch.as_tensor(0 if prompt_len is None else prompt_len).expand(count).tolist()
    for b in range(count):
        if cu_seqlens is not None:
            tokens = states[int(cu_seqlens[b]) : int(cu_seqlens[b + 1])]
        elif mask is not None:
            tokens = states[b][mask[b] != 0]
        else:
            tokens = states[b] if lengths is None else states[b, : int(lengths[b])]
        tokens = tokens[prompts[b] :].to(acc)
        y = tokens.mean(0) if len(tokens) else tokens.sum(0)
        if normalize and bool(y.norm() > MIN_NORM):
            y = y / y.norm()
        out.append(y)
    return torch.stack(out).to(states.dtype)


def cls_pool(states: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """First real token of each row: [B, L, H] -> [B, H]; zeros where a row has none.

    Args:
        states: padded states [B, L, H].
        mask: bool or int [B, L]; None means that every row starts at token 0.
    """
    keep = _real(states, None, mask)
    return _pick(states, keep.to(torch.int8).argmax(1), keep.any(1))


def last_token_pool(
    states: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Last real token of each row: [B, L, H] -> [B, H]; zeros where a row has none.

    Args:
        states: padded states [B, L, H].
        lengths: int [B], real tokens of right-padded rows.
        mask: bool or int [B, L], left or right padding.
    """
    keep = _real(states, lengths, mask)
    place = keep.shape[1] - 1 - keep.flip(1).to(torch.int8).argmax(1)
    return _pick(states, place, keep.any(1))


def _pick(states: Tensor, place: Tensor, real: Tensor) -> Tensor:
    index = place[:, None, None].expand(-1, 1, states.shape[2])
    return torch.where(real[:, None], states.gather(1, index).squeeze(1), 0)


def _check_prompt(prompt_len: Tensor | int, count: int) -> None:
    if isinstance(prompt_len, Tensor) and prompt_len.shape not in ((), (count,)):
        raise ValueError(f"prompt_len has shape {tuple(prompt_len.shape)}, want ({count},)")


def _padded_shape(states: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[int, int]:
    """(B, L) of padded states, after checking what came with them."""
    if states.dim() != 3:
        raise ValueError(
            f"padded states are [B, L, H], got {tuple(states.shape)}; "
            "packed [T, H] needs cu_seqlens"
        )
    batch, length = states.shape[:2]
    if lengths is not None and mask is not None:
        raise ValueError("give lengths or mask, not both")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, want ({batch},)")
    if mask is not None:
        if mask.is_floating_point():
            raise TypeError("mask is floating point; a mask of real tokens is bool or int")
        if mask.shape != (batch, length):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, want {(batch, length)}")
    return batch, length


def _real(states: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """Bool [B, L]: real tokens."""
    batch, length = _padded_shape(states, lengths, mask)
    if mask is not None:
        return mask != 0
    if lengths is None:
        return torch.ones(batch, length, dtype=torch.bool, device=states.device)
    return torch.arange(length, device=states.device) < lengths[:, None]


def _after_prompt(real: Tensor, prompt_len: Tensor | int | None) -> Tensor:
    """Real tokens [B, L] without the first prompt_len of each row."""
    if prompt_len is None:
        return real
    _check_prompt(prompt_len, real.shape[0])
    limit = prompt_len[..., None] if isinstance(prompt_len, Tensor) else prompt_len
    return real & (real.to(torch.int32).cumsum(1) > limit)


def _finish(total: Tensor, count: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Sums [B, H] and token counts [B] to means, and 1 / norm [B] (empty if not normalised)."""
    mean = total.div_(count.clamp(min=1)[:, None])
    if not normalize:
        return mean, mean.new_empty(0)
    square = mean.square().sum(-1)
    inverse = torch.where(square > MIN_NORM**2, square.rsqrt(), 0)
    return mean.mul_(inverse[:, None]), inverse


def _share(
    grad: Tensor, pooled: Tensor | None, inverse: Tensor | None, count: Tensor, dtype: torch.dtype
) -> Tensor:
    """What each kept token of a sequence gets of its gradient: [B, H]."""
    if pooled is not None and inverse is not None:
        along = (grad * pooled).sum(-1, keepdim=True)
        grad = (grad - along * pooled) * inverse[:, None]
    return (grad / count.clamp(min=1)[:, None]).to(dtype)


def _places(keep: Tensor) -> list[slice | Tensor | None]:
    """Where the kept tokens of each row of keep [B, L] are: a slice if they are one run.

    On CPU a sum over slices reads only kept tokens and copies nothing, which is worth a Python
    step a row.
    """
    if keep.shape[1] == 0:
        return [None] * keep.shape[0]
    small = keep.to(torch.int8)
    first, back = small.argmax(1).tolist(), small.flip(1).argmax(1).tolist()
    places: list[slice | Tensor | None] = []
    for b, count in enumerate(keep.sum(1).tolist()):
        lo, hi = first[b], keep.shape[1] - back[b]
        run = slice(lo, hi) if hi - lo == count else keep[b]
        places.append(run if count else None)
    return places


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    states, *where, normalize = inputs
    ctx.save_for_backward(*where, *(output if normalize else ()))
    ctx.shape, ctx.dtype = states.shape, states.dtype
    ctx.set_materialize_grads(False)


@torch.library.custom_op(
    f"{NAMESPACE}::mean_pool_padded",
    mutates_args=(),
    schema="(Tensor states, Tensor keep, bool normalize) -> (Tensor, Tensor)",
)
def mean_pool_padded(states: Tensor, keep: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """Mean over keep [B, L] of states [B, L, H], as [B, H] in the accumulation type.

    The second output is 1 / norm [B] of the means if they were normalised, else empty.
    """
    if _dispatch.provider("mean_pool", states.device, states.dtype) == "triton":
        from . import mean_pool_triton

        with torch.cuda.device_of(states):
            return mean_pool_triton.padded(states, keep, normalize)
    batch, length, width = states.shape
    out = states.new_zeros(batch, width, dtype=accumulate_dtype(states))
    if states.device.type == "cpu":
        for b, place in enumerate(_places(keep)):
            if place is not None:
                torch.sum(states[b, place], dim=0, dtype=out.dtype, out=out[b])
    else:
        step = max(1, BLOCK // max(1, length * width))
        for b in range(0, batch, step):
            part = torch.where(keep[b : b + step, :, None], states[b : b + step], 0)
            torch.sum(part, dim=1, dtype=out.dtype, out=out[b : b + step])
    return _finish(out, keep.sum(1), normalize)


@torch.library.custom_op(
    f"{NAMESPACE}::mean_pool_padded_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? pooled, Tensor? inverse, Tensor keep, ScalarType dtype) -> Tensor"
    ),
)
def mean_pool_padded_backward(
    grad: Tensor, pooled: Tensor | None, inverse: Tensor | None, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient [B, L, H] of the states from grad [B, H]; pooled and inverse if normalised."""
    if _dispatch.provider("mean_pool", grad.device, dtype) == "triton":
        from . import mean_pool_triton

        with torch.cuda.device_of(grad):
            return mean_pool_triton.padded_backward(grad, pooled, inverse, keep, dtype)
    share = _share(grad, pooled, inverse, keep.sum(1), dtype)
    if grad.device.type != "cpu":
        return torch.where(keep[:, :, None], share[:, None, :], 0)
    out = share.new_zeros(*keep.shape, share.shape[1])
    for b, place in enumerate(_places(keep)):
        if place is not None:
            out[b, place] = share[b]
    return out


@mean_pool_padded.register_fake
def _(states: Tensor, keep: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    batch, _, width = states.shape
    out = states.new_empty(batch, width, dtype=accumulate_dtype(states))
    return out, out.new_empty(batch if normalize else 0)


@mean_pool_padded_backward.register_fake
def _(
    grad: Tensor, pooled: Tensor | None, inverse: Tensor | None, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(*keep.shape, grad.shape[1], dtype=dtype)


def _padded_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    keep, *unit = ctx.saved_tensors
    pooled, inverse = unit or (None, None)
    return mean_pool_padded_backward(grad, pooled, inverse, keep, ctx.dtype), None, None


mean_pool_padded.register_autograd(_padded_backward, setup_context=_setup)


@torch.library.custom_op(
    f"{NAMESPACE}::mean_pool_packed",
    mutates_args=(),
    schema="(Tensor states, Tensor start, Tensor end, bool normalize) -> (Tensor, Tensor)",
)
def mean_pool_packed(
    states: Tensor, start: Tensor, end: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Mean of states[start[b]:end[b]] of [T, H], as [B, H] in the accumulation type.

    Spans are int64 [B], ascending and apart. The second output is as `mean_pool_padded`'s.
    """
    if _dispatch.provider("mean_pool", states.device, states.dtype) == "triton":
        from . import mean_pool_triton

        with torch.cuda.device_of(states):
            return mean_pool_triton.packed(states, start, end, normalize)
    out = states.new_zeros(start.shape[0], states.shape[1], dtype=accumulate_dtype(states))
    # One call a sequence: no temporary, and no atomic as a segmented add would need on CUDA.
    for b, (lo, hi) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        if hi > lo:
            torch.sum(states[lo:hi], dim=0, dtype=out.dtype, out=out[b])
    return _finish(out, end - start, normalize)


@mean_pool_packed.register_fake
def _(states: Tensor, start: Tensor, end: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    batch = start.shape[0]
    out = states.new_empty(batch, states.shape[1], dtype=accumulate_dtype(states))
    return out, out.new_empty(batch if normalize else 0)


@torch.library.custom_op(
    f"{NAMESPACE}::mean_pool_packed_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor? pooled, Tensor? inverse, Tensor start, Tensor end,"
        " SymInt tokens, ScalarType dtype) -> Tensor"
    ),
)
def mean_pool_packed_backward(
    grad: Tensor,
    pooled: Tensor | None,
    inverse: Tensor | None,
    start: Tensor,
    end: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [tokens, H] of the states from grad [B, H], zeros outside the spans."""
    if _dispatch.provider("mean_pool", grad.device, dtype) == "triton":
        from . import mean_pool_triton

        with torch.cuda.device_of(grad):
            return mean_pool_triton.packed_backward(
                grad, pooled, inverse, start, end, tokens, dtype
            )
    count = start.shape[0]
    share = _share(grad, pooled, inverse, end - start, dtype)
    share = torch.cat([share, share.new_zeros(1, share.shape[1])])
    token = torch.arange(tokens, device=grad.device)
    row = torch.searchsorted(end, token, right=True)
    first = torch.cat([start, start.new_full((1,), tokens)]).index_select(0, row)
    return share.index_select(0, torch.where(token >= first, row, count))


@mean_pool_packed_backward.register_fake
def _(
    grad: Tensor,
    pooled: Tensor | None,
    inverse: Tensor | None,
    start: Tensor,
    end: Tensor,
    tokens: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad.new_empty(tokens, grad.shape[1], dtype=dtype)


def _packed_backward(
    ctx: Any, grad: Tensor | None, _: Any
) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    start, end, *unit = ctx.saved_tensors
    pooled, inverse = unit or (None, None)
    tokens = ctx.shape[0]
    dx = mean_pool_packed_backward(grad, pooled, inverse, start, end, tokens, ctx.dtype)
    return dx, None, None, None


mean_pool_packed.register_autograd(_packed_backward, setup_context=_setup)
