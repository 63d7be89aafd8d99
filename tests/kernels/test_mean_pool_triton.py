"""mean_pool's Triton kernels: in the interpreter with tiny tiles, on a GPU with those shipped.

Tiles of 4 rows in chunks of 8 put several chunks in a sequence of 20 tokens, and cuts inside tiles.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import against
from torch import Tensor

from embkit_kernels import _triton, cls_pool, last_token_pool, mean_pool, mean_pool_ref

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
MODULE = sys.modules[mean_pool.__module__]
TINY: dict[str, Any] = {
    "sum": {"CHUNK": 8, "BLOCK_T": 4, "BLOCK_H": 16},
    "bounds": {"BLOCK": 16},
    "spread": {"BLOCK_T": 16, "BLOCK_H": 16},
}
LENGTHS = {
    "ragged": [5, 0, 1, 20, 2],
    "one_token": [1],
    "whole_chunks": [8, 16, 24],
    "chunks_and_one": [9, 17, 1, 25],
    "all_empty": [0, 0, 0],
    "empty_ends": [0, 0, 7, 0],
    "equal": [6, 6, 6, 6],
    "many": [1, 2, 3, 0, 4, 0, 0, 5, 1, 13, 1],
}
LAYOUTS = ("packed", "lengths", "right", "left", "holes", "all")


@pytest.fixture
def tiny(interpreter: None) -> Iterator[None]:
    with _triton.replaced("mean_pool", **TINY):
        yield


def batch(
    lengths: list[int], layout: str, width: int, dtype: torch.dtype, rng: torch.Generator
) -> dict[str, Any]:
    """Arguments of mean_pool for sequences of such lengths; padding of random values."""
    n, longest = torch.tensor(lengths), max(lengths)
    x = torch.randn(len(lengths), longest, width, generator=rng).to(dtype)
    right = torch.arange(longest) < n[:, None]
    if layout == "packed":
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), n.cumsum(0)])
        return {"states": x[right], "cu_seqlens": cu.int()}
    mask = {
        "right": right,
        "left": right.flip(1),
        "holes": torch.rand(right.shape, generator=rng) < 0.4,
    }
    if layout in mask:
        return {"states": x, "mask": mask[layout].long()}
    return {"states": x, "lengths": n} if layout == "lengths" else {"states": x}


def check(values: dict[str, Any], **options: Any) -> None:
    states = values.pop("states").requires_grad_()
    against(
        lambda x: mean_pool(x, **values, **options),
        lambda x: mean_pool_ref(x, **values, **options),
        [states],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LENGTHS)
def test_against_float64(name: str, layout: str, tiny: None, rng: torch.Generator) -> None:
    turn = list(LENGTHS).index(name) + LAYOUTS.index(layout)
    widths = (5, 16, 35) if FULL else ((5, 16, 35)[turn % 3],)
    for width in widths:
        for normalize in (False, True) if FULL else (turn % 2 == 0,):
            check(batch(LENGTHS[name], layout, width, torch.float32, rng), normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout: str, dtype: torch.dtype, tiny: None, rng: torch.Generator) -> None:
    values = batch(LENGTHS["ragged"], layout, 17, dtype, rng)
    check(values, normalize=LAYOUTS.index(layout) % 2 == 0, prompt_len=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_are_left_out(layout: str, tiny: None, rng: torch.Generator) -> None:
    for prompt in (3, torch.tensor([2, 1, 1, 9, 0]), torch.tensor([9, 9, 9, 30, 9]).int()):
        values = batch(LENGTHS["ragged"], layout, 7, torch.float32, rng)
        check(values, prompt_len=prompt, normalize=True)


def test_no_rows_no_tokens(tiny: None) -> None:
    cu = torch.zeros(3, dtype=torch.int32)
    for states, options in (
        (torch.ones(0, 4), {"cu_seqlens": cu}),
        (torch.ones(0, 4), {"cu_seqlens": cu[:1]}),
        (torch.ones(2, 0, 4), {"mask": torch.ones(2, 0) > 0}),
        (torch.ones(0, 3, 4), {"mask": torch.ones(0, 3) > 0}),
        (torch.ones(2, 0, 4), {}),
    ):
        for normalize in (False, True):
            x = states.clone().requires_grad_()
            y = mean_pool(x, normalize=normalize, **options)  # type: ignore[arg-type]
            assert torch.equal(y, torch.zeros_like(y))
            assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_tokens_outside_every_span_get_zeros(tiny: None, rng: torch.Generator) -> None:
    """Rows before, between and after the spans, of packed states whose tail is padding."""
    x = torch.randn(40, 3, generator=rng).requires_grad_()
    cu = torch.tensor([3, 15, 15, 20])
    (grad,) = torch.autograd.grad(mean_pool(x, cu_seqlens=cu, prompt_len=2).sum(), x)
    want = torch.zeros(40, 3)
    want[5:15], want[17:20] = 1 / 10, 1 / 3
    torch.testing.assert_close(grad, want)


def test_nothing_is_read_from_the_padding(tiny: None, rng: torch.Generator) -> None:
    for layout in ("lengths", "right", "left", "holes"):
        values = batch(LENGTHS["ragged"], layout, 6, torch.float32, rng)
        states = values.pop("states")
        want = mean_pool(states, normalize=True, **values)
        real = (
            values["mask"] != 0
            if "mask" in values
            else (torch.arange(states.shape[1]) < values["lengths"][:, None])
        )
        poisoned = torch.where(real[:, :, None], states, torch.nan).requires_grad_()
        y = mean_pool(poisoned, normalize=True, **values)
        assert torch.equal(y, want)
        assert torch.autograd.grad(y.sum(), poisoned)[0].isfinite().all()


def test_layouts_agree_to_the_bit(tiny: None, rng: torch.Generator) -> None:
    """Chunks count from a sequence's first token, wherever it stands."""
    lengths = LENGTHS["ragged"]
    n, x = torch.tensor(lengths), torch.randn(5, 20, 19, generator=rng)
    right = torch.arange(20) < n[:, None]
    shifted = torch.zeros_like(x)
    shifted[right.flip(1)] = x[right]
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), n.cumsum(0)])
    order = torch.randperm(5, generator=rng)
    for options in ({}, {"normalize": True}, {"prompt_len": 2}):
        want = mean_pool(x, lengths=n, **options)
        for got in (
            mean_pool(x, mask=right, **options),
            mean_pool(shifted, mask=right.flip(1), **options),
            mean_pool(x[right], cu_seqlens=cu, **options),
            mean_pool(x[order], lengths=n[order], **options)[order.argsort()],
            mean_pool(x, lengths=n, **options),
        ):
            assert torch.equal(got, want)


def test_any_strides(tiny: None, rng: torch.Generator) -> None:
    n = torch.tensor([3, 7, 0])
    wide = torch.randn(3, 7, 40, generator=rng)
    for x in (wide[:, :, 4:21], wide.transpose(1, 2)[:, :17].transpose(1, 2), wide.flip(2)):
        torch.testing.assert_close(mean_pool(x, lengths=n), mean_pool_ref(x, lengths=n))
        flat, cu = x.reshape(21, -1), torch.tensor([0, 9, 21])
        torch.testing.assert_close(
            mean_pool(flat, cu_seqlens=cu), mean_pool_ref(flat, cu_seqlens=cu)
        )


def test_nothing_waits_for_the_device(
    tiny: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Tensor, *_: Any) -> None:
        raise AssertionError("a value of a tensor is read on the host")

    cases = [batch(LENGTHS["ragged"], layout, 6, torch.float32, rng) for layout in LAYOUTS]
    prompts = torch.tensor([2, 1, 1, 9, 0])
    # The interpreter itself reads arguments, through numpy.
    for name in ("tolist", "item", "__bool__", "__int__", "__index__", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    for values in cases:
        states = values.pop("states").requires_grad_()
        y = mean_pool(states, prompt_len=prompts, normalize=True, **values)
        torch.autograd.grad(y, states, torch.ones_like(y))
        if states.dim() == 3 and "lengths" not in values:
            cls_pool(states, **values)
            last_token_pool(states, **values)


def test_ops_are_sound(tiny: None, rng: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=rng).requires_grad_()
    y = torch.randn(3, 2, 5, generator=rng).requires_grad_()
    start, end = torch.tensor([0, 2, 2]), torch.tensor([2, 2, 5])
    keep = torch.tensor([[True, False], [False, False], [True, True]])
    for normalize in (False, True):
        torch.library.opcheck(MODULE.mean_pool_packed, (x, start, end, normalize))
        torch.library.opcheck(MODULE.mean_pool_padded, (y, keep, normalize))


def test_compiles_as_one_graph(tiny: None, rng: torch.Generator) -> None:
    n = torch.tensor([3, 5, 0])

    def pooled(x: Tensor) -> Tensor:
        a = mean_pool(x, lengths=n, prompt_len=1, normalize=True)
        b = mean_pool(x, mask=torch.arange(5) < n[:, None])
        c = mean_pool(x.flatten(0, 1), cu_seqlens=torch.arange(0, 16, 5))
        return (a + b * c).sum()

    leaves = [torch.randn(3, 5, 6, generator=rng).requires_grad_() for _ in range(1)]
    want = torch.autograd.grad(pooled(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(*leaves), leaves)[0], want[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(layout: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped tiles, compiled: numbers, the same bits twice, no wait for the device."""
    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    lengths = [0, 1, 700, 512, 513, 2000, 31]
    for width, dtype in ((768, torch.bfloat16), (100, torch.float32), (3072, torch.float16)):
        values = batch(lengths, layout, width, dtype, rng)
        values = {k: v.cuda() for k, v in values.items()}
        states = values.pop("states").requires_grad_()

        def run(states: Tensor = states, values: dict[str, Any] = values) -> tuple[Tensor, Tensor]:
            y = mean_pool(states, normalize=True, prompt_len=1, **values)
            return y.detach(), torch.autograd.grad(y, states, torch.ones_like(y))[0]

        first = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        against(
            lambda x, v=values: mean_pool(x, normalize=True, prompt_len=1, **v),
            lambda x, v=values: mean_pool_ref(x, normalize=True, prompt_len=1, **v),
            [states],
        )
