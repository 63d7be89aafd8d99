"""Shared by the kernel benches: devices, equal results before timing, figures beside the time.

    pytest benches/kernels/bench_*.py --benchmark-group-by=param:case,param:device

Every provider of a case gets the same leaves; its loss and gradients are compared with the
reference provider's before the clock starts. On CUDA each round ends with a synchronise.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Without an installed embkit the sources do: these benches need neither Rust nor its data path.
for package, folder in (("embkit", "python"), ("embkit_kernels", "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / folder))

Loss = Callable[..., Tensor]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that this machine has."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """compare(provider, reference, leaves, tolerance, **facts): check, then time forward+backward.

    `tolerance` bounds the relative L2 difference of the loss and of every gradient.
    """

    def step(f: Loss, leaves: Sequence[Tensor]) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in leaves]
        loss = f(*given)
        out = [loss.detach(), *torch.autograd.grad(loss, given)]
        if loss.is_cuda:
            torch.cuda.synchronize()
        return out

    def run(
        provider: Loss, reference: Loss, leaves: Sequence[Tensor], tolerance: float, **facts: Any
    ) -> None:
        got, want = step(provider, leaves), step(reference, leaves)
        for a, b in zip(got, want, strict=True):
            error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)
            assert error <= tolerance, f"results differ by {error:.1e}"
        if leaves[0].is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(provider, leaves)
            facts["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        benchmark.extra_info.update(facts, torch=torch.__version__, threads=torch.get_num_threads())
        benchmark.pedantic(step, args=(provider, leaves), rounds=7, warmup_rounds=2)

    return run
