"""The token budget that is found: as much as fits, written down, and kept by runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from embkit.container import read_manifest
from embkit.data import Store
from embkit.errors import CorruptError, UsageError
from embkit.model import Encoder
from embkit.recipe import Train
from embkit.train import Callback, budget, prefinetune

SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 12, "lr": 2e-3, "checkpoint_every": 2}


@pytest.mark.parametrize("start", [1, 3, 64])
def test_the_largest_is_found_to_an_eighth(start: int) -> None:
    for limit in (*range(start, 40 + start), 1000, 12345, 10**7):
        tried: list[int] = []

        def fits(n: int, limit: int = limit, tried: list[int] = tried) -> bool:
            tried.append(n)
            return n <= limit

        found = budget.largest(fits, start=start, most=10**6)
        assert found <= limit and found > min(limit, 10**6) * 8 / 9 - 1
        assert len(tried) < 30 and max(tried) <= 10**6
    assert budget.largest(lambda n: n <= 2, start=3, most=100) == 0


@contextmanager
def limited(room: int) -> Iterator[list[int]]:
    """Memory for graphs runs out: what autograd keeps is counted as it is kept."""
    used = [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        used[0] += tensor.numel() * tensor.element_size()
        if used[0] > room:
            raise torch.OutOfMemoryError("out of room")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        yield used


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_it_is_the_most_that_the_memory_holds(
    make_encoder: Callable[..., Encoder], layout: str
) -> None:
    """A limit on a real forward and backward; nothing of the trials stays."""
    encoder = make_encoder(dropout=0.1).train()
    config = Train(batch_size=512, layout=layout)
    packed = layout == "packed"
    with limited(1 << 40) as one:
        budget.trial(encoder, 20, 20, packed=packed)
    room = 37 * one[0]

    def fits(work: Callable[[], None]) -> bool:
        try:
            with limited(room):
                work()
        except torch.OutOfMemoryError:
            return False
        return True

    state = torch.get_rng_state()
    weights = {n: p.clone() for n, p in encoder.state_dict().items()}
    found = budget.probe(config, encoder, 20, fits)
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(weights[n], p) for n, p in encoder.state_dict().items())
    assert found % 20 == 0 and 32 * 20 <= found <= 60 * 20
    with limited(room):
        budget.trial(encoder, found, 20, packed=packed)
    with pytest.raises(torch.OutOfMemoryError), limited(room):
        budget.trial(encoder, found * 9 // 8 + 20, 20, packed=packed)
    assert budget.probe(Train(batch_size=7), encoder, 20, fits) == 14 * 20, "all rows there are"
    with pytest.raises(UsageError, match=r"(?s)A text of 20 tokens does not fit.*graph_memory"):
        budget.probe(config, encoder, 20, lambda work: False)
    with pytest.raises(UsageError, match="sharded weights"):
        budget.probe(Train(sharding="shard"), encoder, 20, fits)


def test_room_is_left_for_what_a_step_needs_beside_it(
    make_encoder: Callable[..., Encoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's own counters, played by what autograd keeps on the CPU."""
    encoder = make_encoder().train()
    with limited(1 << 40) as one:
        budget.trial(encoder, 30 * 20, 20)
    config = Train(batch_size=512, graph_memory=4 * one[0] / 2**30, ema=0.9)
    rest, peak = budget.reserved(config, encoder), [0]
    trained = sum(p.numel() for p in encoder.parameters())
    assert rest == 12 * trained + 4 * one[0] + 16 * 1024 * 32
    room = int((rest + one[0]) / 0.9) + 9
    real = budget.trial

    def trial(*args: Any, **options: Any) -> None:
        with limited(room) as used:
            real(*args, **options)
        peak[0] = used[0]

    counters: dict[str, Any] = {
        "empty_cache": lambda: None, "memory_reserved": lambda device: 9,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: (room - 9, 0),
        "max_memory_allocated": lambda device: peak[0],
    }  # fmt: skip
    for name, value in counters.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(budget, "trial", trial)
    found = budget.probe(config, encoder, 20)
    assert 27 * 20 <= found <= 30 * 20
    with pytest.raises(UsageError, match="does not fit beside"):
        budget.probe(Train(graph_memory=9 * one[0] / 2**30), encoder, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu(make_encoder: Callable[..., Encoder]) -> None:
    """A limit that the driver knows nothing of: trials run out of memory, and it is found."""
    encoder, device = make_encoder().to("cuda").train(), torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((1 << 30) / total)
    try:
        found = budget.probe(Train(batch_size=1 << 20, graph_memory=0.0), encoder, 32)
        budget.trial(encoder, found, 32)
        with pytest.raises(torch.OutOfMemoryError):
            budget.trial(encoder, 2 * found, 32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_trial_is_a_step_in_training(make_encoder: Callable[..., Encoder]) -> None:
    """Dropout keeps its masks, recomputed blocks nothing, whatever mode the encoder is in."""
    used = {}
    for name, settings in (
        ("plain", {}), ("dropout", {"dropout": 0.1}), ("again", {"gradient_checkpointing": True}),
    ):  # fmt: skip
        for training in (False, True):
            encoder = make_encoder(**settings).train(training)
            with limited(1 << 40) as one:
                budget.trial(encoder, 400, 20)
            assert used.setdefault(name, one[0]) == one[0] and encoder.training == training
    assert used["dropout"] > used["plain"] > used["again"]


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, step: int, line: Any, speed: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt


def test_a_run_keeps_what_it_found(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path, monkeypatch: Any
) -> None:
    """Stopped before and after its first checkpoint, on machines that would find other numbers."""
    encoder = make_encoder(dropout=0.1)
    prefinetune(encoder, store, out=tmp_path / "given", **SETTINGS, token_budget=150)
    monkeypatch.setattr(budget, "CPU_TOKENS", 150)
    out, options = tmp_path / "run", {**SETTINGS, "token_budget": 0}
    with pytest.raises(KeyboardInterrupt):
        prefinetune(encoder, store, out=out, callbacks=[StopAt(1)], **options)
    monkeypatch.setattr(budget, "CPU_TOKENS", 70)
    with pytest.raises(KeyboardInterrupt):
        prefinetune(encoder, store, out=out, callbacks=[StopAt(5)], **options)
    (folder,) = tmp_path.glob(".partial-run-*")
    was = (folder / budget.FILE).read_bytes()
    (folder / budget.FILE).write_bytes(b"{}")
    with pytest.raises(CorruptError, match="token budget"):
        prefinetune(encoder, store, out=out, **options)
    (folder / budget.FILE).write_bytes(was)
    prefinetune(encoder, store, out=out, **options)
    for name in ("log.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "given" / name).read_bytes(), name
    assert read_manifest(out)["token_budget"] == 150 and not (out / budget.FILE).exists()
    state = json.loads((out / "checkpoints/step-000006/state.json").read_text())
    assert state["token_budget"] == 150 and state["config"]["token_budget"] == 0
    prefinetune(encoder, store, out=tmp_path / "other", **options)
    padded = [
        [json.loads(x)["padded"] for x in (p / "log.jsonl").read_text().splitlines()]
        for p in (out, tmp_path / "other")
    ]
    assert padded[0] != padded[1], "another budget is another layout"
