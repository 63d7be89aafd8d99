"""A small tuner: a handful of launch parameters for each kernel, timed in a whole step.

Candidates are those that `_configs/<op>.json` lists under "candidates", or, for an op that lists
none, one step up and down in warps and stages of each kernel. A candidate that does not compile,
does not fit or changes the results is passed over. One kernel is tuned at a time, with the best of
those before it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from embkit import kernels
from embkit.bench import kernel_ways as ways
from embkit.bench.gpu_checks import provider, relative, using
from embkit.bench.kernel_clock import device, dtype, milliseconds
from embkit.bench.kernel_ways import Way
from embkit.kernels import _triton

ORDER = ("infonce", "mean_pool", "similarity", "cosent")
"""The costliest first: the time may not be enough for all."""

GAIN = 0.98
"""A candidate must take at most this share of the time to replace what is there."""


def workload(op: str, quick: bool) -> tuple[Way, tuple[Tensor, ...]] | None:
    """A forward and backward pass of the size that an op is tuned for; None for unknown ops."""
    rng = torch.Generator(device()).manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device(), generator=rng).to(dtype())

    b, width, dims = (5, 32, (16, 32)) if quick else (8192, 3072, (768, 1536, 3072))
    labels = torch.randint(0, 26, (b,), device=device(), generator=rng) / 5
    count, length = (3, 9) if quick else (2048, 512)
    lengths = torch.randint(length // 2, length + 1, (count,), device=device(), generator=rng)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    tokens = int(cu[-1])

    def infonce(q: Tensor, p: Tensor) -> Tensor:
        return ways.infonce_ours(q, p, dims, 0.05)

    def pool(x: Tensor) -> Tensor:
        packed = kernels.mean_pool(x.flatten(0, 1)[:tokens], cu_seqlens=cu)
        return (kernels.mean_pool(x, lengths=lengths) + packed).square().sum()

    def cosent(a: Tensor, b: Tensor) -> Tensor:
        return kernels.cosent((a, b), labels, dims)[0]

    def similarity(q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return (getattr(kernels, "mrl_similarity")(q, p, dims, k=min(100, b))[0],)  # noqa: B009

    made: dict[str, Callable[[], tuple[Way, tuple[Tensor, ...]]]] = {
        "infonce": lambda: (ways.with_gradients(infonce), (rows(b, width), rows(b, width))),
        "mean_pool": lambda: (ways.with_gradients(pool), (rows(count, length, width // 2),)),
        "cosent": lambda: (ways.with_gradients(cosent), (rows(b, width), rows(b, width))),
        "similarity": lambda: (similarity, (rows(b, width), rows(b, width))),
    }
    return made[op]() if op in made else None


def candidates(op: str, key: str, current: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Launch parameters to try beside the current ones."""
    listed = _triton.candidates(op, key)
    warps, stages = current.get("num_warps", 4), current.get("num_stages", 1)
    near = itertools.product(
        [w for w in (warps // 2, warps, warps * 2) if 1 <= w <= 8],
        [s for s in (stages - 1, stages, stages + 1) if 1 <= s <= 5],
    )
    for change in listed or [{"num_warps": w, "num_stages": s} for w, s in near]:
        if (tried := {**current, **change}) != current:
            yield tried


def tune(*, quick: bool = False, write: bool = False) -> Iterator[dict[str, Any]]:
    """Tune every op that runs in Triton here; yield a line for each kernel as it is done.

    Args:
        quick: tiny inputs, one candidate of one kernel an op: a dry run, which never writes.
        write: store what was found in `_configs` under the GPU's name.
    """
    ops = sorted((path.stem for path in _triton.CONFIGS.glob("*.json")), key=_order)
    for op in ops:
        choice, label = provider(op, device())
        work = workload(op, quick) if choice == "triton" else None
        if work is None:
            yield {"op": op, "key": "-", "text": f"not tuned: {label}"}
            continue
        way, leaves = work
        with using("triton"):
            best: dict[str, dict[str, Any]] = {}
            listed = [key for key in _triton.keys(op) if _triton.candidates(op, key)]
            for key in (listed or _triton.keys(op))[: 1 if quick else None]:
                with _triton.replaced(op, **best):
                    found = _tune_one(op, key, way, leaves, quick)
                if found["best"] is not None:
                    best[key] = found["best"]
                yield found
        if write and best and not quick:
            _store(op, best)


def _order(op: str) -> tuple[int, str]:
    return (ORDER.index(op) if op in ORDER else len(ORDER), op)


def _tune_one(
    op: str, key: str, way: Way, leaves: tuple[Tensor, ...], quick: bool
) -> dict[str, Any]:
    current = _triton.config(op, key, device())
    want = way(*leaves)
    times = {json.dumps(current): _time(way, leaves, quick)}
    passed: dict[str, str] = {}
    for tried in itertools.islice(candidates(op, key, current), 1 if quick else 12):
        with _triton.replaced(op, **{key: tried}):
            try:
                errors = [relative(a, b) for a, b in zip(way(*leaves), want, strict=True)]
                if max(errors) > 1e-2:
                    raise ValueError(f"results differ by {max(errors):.1e}")
                times[json.dumps(tried)] = _time(way, leaves, quick)
            except Exception as error:  # does not compile, or does not fit
                passed[json.dumps(tried)] = f"{type(error).__name__}: {error}"[:200]
    now, least = times[json.dumps(current)], min(times, key=lambda config: times[config])
    better = times[least] < GAIN * now
    return {
        "op": op,
        "key": key,
        "ms": times,
        "passed_over": passed,
        "best": json.loads(least) if better else None,
        "text": f"{now:.3f} ms"
        + (f" -> {times[least]:.3f} ms with {least}" if better else ", nothing better")
        + f" ({len(times)} timed, {len(passed)} passed over)",
    }


def _time(way: Way, leaves: tuple[Tensor, ...], quick: bool) -> float:
    return 0.0 if quick else milliseconds(way, [leaves])


def _store(op: str, best: dict[str, dict[str, Any]]) -> None:
    path = _triton.CONFIGS / f"{op}.json"
    table = json.loads(path.read_text())
    name, arch = _triton.gpu_names(None)
    entry = table.setdefault(name, {"arch": arch})
    entry.update(best)
    path.write_text(json.dumps(table, indent=1) + "\n")
