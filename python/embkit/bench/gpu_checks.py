"""Correctness of the kernels where they run: real sizes, float64 on the same device, twice.

Every op and option is computed with its Triton kernel (the torch reference where there is none,
which the result says) and by the same function in float64 through the reference; plain losses are
also compared with a formula of their own, in rows at a time. Errors are ||got - want|| / ||want||.
Each is computed twice and compared bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from embkit import kernels
from embkit.bench import kernel_ways as ways

GRADIENT = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 5e-6}
"""Largest error of a gradient; of a loss: `loss_limit`."""

ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 5e-6}
"""Within this an error is one rounding of the result, and torch is not to be beaten."""


@dataclass(frozen=True)
class Sizes:
    """Problem sizes: rows, columns, far columns, widths, pooled [sequences, longest, width]."""

    batch: int
    columns: int
    far: int
    dims: tuple[int, ...]
    pool: tuple[int, int, int]
    shared: int


FULL = Sizes(8192, 8192, 65536, (768, 1536, 3072), (512, 512, 3072), 1024)
RAGGED = Sizes(77, 133, 301, (40, 104, 200), (13, 57, 200), 19)
"""Nothing a multiple of anything: the masked paths."""
TINY = Sizes(5, 9, 12, (16, 32), (3, 9, 16), 4)
"""For the interpreter, which takes a second for what a GPU does in a microsecond."""


DRY = ("infonce, plain", "infonce, own hard negatives", "infonce, several positives")
"""Checks of the loss whose kernels a dry run interprets, seconds each; the others take the
reference there. Interpreted kernels with every option are tests/kernels' matter."""


@dataclass
class Check:
    """One comparison."""

    name: str
    provider: str
    errors: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def bound(self, what: str, error: float, limit: float) -> None:
        """Record an error and whether it is within its limit (NaN never is)."""
        self.errors[what], self.limits[what] = error, limit
        if not error <= limit:
            self.problems.append(f"{what} is off by {error:.1e}, allowed {limit:.1e}")


def relative(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, infinite for NaN; where all of want is 0, ||got||."""
    want = want.double()
    scale = want.norm()
    error = (got.double() - want).norm() / torch.where(scale > 0, scale, 1)
    return float(torch.nan_to_num(error, nan=torch.inf))


def loss_limit(loss: float, tau: float) -> float:
    """Allowed relative error of a loss: a rounding of the cosine counts 1 / tau times."""
    return 1e-5 * max(1.0, 0.02 / tau) if loss >= 1e-6 else 1e-3


@contextlib.contextmanager
def using(choice: str) -> Iterator[None]:
    """EMBKIT_KERNELS inside a block."""
    before = os.environ.get("EMBKIT_KERNELS")
    os.environ["EMBKIT_KERNELS"] = choice
    try:
        yield
    finally:
        os.environ.pop("EMBKIT_KERNELS")
        if before is not None:
            os.environ["EMBKIT_KERNELS"] = before


def provider(op: str, device: torch.device, name: str = "") -> tuple[str, str]:
    """What to ask for and what to call it: Triton, or the reference and why.

    Args:
        name: of a check, which may be too slow for the interpreter.
    """
    if device.type == "cpu" and name.startswith("infonce") and name not in DRY:
        return "ref", "ref (a dry run)"
    with using("triton"):
        try:
            return kernels.provider(op, device), "triton"
        except (kernels.KernelUnavailableError, ValueError) as error:
            return "ref", f"ref ({str(error).removeprefix('EMBKIT_KERNELS=').split(';')[0]})"


Step = Callable[..., Sequence[Tensor | None]]


def compare(
    name: str, op: str, step: Step, leaves: Sequence[Tensor], limits: Callable[..., Any],
    peer: Step | None = None, reference: Step | None = None,
) -> Check:  # fmt: skip
    """Run a step on its leaves and, in float64, on the reference; then once more for the bits.

    Args:
        limits: given the float64 results, the bound of each by name, in the order of the step.
        peer: plain torch in the leaves' dtype, which may not be better by more than a rounding.
        reference: what runs in float64; None means the step itself.
    """
    choice, label = provider(op, leaves[0].device, name)
    check, begun = Check(name, label), time.monotonic()
    try:
        _compare(check, choice, step, leaves, limits, peer, reference)
    except Exception as error:  # the other checks are still to be done
        check.problems.append(f"{type(error).__name__}: {str(error).strip()[:300]}")
    check.seconds = time.monotonic() - begun
    return check


def _compare(
    check: Check, choice: str, step: Step, leaves: Sequence[Tensor], limits: Callable[..., Any],
    peer: Step | None, reference: Step | None,
) -> None:  # fmt: skip
    dtype = leaves[0].dtype
    with using("ref"):
        exact = (reference or step)(*[x.double() if x.is_floating_point() else x for x in leaves])
        torch_has = [None] * len(exact) if peer is None else peer(*leaves)
    with using(choice):
        got, again = step(*leaves), step(*leaves)
    for (what, limit), a, b, want, other in zip(
        limits(exact).items(), got, again, exact, torch_has, strict=False
    ):
        if want is None or a is None or b is None:
            continue
        error = relative(a, want)
        check.bound(what, error, limit)
        if other is not None:
            best = max(relative(other, want), ROUNDING[dtype])
            check.notes[f"torch's {what}"] = relative(other, want)
            if error > max(best, limit if what == "loss" else 0.0):
                check.problems.append(f"{what} is off by {error:.1e}, torch by {best:.1e}")
        if not torch.equal(a, b):
            count = int((a != b).sum())
            check.problems.append(f"{what}: {count} of {a.numel()} values differ in a second run")


def exact_infonce(
    q: Tensor, p: Tensor, dims: Sequence[int], tau: float, rows: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dq and dp of the plain loss in autograd, some rows of the score matrix at a time."""
    q, p = q.detach().requires_grad_(), p.detach().requires_grad_()
    total = q.new_zeros(())
    for start in range(0, q.shape[0], rows):
        target = torch.arange(start, min(start + rows, q.shape[0]), device=q.device)
        for d in dims:
            a = torch.nn.functional.normalize(q[start : start + rows, :d], dim=1)
            scores = a @ torch.nn.functional.normalize(p[:, :d], dim=1).T / tau
            part = torch.nn.functional.cross_entropy(scores, target, reduction="sum") / q.shape[0]
            part.backward()
            total += part.detach()
    assert q.grad is not None and p.grad is not None
    return total, q.grad, p.grad


def infonce_checks(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """The fused loss with every option."""
    rng = torch.Generator(device).manual_seed(1)
    batch, columns, dims = sizes.batch, sizes.columns, sizes.dims

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, dims[-1], device=device, generator=rng).to(dtype)

    def ids(count: int) -> Tensor:
        return torch.randint(-3, count, (count,), device=device, generator=rng, dtype=torch.int64)

    q, p = rows(batch), rows(columns)
    p[:batch] += 0.1 * q
    keys = ids(columns)
    masks = {"query_ids": keys[:batch], "passage_ids": keys, "margin": 0.1}
    index = torch.randperm(columns, device=device, generator=rng)[:batch]
    offsets = torch.arange(batch + 1, device=device)
    offsets[1 : batch // 2] += 1  # two positives for the first row, none for another
    half = max(1, batch // 4)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "temperature 0.005": {"temperature": 0.005},
        "temperature 1": {"temperature": 1.0},
        "ids and margin": masks,
        "own hard negatives": {"hard": rows(batch, 2), "hardness_alpha": 5.0},
        "shared hard negatives": {"hard": rows(sizes.shared), "query_ids": keys[:batch]},
        "hard negatives alone": {"hard": rows(batch, 3), "in_batch": False},
        "symmetric": {"symmetric": True, **masks},
        "same tower, documents": {"same_tower": True, "doc_doc": True, **masks},
        "positive left out": {"include_positive": False},
        "positives by index": {"positive_index": index, "passage_mask": keys >= 0},
        "several positives": {
            "positive_index": index,
            "positive_offsets": offsets.clamp(max=batch),
        },
        "row weights": {"row_weights": torch.rand(batch, device=device, generator=rng)},
        "one width": {"dims": dims[-1:]},
    }
    for name, given in options.items():
        yield _infonce(name, q, p, dims, given)
    yield _infonce("float32", q[:half].float(), p[: 2 * half].float(), dims, {})
    far = rows(sizes.far)
    far[:batch] += 0.1 * q
    yield _infonce(f"N = {sizes.far}", q, far, dims, {})


def _infonce(
    name: str, q: Tensor, p: Tensor, dims: Sequence[int], options: dict[str, Any]
) -> Check:
    given = dict(options)
    dims, tau = given.pop("dims", dims), float(given.pop("temperature", 0.05))
    hard: Tensor | None = given.pop("hard", None)
    plain = not set(given) and hard is None
    limit = GRADIENT[q.dtype]

    def step(q: Tensor, p: Tensor, *hard: Tensor) -> list[Tensor | None]:
        loss, _, dq, dp, d_hard, d_tau = kernels.value_and_grads(
            q, p, dims, hard=hard[0] if hard else None, temperature=tau, **_cast(given, q)
        )
        return [loss, dq, dp, d_tau, d_hard]

    def eager(q: Tensor, p: Tensor) -> list[Tensor | None]:
        loss = ways.with_gradients(lambda a, b: ways.infonce_eager(a, b, dims, tau))
        return [*loss(q, p)]

    def exact(q: Tensor, p: Tensor) -> list[Tensor | None]:
        return [*exact_infonce(q, p, dims, tau)]

    def limits(want: Sequence[Tensor]) -> dict[str, float]:
        bounds = {"loss": loss_limit(float(want[0]), tau), "dq": limit, "dp": limit}
        return bounds | {"d_temperature": limit, "d_hard": limit}

    leaves = [q, p] if hard is None else [q, p, hard]
    check = compare(f"infonce, {name}", "infonce", step, leaves, limits,
                    eager if plain else None, exact if plain else None)  # fmt: skip
    if q.is_cuda:
        extra = _extra_bytes(step, leaves, provider("infonce", q.device)[0])
        check.notes["extra_bytes"] = extra
        if p.shape[0] >= FULL.far:
            check.bound("memory beside results, GB", extra / 1e9, 0.5)
    return check


def _cast(options: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Floating-point options follow the accumulation type: float64 for the reference."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    floats = {k: v for k, v in options.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return options | {k: v.to(wide) for k, v in floats.items()}


def _extra_bytes(step: Step, leaves: Sequence[Tensor], choice: str) -> int:
    """Peak of the allocated memory besides the inputs and the results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with using(choice):
        found = step(*leaves)
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in found if x is not None)
    return torch.cuda.max_memory_allocated() - before - results


def pool_checks(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Mean pooling, padded on either side and packed, with prompts and empty sequences."""
    rng = torch.Generator(device).manual_seed(2)
    batch, length, width = sizes.pool
    lengths = torch.randint(0, length + 1, (batch,), device=device, generator=rng)
    lengths[0], lengths[-1] = length, 0
    place = torch.arange(length, device=device)
    masks = {
        "right": place < lengths[:, None],
        "left": place >= length - lengths[:, None],
        "any": torch.rand(batch, length, device=device, generator=rng) < 0.5,
    }
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    padded = torch.randn(batch, length, width, device=device, generator=rng).to(dtype)
    packed = torch.randn(int(cu[-1]), width, device=device, generator=rng).to(dtype)
    upstream = torch.randn(batch, width, device=device, generator=rng)

    def bounds(want: Sequence[Tensor]) -> dict[str, float]:
        return {"y": GRADIENT[dtype], "dx": GRADIENT[dtype]}

    cases: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "lengths": (padded, {"lengths": lengths}),
        "right padding, prompts, normalised": (
            padded, {"mask": masks["right"], "prompt_len": 3, "normalize": True}),
        "left padding": (padded, {"mask": masks["left"]}),
        "any mask": (padded, {"mask": masks["any"]}),
        "packed, prompts": (packed, {"cu_seqlens": cu, "prompt_len": 2}),
        "packed, normalised": (packed, {"cu_seqlens": cu.to(torch.int32), "normalize": True}),
    }  # fmt: skip
    for name, (x, options) in cases.items():
        step = _pool_step(kernels.mean_pool, upstream, options)
        exact = _pool_step(kernels.mean_pool_ref, upstream, options)
        yield compare(f"mean_pool, {name}", "mean_pool", step, [x], bounds, exact, exact)


def _pool_step(pool: Callable[..., Tensor], upstream: Tensor, options: dict[str, Any]) -> Step:
    def step(x: Tensor) -> list[Tensor | None]:
        given = x.detach().requires_grad_()
        y = pool(given, **options)
        return [y.detach(), *torch.autograd.grad(y, given, upstream.to(y.dtype))]

    return step


def other_checks(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """CoSENT, spread-out and similarities."""
    rng = torch.Generator(device).manual_seed(3)
    dims = sizes.dims

    def rows(count: int) -> Tensor:
        return torch.randn(count, dims[-1], device=device, generator=rng).to(dtype)

    a, b = rows(sizes.batch), rows(sizes.batch)
    labels = torch.randint(0, 26, (sizes.batch,), device=device, generator=rng) / 5
    labels[0] = torch.nan

    def ranked(a: Tensor, b: Tensor) -> list[Tensor | None]:
        return [*ways.with_gradients(lambda a, b: kernels.cosent((a, b), labels, dims)[0])(a, b)]

    def ranked_exactly(a: Tensor, b: Tensor) -> list[Tensor | None]:
        loss = ways.with_gradients(lambda a, b: kernels.cosent_naive((a, b), labels, dims)[0])
        return [*loss(a, b)]

    limit = GRADIENT[dtype]
    bounds = {"loss": loss_limit(1.0, 0.05), "da": limit, "db": limit}
    yield compare("cosent", "cosent", ranked, [a, b], lambda want: bounds, None, ranked_exactly)

    def spread(a: Tensor) -> list[Tensor | None]:
        return [*ways.with_gradients(lambda a: kernels.spread_out(a, dims)[0])(a)]

    bounds_out = {"loss": loss_limit(1.0, 0.05), "da": limit}
    yield compare("spread_out", "spread_out", spread, [a], lambda want: bounds_out)
    if (mrl_similarity := getattr(kernels, "mrl_similarity", None)) is None:
        return
    p, k = rows(sizes.far), min(100, sizes.far // 2)

    def similar(q: Tensor, p: Tensor) -> list[Tensor | None]:
        return [*mrl_similarity(q, p, dims, k=k)]

    def similar_exactly(q: Tensor, p: Tensor) -> list[Tensor | None]:
        return [ways.similarity_eager(q, p, dims, k, dtype=torch.float64)[0]]

    # Scores alone: equal ones leave the order of indexes open in eager torch.
    yield compare("similarity, top k", "similarity", similar, [a, p],
                  lambda want: {"scores": 1e-5}, None, similar_exactly)  # fmt: skip


def all_checks(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, only: str = ""
) -> Iterator[Check]:
    """Every check, as they come; one that raises is a check that failed.

    Args:
        only: those whose op has this in its name.
    """
    makers = {"infonce": infonce_checks, "mean_pool": pool_checks, "others": other_checks}
    for op, make in makers.items():
        if only not in op:
            continue
        try:
            yield from make(sizes, device, dtype)
        except Exception as error:  # the other ops are still to be checked
            yield Check(op, "", problems=[f"{type(error).__name__}: {error}"])
