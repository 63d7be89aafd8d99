"""Clock of the kernel benches: medians of CUDA events over rotated inputs, peaks, the roofline.

On CPU a way is called once and the harness measures it as it measures everything. On a GPU each
call of a way from here is a measurement of its own: warm-up, then the median over enough launches,
on inputs that rotate through more than the L2 cache holds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from embkit.bench import Reported, Sample
from embkit.bench.kernel_ways import Way

BUDGET_MS = 100.0
"""Length of one measurement on a GPU."""

Make = Callable[[torch.Generator], tuple[Tensor, ...]]


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """bf16 on a GPU, float32 on a CPU, which has no units for bf16."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def inputs(make: Make) -> list[tuple[Tensor, ...]]:
    """As many random sets as it takes to pass the L2 cache three times; one on CPU.

    Args:
        make: draws one set with a generator of `device()`.
    """
    rng = torch.Generator(device()).manual_seed(0)
    sets = [make(rng)]
    if device().type == "cuda":
        held = sum(x.numel() * x.element_size() for x in sets[0])
        cache = torch.cuda.get_device_properties(device()).L2_cache_size
        sets += [make(rng) for _ in range(min(15, 3 * cache // max(1, held)))]
    return sets


class Timed:
    """A way as the harness calls it: a call on CPU, a measurement of many calls on a GPU."""

    def __init__(self, way: Way, sets: Sequence[tuple[Tensor, ...]]) -> None:
        self.way, self.sets = way, sets

    def once(self) -> tuple[Tensor, ...]:
        """The results alone."""
        return self.way(*self.sets[0])

    def __call__(self) -> Any:
        if not self.sets[0][0].is_cuda:
            return self.once()
        return Reported(self.once(), gpu_sample(self.way, self.sets))


def milliseconds(way: Way, sets: Sequence[tuple[Tensor, ...]]) -> float:
    """Median time of one call: of a GPU's events, or CPU time, which a busy machine spoils less."""
    if sets[0][0].is_cuda:
        return gpu_sample(way, sets).wall * 1e3
    times = []
    for _ in range(6):
        begun = time.process_time()
        way(*sets[0])
        times.append(time.process_time() - begun)
    return statistics.median(times[1:]) * 1e3


def gpu_sample(way: Way, sets: Sequence[tuple[Tensor, ...]]) -> Sample:
    """Median seconds of a call on the GPU, and the bytes it allocates at its peak."""
    way(*sets[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way(*sets[-1])
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    once = statistics.median(_events(way, sets, 3))
    times = _events(way, sets, min(200, max(5, int(BUDGET_MS / max(once, 1e-3)))))
    seconds = statistics.median(times) / 1e3
    return Sample(cpu=seconds, wall=seconds, peak=peak)


def _events(way: Way, sets: Sequence[tuple[Tensor, ...]], count: int) -> list[float]:
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i, (begin, end) in enumerate(pairs):
        begin.record()
        way(*sets[i % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


@functools.cache
def gemm_rate() -> float:
    """FLOP/s of a square matrix product of this device's dtype, random data, in this process."""
    n = 8192 if device().type == "cuda" else 1024
    a = torch.randn(n, n, device=device()).to(dtype())
    return 2 * n**3 / milliseconds(lambda x: (x @ x,), [(a,)]) * 1e3


@functools.cache
def copy_rate() -> float:
    """Bytes per second of a copy, read and written, several times larger than any cache."""
    size = (4 << 30) if device().type == "cuda" else (256 << 20)
    a = torch.empty(size, dtype=torch.uint8, device=device()).random_()
    b = torch.empty_like(a)
    return 2 * size / milliseconds(lambda x: (b.copy_(x),), [(a,)]) * 1e3


def comparable(
    ours: Timed, rivals: Mapping[str, Timed], check: Callable[[Any, Any], None]
) -> tuple[dict[str, Timed], dict[str, str]]:
    """Try each rival once: the ones that run and agree with ours, and why the others do not."""
    want = ours.once()
    able, unable = {}, {}
    for name, way in rivals.items():
        try:
            found = way.once()
        except (ImportError, ValueError) as error:
            unable[name] = str(error)
            continue
        except Exception as error:  # a compiler or a driver that gives up on a rival
            first = (str(error).strip().splitlines() or [""])[0]
            unable[name] = f"{type(error).__name__}: {first[:200]}"
            continue
        try:
            check(want, found)
        except AssertionError as error:
            unable[name] = f"its results differ: {error}"
        else:
            able[name] = way
        del found
    return able, unable
