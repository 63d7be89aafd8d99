"""P12: kernels equal their reference, on cases that nobody chose.

Every case draws an op, sizes (1 and odd ones among them), widths, a dtype and options from its
number. Triton kernels run in the interpreter with small tiles, so that ragged edges are common;
outputs and every gradient are compared with the specification in float64 (`against`).
"""

import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreter import FLOOR, TOLERANCE, against, relative
from torch import Tensor

import embkit_kernels as ek
from embkit_kernels import _dispatch, _triton

CASES = 200 if os.environ.get("EMBKIT_TEST_FULL") == "1" else 40
SIZES = (1, 2, 3, 5, 7, 13, 16, 17)
"""Around the tile size of 16, and less: an interpreted tile costs tens of milliseconds."""
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16)

ROUNDING = 1e-6
"""Of float32 in a gradient whose terms cancel, at score 1; scores are divided by temperature."""

pytestmark = pytest.mark.promise


class Draw:
    """Random numbers of one case."""

    def __init__(self, number: int) -> None:
        self.pick = random.Random(number)
        self.rng = torch.Generator().manual_seed(number)
        self.dtype = self.pick.choice(DTYPES)

    def size(self, least: int = 1) -> int:
        return max(least, self.pick.choice(SIZES))

    def dims(self, width: int) -> tuple[int, ...]:
        """One to three widths in any order. (At width 1 gradients are differences that cancel.)"""
        return tuple(self.pick.sample(range(4, width + 1), self.pick.randint(1, 3)))

    def maybe(self) -> bool:
        return self.pick.random() < 0.4

    def rows(self, *shape: int, zeros: bool = True) -> Tensor:
        """Embeddings; now and then one is the zero vector."""
        x = torch.randn(*shape, generator=self.rng)
        if zeros and self.maybe():
            x.view(-1, shape[-1])[self.pick.randrange(x[..., 0].numel())] = 0
        return x.to(self.dtype).requires_grad_()

    def ids(self, count: int) -> Tensor:
        """Identities with duplicates, some of them padding."""
        return torch.randint(-1, max(2, count // 2), (count,), generator=self.rng)


def tiny(op: str) -> dict[str, Any]:
    """Small tiles for every kernel of an op's table."""

    def small(name: str, value: Any) -> Any:
        if not name.startswith(("BLOCK", "CHUNK")):
            return value
        return min(value, 32 if name in ("BLOCK_N", "BLOCK") else 16)

    return {
        key: {name: small(name, value) for name, value in _triton.config(op, key).items()}
        for key in _triton.keys(op)
    }


def infonce_case(draw: Draw) -> None:
    batch, width = draw.size(), draw.pick.choice((16, 24, 33))
    columns = batch + draw.pick.choice((0, 0, 1, 9, 17))
    q, p, inputs = draw.rows(batch, width), draw.rows(columns, width), []
    options: dict[str, Any] = {"dims": draw.dims(width)}
    tau = draw.pick.choice((0.005, 0.02, 0.05, 1.0))
    if draw.maybe():
        keys = draw.ids(columns)
        options |= {"query_ids": keys[:batch], "passage_ids": draw.ids(columns)}
    for name in ("same_tower", "doc_doc", "symmetric"):
        options[name] = draw.pick.random() < 0.25
    if draw.maybe():
        options["margin"] = draw.pick.choice((-0.2, 0.05))
    if draw.maybe():
        shape = (batch, draw.pick.randint(1, 3)) if draw.maybe() else (draw.size(),)
        inputs.append(draw.rows(*shape, width))
        options["hardness_alpha"] = draw.pick.choice((0.0, 5.0))
        options["in_batch"] = options["symmetric"] or draw.maybe()
    if draw.maybe():
        options["row_weights"] = torch.rand(batch, generator=draw.rng, dtype=torch.float64)
    options["include_positive"] = not draw.maybe()
    options["reduction"] = draw.pick.choice(("mean", "sum", "none"))

    def loss(f: Callable[..., Any]) -> Callable[..., Tensor]:
        def call(q: Tensor, p: Tensor, tau: Tensor, *hard: Tensor) -> Tensor:
            given = dict(options)
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            if (weights := given.get("row_weights")) is not None:
                given["row_weights"] = weights.to(wide if f is ek.infonce else q.dtype)
            found: Tensor = f(q, p, temperature=tau, hard=hard[0] if hard else None, **given)[0]
            return found

        return call

    temperature = torch.tensor(tau, requires_grad=True)
    against(
        loss(ek.infonce), loss(ek.infonce_naive), [q, p, temperature, *inputs],
        tolerance=max(TOLERANCE[draw.dtype], ROUNDING / min(tau, 0.1)),
        floor=max(FLOOR[draw.dtype], ROUNDING / min(tau, 0.1)),
        # Where a loss is tiny, its rounding is relative to the scores it came from.
        forward=max(1e-3, 1e-5 * 0.02 / tau),
        peer=loss(ek.infonce_naive),
    )  # fmt: skip


def cosent_case(draw: Draw) -> None:
    batch, width = draw.size(), draw.pick.choice((8, 16, 33))
    dims = draw.dims(width)
    labels = torch.randint(0, 4, (batch,), generator=draw.rng) / 3
    if draw.maybe():
        labels[draw.pick.randrange(batch)] = torch.nan
    scale = draw.pick.choice((1.0, 20.0, 100.0))
    # The specification's gradient at a zero vector is 1 / eps, not 0.
    inputs = [draw.rows(batch, width, zeros=False) for _ in range(2)]
    against(
        lambda a, b: ek.cosent((a, b), labels, dims, scale=scale)[0],
        lambda a, b: ek.cosent_naive((a, b), labels, dims, scale=scale)[0],
        inputs,
        tolerance=max(TOLERANCE[draw.dtype], ROUNDING * max(10, scale)),
        floor=max(FLOOR[draw.dtype], ROUNDING * max(10, scale)),
    )


def mean_pool_case(draw: Draw) -> None:
    batch, length, width = draw.size(), draw.size(), draw.pick.choice((8, 16, 24, 33, 64))
    lengths = torch.randint(0, length + 1, (batch,), generator=draw.rng)
    options: dict[str, Any] = {"normalize": draw.maybe()}
    if draw.maybe():
        options["prompt_len"] = draw.pick.randint(0, 4)
    layout = draw.pick.choice(("lengths", "left", "right", "holes", "packed", "all"))
    place = torch.arange(length)
    if layout == "packed":
        options["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(
            draw.pick.choice((torch.int32, torch.int64))
        )
        x = draw.rows(max(1, int(lengths.sum())), width, zeros=False)
    else:
        masks = {
            "left": place >= length - lengths[:, None],
            "right": place < lengths[:, None],
            "holes": torch.rand(batch, length, generator=draw.rng) < 0.5,
        }
        if layout == "lengths":
            options["lengths"] = lengths
        elif layout in masks:
            options["mask"] = masks[layout]
        x = draw.rows(batch, length, width, zeros=False)
    against(
        lambda x: ek.mean_pool(x, **options), lambda x: ek.mean_pool_ref(x, **options), [x]
    )  # fmt: skip


def similarity_case(draw: Draw) -> None:
    queries, passages, width = draw.size(), draw.size(), draw.pick.choice((16, 20, 33, 64))
    dims, differentiate = draw.dims(width), draw.maybe()
    # The specification's gradient at a zero vector is 1 / eps, not 0.
    q, p = (draw.rows(n, width, zeros=not differentiate) for n in (queries, passages))
    if differentiate:
        against(
            lambda q, p: ek.mrl_similarity(q, p, dims),
            lambda q, p: ek.mrl_similarity_naive(q, p, dims),
            [q, p],
            forward=max(2e-6, FLOOR[draw.dtype] * 1e-2),
        )
        return
    k = draw.pick.randint(1, passages)
    got, index = ek.mrl_similarity(q, p, dims, k=k)
    every = ek.mrl_similarity_naive(q.double(), p.double(), dims)
    assert relative(got, every.topk(k).values) <= 2e-6
    # The scores at the indices are the scores returned, and no index comes twice.
    assert relative(every.gather(2, index), got) <= 2e-6
    assert (index.sort(2).values.diff(dim=2) > 0).all()


MAKERS: dict[str, Callable[[Draw], None]] = {
    "infonce": infonce_case,
    "cosent": cosent_case,
    "mean_pool": mean_pool_case,
    "similarity": similarity_case,
}
SHARE = ("infonce", "mean_pool", "infonce", "similarity", "infonce", "cosent")


@pytest.mark.parametrize("number", range(CASES))
def test_kernels_equal_their_reference(number: int, interpreter: None) -> None:
    op = next(itertools.islice(itertools.cycle(SHARE), number, None))
    if op not in _dispatch._TRITON_OPS:
        pytest.skip(f"there is no Triton kernel of {op}")
    with _triton.replaced(op, **tiny(op)):
        MAKERS[op](Draw(number))


def test_a_bank_with_nothing_left_beside_one_far_below() -> None:
    """Once NaN: exp(0 - X) is infinite when X, of the other bank, is below -88."""
    q = torch.eye(2, 4)
    p = torch.stack([q[0], -q[0]]).requires_grad_()  # row 0: z - z_pos = -2 / 0.005
    hard = torch.stack([q[0], q[0]]).requires_grad_()
    options: dict[str, Any] = {"temperature": 0.005, "include_positive": False, "hard": hard}
    masked = {**options, "hard_mask": torch.zeros(2, dtype=torch.bool)}
    q = q.requires_grad_()
    for f in (ek.infonce, ek.infonce_naive):
        loss, _ = f(q, p, **masked)
        got = torch.autograd.grad(loss, (q, p))
        assert all(g.isfinite().all() for g in got), f
        if f is ek.infonce:
            kept = loss.detach(), *got
    for a, b in zip(kept, (loss.detach(), *got), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
