"""Problems of infonce and how their results are compared, for the tests of every implementation."""

from typing import Any

import torch
from torch import Tensor


def problem(
    rng: torch.Generator,
    batch: int,
    columns: int,
    width: int,
    *,
    hard: str = "",
    queries: bool = False,
    jagged: int = 0,
    guide: int = 0,
) -> dict[str, Any]:
    """Related random vectors with colliding ids, padding and uneven norms, in float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(-1, high, shape, generator=rng, dtype=torch.int32)

    p = normal(columns, width)
    q = normal(batch, width) + p[:batch]
    q = q * (1 + 3 * torch.rand(batch, 1, generator=rng, dtype=torch.float64))
    out: dict[str, Any] = {
        "q": q,
        "p": p,
        "query_ids": ids(batch, batch),
        "passage_ids": ids(columns, columns),
        "passage_query_ids": ids(batch, columns),
        "passage_mask": torch.rand(columns, generator=rng) < 0.9,
        "row_weights": torch.rand(batch, generator=rng, dtype=torch.float64),
    }
    if hard:
        shape = (batch, 3) if hard == "private" else (7,)
        out["hard"] = normal(*shape, width)
        out["hard_ids"] = ids(columns, *shape)
        out["hard_mask"] = torch.rand(*shape, generator=rng) < 0.8
    if jagged:
        count = torch.randint(0, jagged + 1, (batch,), generator=rng)
        out["positive_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
        out["positive_index"] = torch.cat(
            [torch.randperm(columns, generator=rng)[:c] for c in count.tolist()]
        )
    if queries:
        out["hard_query_ids"] = ids(batch, *out["hard_ids"].shape)
    if guide:
        out["guide_query"], out["guide_passage"] = normal(batch, guide), normal(columns, guide)
        if hard:
            out["guide_hard"] = normal(*shape, guide)
    return out


def gradients(function: Any, values: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Loss, per-width loss and gradients of everything differentiable."""
    values = {**values, **options}
    leaves = {}
    for name in ("q", "p", "hard", "row_weights", "temperature"):
        if isinstance(values.get(name), Tensor):
            leaves[name] = values[name] = values[name].detach().clone().requires_grad_()
    q, p, dims = values.pop("q"), values.pop("p"), values.pop("dims", None)
    loss, per_dim = function(q, p, dims, **values)
    scalar = loss if loss.dim() == 0 else (loss * torch.arange(1, len(loss) + 1).to(loss)).sum()
    grads = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    out = {"loss": loss.detach(), "per_dim": per_dim.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        out[name] = torch.zeros_like(leaf) if grad is None else grad
    return out


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        # The floor: a gradient that is 0 in exact arithmetic is rounding noise on both sides.
        error = (got[name].double() - value).norm() / max(value.norm().item(), 1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "private_hard": ({"hard": "private"}, {}),
    "shared_hard": ({"hard": "shared"}, {}),
    "gecko": ({"hard": "private", "queries": True}, {"same_tower": True}),
    "qwen3": ({"hard": "private"}, {"same_tower": True, "doc_doc": True, "margin": 0.1}),
    "gemini1": ({"hard": "private"}, {"include_positive": False}),
    "gemma": ({"hard": "private"}, {"hardness_alpha": 5.0, "margin": 0.05}),
    "gemma_shared": ({"hard": "shared", "queries": True}, {"hardness_alpha": 5.0}),
    "conan": ({"hard": "private"}, {"in_batch": False}),
    "symmetric": ({"hard": "private"}, {"symmetric": True, "same_tower": True, "margin": 0.2}),
    "symmetric_doc": ({}, {"symmetric": True, "doc_doc": True}),
    "jagged": ({"hard": "private", "jagged": 3}, {"same_tower": True, "margin": 0.3}),
    "jagged_gemini1": ({"hard": "shared", "jagged": 3}, {"include_positive": False}),
    "sum": ({}, {"reduction": "sum"}),
    "none": ({"hard": "private"}, {"reduction": "none"}),
}

_RELATIVE: dict[str, Any] = {"margin": -0.3, "margin_relative": True}
REFERENCE_ONLY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relative_margin": ({"hard": "private"}, {**_RELATIVE, "same_tower": True}),
    "relative_margin_jagged": ({"hard": "shared", "jagged": 3}, {**_RELATIVE, "margin": 0.5}),
    "relative_margin_symmetric": ({}, {**_RELATIVE, "symmetric": True, "doc_doc": True}),
    "guided": (
        {"hard": "private", "guide": 6},
        {"same_tower": True, "doc_doc": True, "margin": 0.3},
    ),
    "guided_shared": ({"hard": "shared", "guide": 6}, {"guide_margin": -0.1, "same_tower": True}),
    "guided_jagged": ({"hard": "private", "guide": 6, "jagged": 3}, {"guide_margin": 0.2}),
    "guided_symmetric": (
        {"guide": 6},
        {"symmetric": True, "doc_doc": True, "guide_margin": -0.2, "guide_relative": True},
    ),
}
"""Variants that no Triton kernel has."""
