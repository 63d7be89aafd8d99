"""infonce against its row-by-row float64 specification: values, every gradient, masks."""

import math
from typing import Any

import pytest
import torch
from infonce_cases import REFERENCE_ONLY, VARIANTS, assert_close, gradients, problem
from torch import Tensor

from embkit_kernels import infonce, infonce_naive, value_and_grads
from embkit_kernels.infonce import chunked

# Relative L2 error of gradients against float64. bf16 is the rounding of the result alone.
GRAD_TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 4e-3}

Q = torch.tensor([[1, 2, 0, 1], [0, 1, 3, 1], [2, 0, 1, 1]], dtype=torch.float64)
P = torch.tensor([[1, 1, 0, 2], [1, 1, 2, 0], [2, 1, 1, 0]], dtype=torch.float64)
N = torch.tensor([[0, 2, 1, 1], [1, 0, 1, 2], [1, 1, 2, 1]], dtype=torch.float64)
N2 = torch.stack([N, N.flip(0)], 1)
IDS = torch.arange(3)

GOLDEN: dict[str, tuple[float, dict[str, Any]]] = {
    "gecko_pretraining": (0.035290, {}),
    "gecko": (0.343748, {"hard": N[:, None], "same_tower": True}),
    "gemini2": (0.342723, {"hard": N[:, None], "query_ids": IDS, "passage_ids": IDS}),
    "gemini2_without_hard": (0.035290, {"query_ids": IDS, "passage_ids": IDS}),
    "gemini2_same_label": (
        0.342498,
        {"hard": N[:, None], "query_ids": IDS, "passage_ids": torch.tensor([0, 0, 2])},
    ),
    "gemini1_as_printed": (-1.938513, {"hard": N[:, None], "include_positive": False}),
    "embeddinggemma_hardness": (2.341997, {"hard": N[:, None], "hardness_alpha": 5.0}),
    "qwen3": (
        0.679984,
        {"hard": N2, "same_tower": True, "doc_doc": True, "margin": 0.1, "passage_ids": IDS},
    ),
    "qwen3_stage2": (0.347295, {"hard": N2, "margin": 0.1, "passage_ids": IDS}),
    "conan_hard_only": (0.323075, {"hard": N2, "in_batch": False}),
    "matryoshka": (0.887785, {"hard": N[:, None], "dims": (2, 4)}),
}


@pytest.mark.parametrize(
    ("function", "dtype"),
    [(infonce, torch.float64), (infonce, torch.float32), (infonce_naive, torch.float64)],
)
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: str, function: Any, dtype: torch.dtype) -> None:
    want, options = GOLDEN[case]
    options = dict(options)
    if "hard" in options:
        options["hard"] = options["hard"].to(dtype)
    loss, _ = function(Q.to(dtype), P.to(dtype), options.pop("dims", None), **options)
    assert loss.item() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("path", ["scalar", "rows"])
@pytest.mark.parametrize("variant", [*VARIANTS, *REFERENCE_ONLY])
def test_every_variant_against_naive(
    variant: str, path: str, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways to a gradient: on the way of a scalar loss, and recomputed for per-row losses."""
    shape, options = {**VARIANTS, **REFERENCE_ONLY}[variant]
    options = {**options, "reduction": "none"} if path == "rows" else options
    monkeypatch.setattr(chunked, "MIN_ROWS", 5)  # several ragged chunks
    monkeypatch.setitem(chunked.WORKSPACE, "cpu", 1)
    values = problem(rng, 13, 19, 24, **shape)
    options = {
        **options,
        "dims": (24, 7, 16),
        "dim_weights": (0.5, 2.0, 1.0),
        "temperature": torch.tensor(0.07, dtype=torch.float64),
    }
    want = gradients(infonce_naive, values, **options)
    assert_close(gradients(infonce, values, **options), want, GRAD_TOLERANCE[torch.float64])
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    options["temperature"] = torch.tensor(0.07)
    assert_close(gradients(infonce, single, **options), want, GRAD_TOLERANCE[torch.float32])


def test_a_relative_margin_is_a_share_of_the_positive() -> None:
    """By hand: cosines 0.8 (positive), 0.77 and 0.75 (negatives), kept up to 0.95 x 0.8 = 0.76."""
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([[s, (1 - s * s) ** 0.5] for s in (0.8, 0.77, 0.75)], dtype=torch.float64)
    loss, _ = infonce(q, p, temperature=0.1, margin=-0.05, margin_relative=True)
    assert loss.item() == pytest.approx(math.log1p(math.exp((0.75 - 0.8) / 0.1)), rel=1e-12)
    with pytest.MonkeyPatch.context() as env:
        env.setenv("EMBKIT_KERNELS", "triton")
        with pytest.raises(RuntimeError):  # no silent reference for who asks for Triton
            infonce(q.float(), p.float(), margin=-0.05, margin_relative=True)


def test_a_copy_of_the_positive_is_not_nearer_to_a_guide() -> None:
    """Its cosine is the same but for rounding, which differs between a product and a sum."""
    generator = torch.Generator().manual_seed(0)
    x, guide_query = (torch.randn(40, width, generator=generator) for width in (16, 300))
    guide_passage = guide_query + torch.randn(40, 300, generator=generator)
    loss, _ = infonce(  # a temperature at which the own copy alone counts
        x, x, hard=x, in_batch=False, temperature=1e-3, guide_query=guide_query,
        guide_passage=guide_passage, guide_hard=guide_passage, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.full((40,), math.log(2)), atol=1e-3, rtol=0)


def test_a_guide_decides_by_its_own_cosines() -> None:
    """The candidate that the guide finds nearer than the positive goes, the other one stays."""
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    p = torch.tensor([[s, (1 - s * s) ** 0.5] for s in (0.8, 0.77, 0.75)], dtype=torch.float64)
    guide = {"guide_query": torch.tensor([[1.0, 0]]), "guide_passage": p.flip(0).float()}

    def want(*negatives: float) -> float:
        return math.log1p(sum(math.exp((s - 0.8) / 0.1) for s in negatives))

    for margin, negatives in ((0.0, ()), (0.03, (0.77,)), (0.06, (0.77, 0.75))):
        loss, _ = infonce(q, p, temperature=0.1, guide_margin=margin, **guide)
        assert loss.item() == pytest.approx(want(*negatives), abs=1e-12), margin
    for wrong, says in (
        ({"guide_passage": p[:2].float()}, "guide_passage has shape"),
        ({"guide_hard": p.float()}, "where there are any"),
        ({"guide_query": torch.ones(1, 2, dtype=torch.int64)}, "floating point"),
        ({"guide_query": torch.ones(1, 2, requires_grad=True)}, "no gradient"),
    ):
        with pytest.raises((ValueError, TypeError), match=says):
            infonce(q, p, **{**guide, **wrong})
    with pytest.MonkeyPatch.context() as env:
        env.setenv("EMBKIT_KERNELS", "triton")
        with pytest.raises(RuntimeError):
            infonce(q.float(), p.float(), **guide)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_on_cuda(variant: str, rng: torch.Generator) -> None:
    shape, options = VARIANTS[variant]
    values = problem(rng, 37, 50, 24, **shape)
    options = {**options, "dims": (24, 7, 16), "temperature": torch.tensor(0.07)}
    want = gradients(infonce_naive, values, **options)
    cuda = {k: (v.float() if v.is_floating_point() else v).cuda() for k, v in values.items()}
    options["temperature"] = torch.tensor(0.07).cuda()
    got, again = (gradients(infonce, cuda, **options) for _ in range(2))
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert_close({k: v.cpu() for k, v in got.items()}, want, GRAD_TOLERANCE[torch.float32])


@pytest.mark.parametrize("batch", [1, 2, 127, 129])
def test_odd_sizes(batch: int, rng: torch.Generator) -> None:
    values = problem(rng, batch, batch + batch // 2, 33, hard="private")
    options = {"dims": (5, 33), "temperature": torch.tensor(0.05, dtype=torch.float64)}
    want = gradients(infonce_naive, values, **options)
    assert_close(gradients(infonce, values, **options), want, GRAD_TOLERANCE[torch.float64])


@pytest.mark.parametrize("easy", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("tau", [0.005, 0.01, 0.02, 0.05, 0.2, 1.0])
def test_loss_error_over_temperatures(tau: float, easy: float, rng: torch.Generator) -> None:
    """The loss bound of the contract, for hard rows and for rows with losses near 0."""
    p = torch.randn(64, 96, generator=rng)
    q = torch.randn(64, 96, generator=rng) + easy * p
    _, want = infonce_naive(q.double(), p.double(), (32, 96), temperature=tau)
    _, got = infonce(q, p, (32, 96), temperature=tau)
    bound = torch.where(want >= 1e-6, 1e-5 * max(1.0, 0.02 / tau), 1e-3)
    assert ((got.double() - want).abs() <= bound * want.abs() + 1e-30).all(), (got, want)


def test_bf16_inputs_round_only_the_result(rng: torch.Generator) -> None:
    values = problem(rng, 33, 40, 64, hard="private")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in values.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in half.items()}
    got = gradients(infonce, half, dims=(32, 64), temperature=0.02)
    want = gradients(infonce_naive, exact, dims=(32, 64), temperature=0.02)
    assert got["loss"].dtype == torch.float32
    assert got["q"].dtype == torch.bfloat16
    assert abs(got["loss"] - want["loss"]) <= 1e-5 * want["loss"]
    for name in ("q", "p", "hard"):
        error = (got[name].double() - want[name]).norm() / want[name].norm()
        assert error <= GRAD_TOLERANCE[torch.bfloat16]


def test_autocast_and_tf32_settings_change_nothing(rng: torch.Generator) -> None:
    values = problem(rng, 40, 40, 64)
    values = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    want = gradients(infonce, values, temperature=0.02)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(infonce, values, temperature=0.02)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("variant", ["plain", "qwen3", "gemini1", "gemma", "jagged"])
def test_gradcheck_of_the_specification(variant: str, rng: torch.Generator) -> None:
    shape, options = VARIANTS[variant]
    values = problem(rng, 3, 4, 4, **shape)
    if variant == "gemma":
        options = {"margin": 0.05}  # gradcheck cannot see the stopped gradient of alpha
    names = [n for n in ("q", "p", "hard", "row_weights") if n in values]
    tau = torch.tensor(0.3, dtype=torch.float64)

    def function(tau: Tensor, *tensors: Tensor) -> Tensor:
        given = {**values, **dict(zip(names, tensors, strict=True))}
        q, p = given.pop("q"), given.pop("p")
        return infonce_naive(q, p, (2, 4), temperature=tau, **given, **options)[0]

    leaves = [t.clone().requires_grad_() for t in (tau, *(values[n] for n in names))]
    assert torch.autograd.gradcheck(function, leaves)


def test_gradcheck_of_the_op(rng: torch.Generator) -> None:
    q, p, hard = (torch.randn(*s, 5, generator=rng, dtype=torch.float64)
                  for s in ((4,), (6,), (4, 2)))  # fmt: skip
    tau = torch.tensor(0.4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (q, p, hard, tau)]
    assert torch.autograd.gradcheck(
        lambda q, p, h, t: infonce(q, p, (2, 5), hard=h, temperature=t, reduction="none")[0],
        leaves,
    )


def test_duplicate_rows_give_each_other_no_gradient() -> None:
    """Rows 0 and 1 are the same example: under the masks neither is the other's negative."""
    q = torch.tensor([[1.0, 0.2], [1.0, 0.2]], requires_grad=True)
    p = torch.tensor([[0.8, 0.5], [0.8, 0.5]], requires_grad=True)
    for masks in (
        {"query_ids": torch.tensor([7, 7])},
        {"passage_ids": torch.tensor([3, 3])},
    ):
        loss, _ = infonce(q, p, same_tower=True, doc_doc=True, symmetric=True, **masks)
        grads = torch.autograd.grad(loss, (q, p))
        assert loss.item() == 0
        assert all(bool((g == 0).all()) for g in grads)
    assert infonce(q, p)[0].item() == pytest.approx(0.693147, abs=1e-5)


def test_padded_ids_never_match() -> None:
    q = torch.eye(3)
    minus = torch.full((3,), -1)
    plain, _ = infonce(q, q, same_tower=True, temperature=1.0)
    padded, _ = infonce(
        q, q, same_tower=True, temperature=1.0, query_ids=minus, passage_ids=minus,
        passage_query_ids=minus, hard=q[:, None] * 0, hard_ids=minus[:, None],
        hard_mask=torch.zeros(3, 1, dtype=torch.bool),
    )  # fmt: skip
    assert torch.equal(plain, padded)


def test_ids_of_either_width_agree(rng: torch.Generator) -> None:
    values = problem(rng, 12, 15, 8, hard="private")
    wide = {k: v.long() if v.dtype == torch.int32 else v for k, v in values.items()}
    want, got = gradients(infonce, values), gradients(infonce, wide)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_row_permutation_changes_nothing(rng: torch.Generator) -> None:
    values = problem(rng, 17, 17, 12, hard="private")
    del values["passage_query_ids"]
    order = torch.randperm(17, generator=rng)
    shuffled = {k: v[order] for k, v in values.items()}
    options = {"same_tower": True, "margin": 0.2, "dims": (6, 12)}
    want, got = gradients(infonce, values, **options), gradients(infonce, shuffled, **options)
    for name in ("q", "p", "hard"):
        torch.testing.assert_close(got[name], want[name][order], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got["loss"], want["loss"])


def test_full_width_alone_equals_plain_and_order_of_dims_is_the_callers(
    rng: torch.Generator,
) -> None:
    q, p = torch.randn(9, 16, generator=rng), torch.randn(9, 16, generator=rng)
    plain, _ = infonce(q, p)
    assert torch.equal(infonce(q, p, (16,))[0], plain)
    _, up = infonce(q, p, (4, 8, 16))
    total, down = infonce(q, p, (16, 8, 4), dim_weights=(1.0, 0.0, 0.0))
    assert torch.equal(down, up.flip(0))
    assert torch.equal(total, down[0])
    torch.testing.assert_close(up[2], plain)


def test_positive_index_moves_the_diagonal(rng: torch.Generator) -> None:
    """A rank that owns rows 5..9 of ten gathered ones sees what one process sees of them."""
    q, p = torch.randn(10, 8, generator=rng), torch.randn(10, 8, generator=rng)
    ids = torch.randint(0, 6, (10,), generator=rng)
    whole, _ = infonce(q, p, query_ids=ids, passage_ids=ids, reduction="none")
    part, _ = infonce(
        q[5:], p, query_ids=ids[5:], passage_ids=ids, passage_query_ids=ids,
        positive_index=torch.arange(5, 10), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(part, whole[5:])


def test_fully_masked_row_and_zero_vectors_are_quiet() -> None:
    """Row 0 shares its id with everything; row 1 is the zero vector; nothing is NaN."""
    q = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    for include_positive in (True, False):
        got = gradients(
            infonce,
            {"q": q, "p": q + 0.5},
            passage_query_ids=torch.tensor([4, 4, 4]),
            query_ids=torch.tensor([4, -1, -1]),
            reduction="none",
            include_positive=include_positive,
        )
        assert got["loss"][0] == 0
        assert bool((got["q"][:2] == 0).all())
        assert all(bool(t.isfinite().all()) for t in got.values())


def test_empty_batches_have_loss_zero() -> None:
    q = torch.randn(3, 4, requires_grad=True)
    loss, per_dim = infonce(q, q.detach() + 1, (2, 4), row_weights=torch.zeros(3))
    assert loss.item() == 0
    assert bool((torch.autograd.grad(loss, q)[0] == 0).all())
    loss, per_dim = infonce(q[:0], q[:0], (2, 4), hard=torch.ones(0, 2, 4))
    assert loss.item() == 0
    assert per_dim.shape == (2,)


def test_conan_over_ranks_equals_infonce_over_own_negatives(rng: torch.Generator) -> None:
    """CBB with N ranks is a softmax over N * n own negatives: split them as one likes."""
    q, p = torch.randn(6, 8, generator=rng), torch.randn(6, 8, generator=rng)
    negatives = torch.randn(6, 4, 8, generator=rng)
    a, _ = infonce(q, p, hard=negatives, in_batch=False)
    b, _ = infonce(q, p, hard=negatives.flip(1), in_batch=False)
    one_by_one = [
        infonce(q[i : i + 1], torch.cat([p[i : i + 1], negatives[i]]))[0] for i in range(6)
    ]
    torch.testing.assert_close(a, torch.stack(one_by_one).mean())
    torch.testing.assert_close(a, b)


def test_value_and_grads_equals_autograd(rng: torch.Generator) -> None:
    values = problem(rng, 11, 14, 10, hard="private")
    options = {"dims": (10, 4), "same_tower": True}
    want = gradients(infonce, values, temperature=torch.tensor(0.05), **options)
    q, p, dims = values.pop("q"), values.pop("p"), options.pop("dims")
    got = value_and_grads(q, p, dims, temperature=0.05, **values, **options)
    for name, value in zip(("loss", "per_dim", "q", "p", "hard", "temperature"), got, strict=True):
        torch.testing.assert_close(value, want[name], check_dtype=name != "temperature")
        assert not value.requires_grad
    assert value_and_grads(q, p)[4] is None


def test_frozen_sides_get_no_gradient(rng: torch.Generator) -> None:
    q, p = torch.randn(5, 8, generator=rng), torch.randn(5, 8, generator=rng)
    want = torch.autograd.grad(infonce(q.requires_grad_(), p)[0], q)[0]
    p.requires_grad_()
    loss, _ = infonce(q, p)
    assert torch.equal(torch.autograd.grad(loss, (q, p))[0], want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dims": (0, 4)}, ValueError, "outside 1..4"),
        ({"dims": (2, 2)}, ValueError, "repeats"),
        ({"dims": ()}, ValueError, "empty"),
        ({"reduction": "avg"}, ValueError, "mean, sum, none"),
        ({"temperature": 0.0}, ValueError, "must be > 0"),
        ({"in_batch": False}, ValueError, "no candidate"),
        ({"query_ids": torch.zeros(3)}, TypeError, "integers"),
        ({"query_ids": torch.zeros(2, dtype=torch.int64)}, ValueError, "want \\(3,\\)"),
        ({"query_ids": IDS, "positive_index": IDS}, ValueError, "needs passage_query_ids"),
        ({"hard": torch.ones(2, 1, 4)}, ValueError, "2 rows"),
        ({"hard": torch.ones(3, 1, 5)}, ValueError, "5 wide"),
        ({"hard": torch.ones(3, 1, 4), "hard_ids": IDS[:, None]}, ValueError, "pass both"),
        ({"hard": torch.ones(1, 4), "hard_query_ids": IDS[:1]}, ValueError, "query_ids"),
        ({"row_weights": torch.ones(2)}, ValueError, "3 rows"),
        ({"dim_weights": (1.0, 1.0)}, ValueError, "dims has 1"),
        ({"positive_offsets": torch.arange(4)}, ValueError, "needs positive_index"),
        ({"p": torch.ones(2, 4)}, ValueError, "3 queries but 2 passages"),
        ({"q": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "floating"),
    ],
)
def test_bad_arguments_say_what_is_wrong(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    values = {"q": torch.ones(3, 4), "p": torch.ones(3, 4), "dims": None, **options}
    with pytest.raises(error, match=words):
        infonce(values.pop("q"), values.pop("p"), values.pop("dims"), **values)
