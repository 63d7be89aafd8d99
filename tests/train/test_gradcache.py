"""GradCache: the gradient of the whole batch, whatever is kept, and work linear in the chunks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from embkit.data import Store
from embkit.losses import compute, value_and_grad
from embkit.model import Encoder
from embkit.recipe import Train
from embkit.train import step as one_step
from embkit.train.batches import Batch, Steps, layout_of
from embkit.train.gradcache import Chunks, graph_bytes, kept_graphs, seed_of
from embkit.train.optim import Optimizer
from embkit.train.parallel import Ranks
from embkit.train.profile import Clock, Profile
from embkit.train.step import Step

SETTINGS: dict[str, Any] = {"steps": 9, "batch_size": 24, "token_budget": 90, "hard_negatives": 2}


def batch_of(store: Store, kind: str, **settings: Any) -> Batch:
    """The first batch of the task of a kind: many micro-batches, masks among its candidates."""
    config = Train(**{**SETTINGS, "tasks": {kind: 1.0}, **settings})
    steps = Steps(store, config, Ranks(), layout="padded", pad_id=0)
    return next(steps.stream(0, 1, threads=1, device=torch.device("cpu")))


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


def cached(encoder: Encoder, batch: Batch, keep: int) -> tuple[float, dict[str, torch.Tensor]]:
    encoder.zero_grad(set_to_none=True)
    chunks = Chunks(lambda m: m.embed(encoder), batch.micro, seed=7, keep=keep)
    args = (batch.query, batch.positive, batch.hard, batch.sides)
    out, gradient = value_and_grad(
        chunks.forward(), *args, dims=encoder.dims, config=Train(temperature=0.05)
    )
    chunks.backward(gradient)
    return out.loss.item(), gradients(encoder)


@pytest.mark.parametrize("kind", ["retrieval", "sts", "topics"])
def test_it_is_the_gradient_of_the_whole_batch(
    make_store: Callable[..., Store], make_encoder: Callable[..., Encoder], kind: str
) -> None:
    """Against one graph over the same chunks with the same dropout; MRL, masks, hard negatives."""
    encoder = make_encoder(dropout=0.2).double().train()
    store = make_store(3, 60, copies=6)
    batch = batch_of(store, kind)
    n = len(batch.micro)
    assert n >= 3 and (kind == "sts" or len(set(batch.sides.positive_key.tolist())) < 24)
    parts = []
    for i, micro in enumerate(batch.micro):
        torch.manual_seed(seed_of(7, i))
        parts.append(encoder(micro.ids, micro.mask, micro.prompt_len))
    out = compute(
        torch.cat(parts), batch.query, batch.positive, batch.hard, batch.sides,
        dims=encoder.dims, config=Train(temperature=0.05),
    )  # fmt: skip
    encoder.zero_grad(set_to_none=True)
    out.loss.backward()
    want = gradients(encoder)
    assert len(want) > 30
    runs = [cached(encoder, batch, keep) for keep in (0, 1, n)]
    for loss, got in runs:
        assert loss == out.loss.item()
        for name, value in want.items():
            assert (got[name] - value).norm() <= 1e-10 * value.norm() + 1e-16, name
            assert torch.equal(got[name], runs[0][1][name]), "what is kept shows in the bits"
    single = cached(encoder.float(), batch, 0)[1]  # the same weights, float32 arithmetic
    for name, value in want.items():
        size = value.norm() + 1e-4 * max(v.norm() for v in want.values())
        assert (single[name] - value).norm() <= 1e-5 * size, name


def test_packed_is_padded_to_rounding(store: Store, make_encoder: Callable[..., Encoder]) -> None:
    """The same rows in the same micro-batches or others, and a chunk that counts nothing."""
    encoder = make_encoder().double().eval()
    found = []
    for layout in ("padded", "packed"):
        config = Train(**{**SETTINGS, "tasks": {"retrieval": 1.0}, "layout": layout})
        steps = Steps(store, config, Ranks(), layout=layout_of(encoder, config))
        (batch,) = steps.stream(0, 1, threads=1, device=torch.device("cpu"))
        assert all((m.cu_seqlens is None) == (layout == "padded") for m in batch.micro)
        found.append(cached(encoder, batch, 1))
        assert sum(int(n.sum()) for _, n in (m.flat() for m in batch.micro)) == batch.filled.tokens
        chunks = Chunks(lambda m: m.embed(encoder), batch.micro, seed=7, keep=0, empty=2)
        assert len(chunks.forward()) == len(batch.filled.rows)
    (loss, want), (other, got) = found
    assert other == pytest.approx(loss, rel=1e-12)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12)
    assert layout_of(encoder, Train()) == "padded"


@pytest.mark.filterwarnings("default")  # the compiler's own: it looks at gradients of all tensors
@pytest.mark.skipif(os.environ.get("EMBKIT_TEST_FULL") != "1", reason="full test run: a compiler")
def test_compiled_is_plain_to_rounding(store: Store, make_encoder: Callable[..., Encoder]) -> None:
    found = []
    for settings in ({}, {"compile": True}, {"compile": True, "graph_memory": 0.0}):
        encoder = make_encoder(dropout=0.1).train()
        config = Train(**{**SETTINGS, **settings})
        step = Step(encoder, config, Optimizer(encoder, config))
        found.append([step.run(batch_of(store, "retrieval"), Clock(Profile())) for _ in range(2)])
    for a, b, c in zip(*found, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert c.loss == pytest.approx(b.loss, rel=1e-6)
        assert c.norm == pytest.approx(b.norm, rel=1e-5)


def test_forgetting_the_seed_would_be_seen(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder(dropout=0.2).train()
    batch = batch_of(store, "retrieval")
    want = cached(encoder, batch, 99)[1]
    monkeypatch.setattr("embkit.train.gradcache.reseed", lambda seed: None)
    name = "projection.weight"
    assert (cached(encoder, batch, 0)[1][name] - want[name]).norm() > 0.01 * want[name].norm()


def test_operations_are_linear_in_the_chunks(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards and one backward a chunk, one loss a batch: every operator is counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls, losses = 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.calls += 1
            self.losses += "infonce_fused" in str(func)
            return func(*args, **(kwargs or {}))

    encoder = make_encoder().train()
    found = []
    for budget in (160, 80, 40, 20):
        batch = batch_of(store, "retrieval", token_budget=budget)
        with Count() as count:
            cached(encoder, batch, 0)
        assert count.losses == 1
        found.append((len(batch.micro), count.calls))
    assert found[-1][0] > 5 * found[0][0]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(found, found[1:], strict=False)]
    assert max(slopes) < 1.1 * min(slopes), found


def test_memory_decides_what_is_kept_and_no_bit(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept_graphs([50], 10**9, 0.0) == 1
    assert kept_graphs([50, 40, 30], 2, 140.0) == 2
    assert kept_graphs([50, 40, 30], 2, 139.0) == 1
    assert kept_graphs([50, 40, 30], 2, 240.0) == 3
    weights, forwards = [], []
    for memory in (0.0, 1e-3, 8.0):
        encoder = make_encoder(dropout=0.1).train()
        real, calls = encoder.forward, [0]

        def counted(*args: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls[0] += 1
            return real(*args)

        encoder.forward = counted  # type: ignore[method-assign]
        config = Train(**{**SETTINGS, "graph_memory": memory})
        step = Step(encoder, config, Optimizer(encoder, config))
        for _ in range(2):
            step.run(batch_of(store, "retrieval"), Clock(Profile()))
        weights.append(torch.cat([p.detach().reshape(-1) for p in encoder.parameters()]))
        forwards.append(calls[0])
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert forwards[0] == 2 * forwards[2] and forwards[2] < forwards[1] < forwards[0]
    assert graph_bytes(encoder.backbone.config) == 4 * 2 * (11 * 32 + 3 * 64 + 8)


def test_a_loss_that_is_no_number_updates_nothing(
    store: Store, make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make_encoder().train()
    config = Train(**SETTINGS)
    step = Step(encoder, config, Optimizer(encoder, config))
    real = one_step.value_and_grad

    def broken(*args: Any, **options: Any) -> Any:
        out, gradient = real(*args, **options)
        out.loss.fill_(float("inf"))
        return out, gradient

    monkeypatch.setattr(one_step, "value_and_grad", broken)
    before = [p.detach().clone() for p in encoder.parameters()]
    done = step.run(batch_of(store, "retrieval"), Clock(Profile()))
    assert done.loss == float("inf") and done.norm != done.norm
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert all(p.grad is None for p in encoder.parameters())
