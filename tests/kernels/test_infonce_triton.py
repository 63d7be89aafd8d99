"""infonce's Triton kernels: in the interpreter with tiny tiles, on a GPU with those shipped."""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import infonce_numerics
import pytest
import torch
from infonce_cases import VARIANTS, assert_close, gradients, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embkit_kernels import _triton, infonce, infonce_naive, value_and_grads
from embkit_kernels.infonce import chunked
from embkit_kernels.infonce.op import infonce_backward, infonce_forward, infonce_fused
from embkit_kernels.infonce.problem import Problem

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
GRAD_TOLERANCE = 2e-6
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "SUB": 2, "GROUP": 2, "TMA": False}
TINY: dict[str, Any] = {
    "tile": TILE,
    "tile_fp32": TILE,
    "prefix": {"ROWS": 8, "BLOCK": 16},
    "combine": {"BLOCK": 16},
    "finish": {"BLOCK": 32},
}
USUAL = ("qwen3", "gemma_shared", "jagged")
"""Variants that together take every path; EMBKIT_TEST_FULL=1 runs all."""
ROWS = infonce_numerics.ROWS if FULL else infonce_numerics.ROWS[1:7:2]
full = pytest.mark.skipif(not FULL, reason="EMBKIT_TEST_FULL=1 takes it")


@pytest.fixture
def tiny(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several ragged tiles in each direction, and one tile of columns to a chunk."""
    from embkit_kernels.infonce.triton import gradients as module

    monkeypatch.setattr(module, "WORKSPACE", 1)
    with _triton.replaced("infonce", **TINY):
        yield


def single(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.float() if v.is_floating_point() else v for k, v in values.items()}


def compare(values: dict[str, Any], **options: Any) -> None:
    """Loss and every gradient in float32 against the specification in float64."""
    tau = options.pop("temperature", 0.07)
    want = gradients(
        infonce_naive, values, **options, temperature=torch.tensor(tau, dtype=torch.float64)
    )
    got = gradients(infonce, single(values), **options, temperature=torch.tensor(tau))
    assert_close(got, want, GRAD_TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS if FULL else USUAL)
def test_every_variant(variant: str, tiny: None, rng: torch.Generator) -> None:
    """Widths that are no multiples of a block, in any order, the widest not the whole."""
    shape, options = VARIANTS[variant]
    values = problem(rng, 17, 18, 28, **shape)
    compare(values, dims=(23, 7, 16), dim_weights=(0.5, 2.0, 1.0), **options)


@pytest.mark.parametrize(
    ("batch", "columns", "dims"),
    [(1, 1, (8,)), (1, 2, (5, 6)), (16, 16, (16, 32)), (17, 33, (16,)), (3, 20, (1, 2, 3, 33))],
)
def test_ragged_sizes(
    batch: int, columns: int, dims: tuple[int, ...], tiny: None, rng: torch.Generator
) -> None:
    compare(problem(rng, batch, columns, dims[-1]), dims=dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype, tiny: None, rng: torch.Generator) -> None:
    """Coefficients in 16 bits. Rows with norms of 1000 make them 1e-6: float16 needs its scale."""
    values = problem(rng, 18, 21, 32, hard="shared")
    for name in ("q", "p", "hard"):
        values[name] = values[name] * 200
    half = {
        k: v.to(dtype) if v.is_floating_point() and k != "row_weights" else v
        for k, v in values.items()
    }
    half["row_weights"] = half["row_weights"].float()
    exact = {k: v.double() if v.is_floating_point() else v for k, v in half.items()}
    options = {"dims": (16, 32), "same_tower": True, "doc_doc": True, "reduction": "sum"}
    got = gradients(infonce, half, temperature=0.02, **options)
    want = gradients(infonce_naive, exact, temperature=0.02, **options)
    assert got["q"].dtype == dtype
    assert got["loss"].dtype == torch.float32
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    for name in ("q", "p", "hard"):
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error <= (6e-3 if dtype == torch.bfloat16 else 2e-3), name


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.dtype}-{r.tau}-{r.easy}")
def test_numerics(row: infonce_numerics.Row, tiny: None) -> None:
    """The contract's bounds, and never worse than eager torch in the same dtype."""
    big = {**TILE, "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}
    with _triton.replaced("infonce", tile=big, tile_fp32=big, finish={"BLOCK": 128}):
        found = infonce_numerics.errors(row)
    loss, *grads = found["infonce"]
    assert loss <= (1e-5 * max(1.0, 0.02 / row.tau) if found["loss"][0] >= 1e-6 else 1e-3)
    bound = {"fp32": 1e-5 * max(1.0, 0.02 / row.tau), "bf16": 6e-3, "fp16": 2e-3}[row.dtype]
    rounding = {"fp32": 2e-6, "bf16": 4e-3, "fp16": 1e-3}[row.dtype]
    for error, theirs in zip(grads, found["eager"][1:], strict=True):
        assert error <= bound
        assert error <= max(theirs, rounding)


@pytest.mark.parametrize("tau", [0.005, 0.02, 1.0] if FULL else [0.005])
def test_temperatures(tau: float, tiny: None, rng: torch.Generator) -> None:
    p = torch.randn(20, 32, generator=rng)
    for easy in (0.0, 4.0):
        q = torch.randn(20, 32, generator=rng) + easy * p
        _, want = infonce_naive(q.double(), p.double(), (16, 32), temperature=tau)
        _, got = infonce(q, p, (16, 32), temperature=tau)
        bound = torch.where(want >= 1e-6, 1e-5 * max(1.0, 0.02 / tau), 1e-3)
        assert ((got.double() - want).abs() <= bound * want.abs() + 1e-30).all(), (got, want)


def test_other_tiles_and_descriptors_agree(tiny: None, rng: torch.Generator) -> None:
    """Column slices and TMA change no result by more than a rounding; TMA not by a bit."""
    values = single(problem(rng, 17, 33, 32))
    options = {"dims": (16, 32), "margin": 0.1, "temperature": torch.tensor(0.05)}

    def run(**tile: Any) -> dict[str, Tensor]:
        with _triton.replaced("infonce", tile_fp32={"BLOCK_N": 32, **tile}):
            return gradients(infonce, values, **options)

    whole, four, tma = run(SUB=1), run(SUB=4), run(SUB=1, TMA=True)
    assert all(torch.equal(tma[name], whole[name]) for name in whole)
    del four["temperature"], whole["temperature"]  # a sum that all but cancels
    assert_close(four, whole, 1e-6)


def test_same_inputs_same_bits(tiny: None, rng: torch.Generator) -> None:
    """Repeated positives included: their gradients meet in one row of p."""
    values = single(problem(rng, 11, 18, 16, hard="private"))
    values["positive_index"] = torch.randint(0, 4, (11,), generator=rng)
    options = {"dims": (16, 7), "same_tower": True, "doc_doc": True}
    first, again = (gradients(infonce, values, **options) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    want = gradients(infonce_naive, {k: v.double() if v.is_floating_point() else v
                                     for k, v in values.items()}, **options)  # fmt: skip
    assert_close(first, want, GRAD_TOLERANCE)


@pytest.mark.parametrize("seed", range(8 if FULL else 2))
def test_margin_drops_the_same_candidates_twice(seed: int, tiny: None) -> None:
    """Cosines within a rounding of the limit: were one kept in one pass alone, the coefficients of
    its row would not add up to the row's weight."""
    from embkit_kernels.infonce.triton.call import LOG2E, Call, forward

    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(16, 32, generator=rng)
    q = q / q.norm(dim=1, keepdim=True)
    away = torch.randn(16, 32, generator=rng)
    away = away - (away * q).sum(1, keepdim=True) * q
    away = away / away.norm(dim=1, keepdim=True)
    positive = 0.6 * q + 0.8 * away
    s = 0.7 + 1e-8 * torch.randint(-12, 13, (16, 3, 1), generator=rng)
    near = (s * q[:, None] + (1 - s * s).sqrt() * away[:, None]).flatten(0, 1)
    p = torch.cat([positive, near])
    options = Problem(dims=(32,), positive_index=torch.arange(16), margin=0.1)
    tau = torch.tensor(0.05)
    _, x = forward(q, p, None, tau, options)
    call = Call(q, p, None, tau, options)
    ones = torch.ones(1, 16)
    workspace = torch.empty(16 * 64)
    tiles = call.banks[0].tiles(call)
    c, _, _ = tiles.coefficients(x * LOG2E, ones, None, workspace, slice(0, 64), True)
    assert c is not None
    sums = (c[0] / (call.q.inverse.t() * call.p.inverse)).sum(1)
    torch.testing.assert_close(sums, torch.ones(16), rtol=1e-5, atol=0)
    kept = (c[0, :, 16:].reshape(16, 16, 3).diagonal(dim1=0, dim2=1) > 0).float().mean()
    assert 0.1 < kept < 0.9  # the limit runs through them


def test_wide_ids_are_told_apart(tiny: None, rng: torch.Generator) -> None:
    """int64 ids that differ in their upper half, negative ones padding: the same bits as small."""
    values = single(problem(rng, 11, 13, 16, hard="private", queries=True))
    wide = dict(values)
    for name in ("query_ids", "passage_ids", "passage_query_ids", "hard_ids", "hard_query_ids"):
        ids = values[name].long()
        wide[name] = torch.where(ids < 0, ids * (1 << 40), ids << 33)
    want, got = (gradients(infonce, v, same_tower=True) for v in (values, wide))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_part_of_the_rows_against_gathered_passages(tiny: None, rng: torch.Generator) -> None:
    """What a rank computes of a global batch is its rows of the whole."""
    q, p = torch.randn(18, 16, generator=rng), torch.randn(18, 16, generator=rng)
    ids = torch.randint(0, 9, (18,), generator=rng)
    whole, _ = infonce(q, p, query_ids=ids, passage_ids=ids, reduction="none")
    part, _ = infonce(
        q[7:], p, query_ids=ids[7:], passage_ids=ids, passage_query_ids=ids,
        positive_index=torch.arange(7, 18), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(part, whole[7:], rtol=1e-6, atol=1e-7)


@full
def test_order_of_rows_and_candidates_does_not_matter(tiny: None, rng: torch.Generator) -> None:
    values = single(problem(rng, 17, 17, 16, hard="private"))
    del values["passage_query_ids"]
    order = torch.randperm(17, generator=rng)
    options = {"same_tower": True, "margin": 0.2, "dims": (6, 16)}
    want = gradients(infonce, values, **options)
    got = gradients(infonce, {k: v[order] for k, v in values.items()}, **options)
    for name in ("q", "p", "hard"):
        torch.testing.assert_close(got[name], want[name][order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("include_positive", [True, False])
def test_fully_masked_rows_and_zero_vectors(include_positive: bool, tiny: None) -> None:
    """Row 0 shares its query with everything; row 1 and passage 2 are zero vectors."""
    q = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0], [1.0, -1.0]])
    p = torch.tensor([[2.0, 1.0], [1.0, 0.5], [0.0, 0.0], [1.0, 1.0]])
    values = {"q": q, "p": p, "hard": torch.zeros(4, 2, 2)}
    got = gradients(
        infonce, values, query_ids=torch.tensor([4, -1, -1, -1]), dims=(1, 2),
        passage_query_ids=torch.tensor([4, 4, 4, 4]), passage_mask=torch.tensor([1, 1, 1, 0]),
        hard_mask=torch.tensor([[0, 0], [1, 0], [0, 0], [0, 1]]),
        reduction="none", include_positive=include_positive,
    )  # fmt: skip
    assert all(bool(t.isfinite().all()) for t in got.values())
    assert got["loss"][0] == 0
    assert bool((got["q"][:2] == 0).all())
    assert bool((got["p"][2] == 0).all())
    assert bool((got["hard"] == 0).all())
    assert got["q"][2:].abs().sum() > 0


def test_no_candidates_at_all(tiny: None) -> None:
    q = torch.eye(3)
    options = {"in_batch": False, "hard_mask": torch.zeros(2, dtype=torch.bool)}
    got = gradients(infonce, {"q": q, "p": q, "hard": torch.ones(2, 3)}, **options)
    assert all(bool((t == 0).all()) for t in got.values())
    loss, per_dim = infonce(q[:0], q[:0], (2, 3))
    assert loss == 0
    assert per_dim.shape == (2,)


def test_frozen_sides_cost_no_product(
    tiny: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embkit_kernels.infonce.triton import call

    q, p = torch.randn(9, 16, generator=rng), torch.randn(9, 16, generator=rng)
    products: list[tuple[int, ...]] = []
    real = call.matmul_into

    def counted(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
        products.append(tuple(out.shape))
        real(out, left, right, fresh)

    monkeypatch.setattr(call, "matmul_into", counted)
    both = gradients(infonce, {"q": q, "p": p}, temperature=torch.tensor(0.1))
    assert len(products) == 2
    for frozen, wanted in (("p", "q"), ("q", "p")):
        products.clear()
        leaf = {"q": q, "p": p}[wanted].clone().requires_grad_()
        loss, _ = infonce(**{wanted: leaf, frozen: {"q": q, "p": p}[frozen]}, temperature=0.1)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], both[wanted])
        assert len(products) == 1
    products.clear()
    tau = torch.tensor(0.1, requires_grad=True)
    loss, _ = infonce(q, p, temperature=tau)
    assert torch.equal(torch.autograd.grad(loss, tau)[0], both["temperature"])
    assert not products


@full
def test_value_and_grads_equals_autograd(tiny: None, rng: torch.Generator) -> None:
    values = single(problem(rng, 9, 12, 16, hard="private"))
    want = gradients(infonce, values, dims=(16, 4), temperature=torch.tensor(0.05))
    q, p = values.pop("q"), values.pop("p")
    got = value_and_grads(q, p, (16, 4), temperature=0.05, **values)
    for name, value in zip(("loss", "per_dim", "q", "p", "hard", "temperature"), got, strict=True):
        torch.testing.assert_close(value, want[name])


def test_nothing_of_the_whole_problem_is_allocated(
    tiny: None, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embkit_kernels.infonce.triton import backward, forward
    from embkit_kernels.infonce.triton import gradients as module

    batch, columns, workspace = 64, 256, 1 << 14
    monkeypatch.setattr(module, "WORKSPACE", workspace)
    q, p = torch.randn(batch, 16, generator=rng), torch.randn(columns, 16, generator=rng)
    options = Problem(dims=(16,), positive_index=torch.arange(batch))
    big = {"BLOCK_M": 64, "BLOCK_N": 64}
    with _triton.replaced("infonce", tile_fp32=big), Largest() as largest:
        rows, x = forward(q, p, None, torch.tensor(0.05), options)
        needs = (True, True, False)
        backward(torch.ones_like(rows), x, q, p, None, torch.tensor(0.05), options, needs)
    assert 0 < largest.bytes <= max(workspace, 4 * columns * 16) < 4 * batch * columns // 2


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def leaves_of(rng: torch.Generator) -> list[Tensor]:
    made = [torch.randn(*s, 16, generator=rng) for s in ((6,), (6,), (6, 2))]
    return [t.requires_grad_() for t in (*made, torch.tensor(0.1))]


def test_opcheck(tiny: None, rng: torch.Generator) -> None:
    """Schema, fakes and autograd registration hold for what Triton returns."""
    leaves, ids = leaves_of(rng), torch.tensor([0, 1, 1, 2, 3, 4])
    keys = (torch.arange(6), None, ids, ids + 1, ids + 2, None, None, None, None)
    options = (True, True, True, False, 0.5, 0.1, False, None, None, None, 0.0, False)
    rest = ([2, 16], *keys, *options)
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(infonce_forward, (*leaves, *rest), test_utils=utils)
    weights = torch.rand(2, 6, generator=rng)
    needs = (True, True, True)
    torch.library.opcheck(infonce_fused, (*leaves, weights, *needs, *rest), test_utils=utils)
    plain = [t.detach() for t in leaves]
    frozen = (weights, weights, *plain, True, False, True, *rest)
    torch.library.opcheck(infonce_backward, frozen, test_utils=utils[:2])


def test_compiles_as_one_graph(tiny: None, rng: torch.Generator) -> None:
    leaves, ids = leaves_of(rng), torch.tensor([0, 1, 1, 2, 3, 4])

    def loss(q: Tensor, p: Tensor, hard: Tensor, tau: Tensor) -> Tensor:
        options: dict[str, Any] = {"query_ids": ids, "temperature": tau, "margin": 0.1}
        mean, _ = infonce(q, p, (16, 4), hard=hard, **options)
        rows, _ = infonce(q, p, reduction="none", **options)
        return mean + rows[0]

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        value = f(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    want = run(loss)
    torch._dynamo.reset()
    got = run(torch.compile(loss, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_float64_is_the_references(interpreter: None) -> None:
    from embkit_kernels import KernelUnavailableError

    with pytest.raises(KernelUnavailableError, match="float64"):
        infonce(torch.eye(2).double(), torch.eye(2).double())


def test_reference_stays_the_default(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMBKIT_KERNELS", raising=False)
    monkeypatch.setitem(sys.modules, f"{chunked.__package__}.triton", None)
    infonce(torch.eye(2), torch.eye(2))
