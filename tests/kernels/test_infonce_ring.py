"""infonce_ring against the specification over all rows; ranks are threads of this process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from infonce_cases import problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embkit_kernels import infonce, infonce_naive, infonce_ring

DIMS = (20, 5, 12)


class Circle:
    """A ring of threads, which counts what passes."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.boxes: dict[tuple[int, bool], queue.Queue[Tensor]] = {
            (rank, back): queue.Queue() for rank in range(world) for back in (False, True)
        }
        self.messages: list[tuple[bool, int]] = []


class Member:
    """One rank of a circle."""

    def __init__(self, circle: Circle, rank: int, rows: int) -> None:
        self.circle, self.rank, self.world, self.rows = circle, rank, circle.world, rows

    def pass_on(self, tensor: Tensor, *, back: bool = False) -> Callable[[], Tensor]:
        circle = self.circle
        to = (self.rank + (1 if back else -1)) % self.world
        circle.boxes[to, back].put(tensor.clone())
        circle.messages.append((back, tensor.numel() * tensor.element_size()))
        return lambda: circle.boxes[self.rank, back].get(timeout=20)


def on_ranks(
    values: dict[str, Any], counts: Sequence[int], *, padding: int = 0, **options: Any
) -> tuple[dict[str, Tensor], Circle]:
    """Loss and gradients of all rows, each rank with its own; summed or joined over ranks."""
    circle = Circle(len(counts))
    found: list[Any] = [None] * len(counts)

    def work(rank: int) -> None:
        rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        own = {k: v[rows] for k, v in values.items()}
        names = [n for n in ("q", "p", "hard", "row_weights") if n in own]
        leaves = [own[n].clone().requires_grad_() for n in names]
        tau = torch.tensor(0.2, dtype=values["q"].dtype, requires_grad=True)
        own.update(zip(names, leaves, strict=True))
        q, p = own.pop("q"), own.pop("p")
        member = Member(circle, rank, max(counts) + padding)
        loss, per_dim = infonce_ring(q, p, DIMS, ring=member, temperature=tau, **own, **options)
        grads = torch.autograd.grad(loss, [*leaves, tau])
        found[rank] = {
            "loss": loss.detach(), "per_dim": per_dim,
            **dict(zip([*names, "tau"], grads, strict=True)),
        }  # fmt: skip

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(found), "a rank failed or waits"
    assert all(box.empty() for box in circle.boxes.values()), "a message nobody took"
    joined = {
        name: sum(f[name] for f in found)
        if name in ("loss", "per_dim", "tau")
        else torch.cat([f[name] for f in found])
        for name in found[0]
    }
    return joined, circle


def whole(function: Any, values: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The same of one process."""
    values = dict(values)
    names = [n for n in ("q", "p", "hard", "row_weights") if n in values]
    leaves = [values[n].clone().requires_grad_() for n in names]
    values.update(zip(names, leaves, strict=True))
    tau = torch.tensor(0.2, dtype=values["q"].dtype, requires_grad=True)
    loss, per_dim = function(
        values.pop("q"), values.pop("p"), DIMS, temperature=tau, reduction="sum",
        **values, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss, [*leaves, tau])
    return {
        "loss": loss.detach(), "per_dim": per_dim.detach(),
        **dict(zip([*names, "tau"], grads, strict=True)),
    }  # fmt: skip


def case(rng: torch.Generator, rows: int, *, hard: bool = True) -> dict[str, Any]:
    """Colliding keys; a row that has the query of all, and one without a candidate of its own."""
    values = problem(rng, rows, rows, 20, hard="private" if hard else "")
    for name in ("passage_query_ids", "passage_mask"):
        del values[name]
    values["query_ids"] = values["query_ids"].clamp(min=0) // 2
    values["p"][1] = 0.0
    if hard:
        values["hard_mask"][2] = False
    return values


@pytest.mark.parametrize("counts", [(7,), (6, 5), (3, 5, 2, 1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"same_tower": True},
        {"include_positive": False, "margin": 0.1, "dim_weights": (0.5, 2.0, 1.0)},
        {"hardness_alpha": 5.0, "same_tower": True, "margin": 0.05},
    ],
    ids=["gemini2", "gecko", "gemini1", "all"],
)
def test_equals_one_process(
    counts: tuple[int, ...], options: dict[str, Any], rng: torch.Generator
) -> None:
    """Float64 against the specification, float32 against the kernel; skewed ranks, padding."""
    values = case(rng, sum(counts))
    want = whole(infonce_naive, values, **options)
    got, _ = on_ranks(values, counts, padding=2, **options)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)
    single = {k: v.float() if v.is_floating_point() else v for k, v in values.items()}
    want = whole(infonce, single, **options)
    got, _ = on_ranks(single, counts, **options)
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-6)
    for name in ("q", "p", "hard", "row_weights", "tau"):
        assert (got[name] - want[name]).norm() <= 1e-5 * want[name].norm() + 1e-7, name


def test_every_row_of_one_query_has_no_candidate(rng: torch.Generator) -> None:
    """Nothing is left on any rank: loss and gradients are zeros, not NaN."""
    values = case(rng, 6, hard=False)
    values["query_ids"] = torch.zeros(6, dtype=torch.int32)
    for include_positive in (True, False):
        got, _ = on_ranks(values, (4, 2), include_positive=include_positive)
        assert all(bool((value == 0).all()) for value in got.values())


def test_messages_are_counted(rng: torch.Generator) -> None:
    """W - 1 blocks there, W - 2 back, W - 1 gradients, each of a rank's own rows."""
    values = case(rng, 12)
    for world in (2, 3, 4):
        _, circle = on_ranks(values, [12 // world] * world)
        rows = 12 // world
        block, gradient = rows * (20 * 8 + 24), rows * 20 * 8
        assert circle.messages.count((False, block)) == world * (world - 1)
        assert circle.messages.count((True, block)) == world * (world - 2)
        assert circle.messages.count((True, gradient)) == world * (world - 1)
        assert len(circle.messages) == world * (3 * world - 4)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_rank_holds_the_columns_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a rank is a block, however many there are."""
    q, p = torch.randn(2, 96, 512)
    values = {"q": q, "p": p, "row_weights": torch.ones(96)}
    values |= {n: torch.arange(96, dtype=torch.int32) for n in ("query_ids", "passage_ids")}
    found = []
    real = infonce_ring

    def watched(*args: Any, **options: Any) -> Any:
        with Largest() as largest:
            out = real(*args, **options)
            torch.autograd.grad(out[0], args[:2], retain_graph=True)
        found.append(largest.bytes)
        return out

    monkeypatch.setitem(globals(), "infonce_ring", watched)
    on_ranks(values, [12] * 8)
    block = 12 * (512 * 4 + 24)
    assert found == [block] * 8 and block < q.numel() * 4 // 7


def test_what_the_ring_has_not(rng: torch.Generator) -> None:
    values = case(rng, 4)
    q, p = values.pop("q"), values.pop("p")
    ring = Member(Circle(1), 0, 4)
    for name in ("doc_doc", "symmetric"):
        with pytest.raises(TypeError, match=name):
            infonce_ring(q, p, DIMS, ring=ring, **values, **{name: True})
