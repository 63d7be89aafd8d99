"""mean_pool, padded and packed, against a loop over sequences; gradients; NaN in the padding."""

from typing import Any

import pytest
import torch
from torch import Tensor

from embkit_kernels import cls_pool, last_token_pool, mean_pool, mean_pool_ref
from embkit_kernels import mean_pool as function

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}
LENGTHS = torch.tensor([5, 0, 1, 9, 2])


def layouts(dtype: torch.dtype, width: int, rng: torch.Generator) -> dict[str, dict[str, Any]]:
    """The same kinds of batches in every layout that mean_pool takes."""
    batch, length = len(LENGTHS), int(LENGTHS.max())
    padded = torch.randn(batch, length, width, generator=rng).to(dtype)
    right = torch.arange(length) < LENGTHS[:, None]
    cu = torch.cat([torch.zeros(1, dtype=torch.int32), LENGTHS.cumsum(0).int()])
    prompts = torch.tensor([2, 1, 1, 20, 0])
    return {
        "lengths": {"states": padded, "lengths": LENGTHS},
        "right": {"states": padded, "mask": right},
        "left": {"states": padded, "mask": right.flip(1).long()},
        "holes": {"states": padded, "mask": torch.rand(batch, length, generator=rng) < 0.5},
        "all": {"states": padded},
        "packed": {"states": padded[right], "cu_seqlens": cu},
        "lengths_prompt": {"states": padded, "lengths": LENGTHS, "prompt_len": prompts},
        "left_prompt": {"states": padded, "mask": right.flip(1), "prompt_len": prompts.int()},
        "packed_prompt": {"states": padded[right], "cu_seqlens": cu, "prompt_len": prompts},
        "packed_one_prompt": {"states": padded[right], "cu_seqlens": cu.long(), "prompt_len": 1},
    }


def run(function: Any, values: dict[str, Any], normalize: bool) -> tuple[Tensor, Tensor]:
    values = dict(values)
    states = values.pop("states").detach().clone().requires_grad_()
    y = function(states, normalize=normalize, **values)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
    (grad,) = torch.autograd.grad((y.double() * weight).sum(), states)
    return y.detach(), grad


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", list(layouts(torch.float32, 1, torch.Generator())))
def test_against_loop(
    layout: str, dtype: torch.dtype, normalize: bool, rng: torch.Generator
) -> None:
    for width in (1, 2, 127):
        values = layouts(dtype, width, rng)[layout]
        y, grad = run(function, values, normalize)
        want, want_grad = run(mean_pool_ref, {**values, "states": values["states"].double()},
                              normalize)  # fmt: skip
        assert y.dtype == grad.dtype == dtype
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(y.double(), want, rtol=limit, atol=limit)
        torch.testing.assert_close(grad.double(), want_grad, rtol=limit, atol=limit)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", list(layouts(torch.float32, 1, torch.Generator())))
def test_on_cuda(layout: str, rng: torch.Generator) -> None:
    values = layouts(torch.float32, 17, rng)[layout]
    want = mean_pool_ref(**values)
    cuda = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in values.items()}
    torch.testing.assert_close(mean_pool(**cuda).cpu(), want)


def test_padded_and_packed_agree_to_the_bit_in_float64(rng: torch.Generator) -> None:
    values = layouts(torch.float64, 16, rng)
    torch.testing.assert_close(
        mean_pool(**values["lengths"]), mean_pool(**values["packed"]), rtol=1e-15, atol=1e-15
    )


@pytest.mark.parametrize("layout", ["lengths", "left", "lengths_prompt"])
def test_nan_in_dropped_positions_is_never_read(layout: str, rng: torch.Generator) -> None:
    values = layouts(torch.float32, 6, rng)[layout]
    want, _ = run(mean_pool_ref, values, True)
    poisoned = values["states"].clone()
    if layout == "left":
        poisoned[values["mask"] == 0] = torch.nan
    else:
        poisoned[torch.arange(poisoned.shape[1]) >= LENGTHS[:, None]] = torch.nan
    if layout == "lengths_prompt":
        poisoned[0, :2] = torch.inf
    y, grad = run(function, {**values, "states": poisoned}, True)
    torch.testing.assert_close(y, want)
    assert bool(grad.isfinite().all())


def test_empty_segments_are_zero_with_zero_gradient(rng: torch.Generator) -> None:
    for layout in ("lengths", "packed_prompt"):
        for normalize in (False, True):
            y, grad = run(function, layouts(torch.float32, 4, rng)[layout], normalize)
            assert bool((y[1] == 0).all())
            assert bool(grad.isfinite().all())
    states = torch.ones(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(mean_pool(states, lengths=torch.tensor([0, 0])).sum(), states)
    assert bool((grad == 0).all())
    assert mean_pool(torch.ones(0, 3, 4)).shape == (0, 4)
    nothing = torch.zeros(3, dtype=torch.int32)
    assert mean_pool(torch.ones(0, 4), cu_seqlens=nothing).tolist() == [[0.0] * 4] * 2


def test_long_bf16_sequence_accumulates_in_float32() -> None:
    """4096 ones and a small step: a bf16 running sum stops at 256."""
    states = torch.ones(1, 4096, 2, dtype=torch.bfloat16)
    assert mean_pool(states).tolist() == [[1.0, 1.0]]
    packed = mean_pool(states[0], cu_seqlens=torch.tensor([0, 4096]))
    assert packed.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("layout", ["left_prompt", "packed_prompt"])
def test_gradcheck(layout: str, rng: torch.Generator) -> None:
    values = dict(layouts(torch.float64, 3, rng)[layout])
    states = values.pop("states").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mean_pool(x, normalize=False, **values), states)


def test_first_and_last_token(rng: torch.Generator) -> None:
    values = layouts(torch.float32, 3, rng)
    x, right, left = values["right"]["states"], values["right"]["mask"], values["left"]["mask"]
    real = LENGTHS > 0
    assert torch.equal(cls_pool(x, mask=right)[real], x[real, 0])
    assert torch.equal(cls_pool(x), x[:, 0])
    assert torch.equal(last_token_pool(x, mask=left)[real], x[real, -1])
    last = x[torch.arange(5), (LENGTHS - 1).clamp(min=0)]
    for pooled in (last_token_pool(x, mask=right), last_token_pool(x, lengths=LENGTHS)):
        assert torch.equal(pooled[real], last[real])
        assert bool((pooled[~real] == 0).all())
    first_of_left = x[torch.arange(5), (9 - LENGTHS).clamp(max=8)]
    assert torch.equal(cls_pool(x, mask=left)[real], first_of_left[real])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lengths": torch.ones(2), "mask": torch.ones(2, 3).bool()}, ValueError, "not both"),
        ({"lengths": torch.ones(3)}, ValueError, "want \\(2,\\)"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, "want \\(2, 3\\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "floating"),
        ({"cu_seqlens": torch.tensor([0, 1])}, ValueError, "\\[T, H\\]"),
        ({"prompt_len": torch.ones(3).int()}, ValueError, "prompt_len"),
    ],
)
def test_bad_arguments_say_what_is_wrong(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        mean_pool(torch.ones(2, 3, 4), **options)
