"""The bench harness: rivals in the same run, equal results first, medians of interleaved rounds.

A case is some work, our way of doing it and the rivals' ways. The harness runs each once, asserts
that the results agree, then times them in turn, round by round, so that a machine whose speed
drifts slows all of them alike. `embkit bench GROUP` and the files under benches/ both use it.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embkit.errors import EmbkitError, UsageError, nearest

GROUPS = (
    "store", "dedup", "mine", "kernels", "train", "recipes", "synth", "soup", "evaluate",
    "adapters",
)  # fmt: skip


@dataclass
class Sample:
    """One timed call: seconds of CPU (user, system, children's) and of wall, bytes at the peak."""

    cpu: float
    wall: float
    peak: int


@dataclass
class Reported:
    """What a way returns that ran, and was measured, in another process."""

    value: Any
    sample: Sample


@dataclass(kw_only=True)
class Case:
    """One row to be: the work, ours and the rivals.

    Attributes:
        name: row name, e.g. ``"mine.exact.64k"``.
        unit: unit of the rate, e.g. ``"queries/s"``.
        work: units done by one call.
        ours: does the work and returns a result.
        rivals: name to callable doing the same work; one that is not installed is left out.
        check: asserts that a rival's result equals ours; called before any timing.
        limit: name of a physical limit and its rate in the same unit, measured in this run.
        floor, goal: wanted rate or ratio, as the docs state them.
        facts: further fields of the row (n, d, k, isa, data ...).
        skipped: rivals that cannot run here, with the reason.
        measure: ``"rate"``: the value is work per CPU-second; ``"cpu"`` or ``"wall"``: the time of
            one unit of work, as the unit says (``"ns/row"``, ``"ms"``). A ratio above 1 means that
            ours is faster in either.
        derive: further facts, from the median sample of each way.
        score: for a row that is no speed: the value, from the result of one call. The ways are
            still timed, and `peer_value` is the score of a rival's result.
        rounds: timed rounds, for work that is too long for the usual number.
        two_threads: whether a rate is measured with two threads as well.
        close: gives back what the case holds: files, processes.
    """

    name: str
    unit: str
    work: float
    ours: Callable[[], Any]
    rivals: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    check: Callable[[Any, Any], None] | None = None
    limit: tuple[str, float] | None = None
    floor: str | None = None
    goal: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    measure: str = "rate"
    derive: Callable[[Mapping[str, Sample]], Mapping[str, Any]] | None = None
    score: Callable[[Any], float] | None = None
    rounds: int | None = None
    two_threads: bool = True
    close: Callable[[], None] | None = None

    def value(self, sample: Sample) -> float:
        """A sample in the case's unit."""
        if self.measure == "rate":
            return self.work / sample.cpu
        seconds = sample.cpu if self.measure == "cpu" else sample.wall
        return seconds / self.work * _PER_SECOND[self.unit.split("/")[0]]


# A slow rival's rounds are long, and long rounds vary less: after a minute three are enough.
_LONG = 60.0
_FEW_ROUNDS = 3
_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}


@dataclass(kw_only=True)
class Row:
    """One result; `value` and `peer_value` are work per CPU-second with one thread, or times."""

    name: str
    value: float
    unit: str
    peer: str | None
    peer_value: float | None
    ratio: float | None
    wall: float
    wall2: float | None
    peak_bytes: int
    peer_peak_bytes: int | None
    limit: str | None
    limit_share: float | None
    floor: str | None
    goal: str | None
    facts: Mapping[str, Any]
    machine: str
    commit: str
    versions: Mapping[str, str]


def run_case(case: Case, *, rounds: int = 5, threads: int = 1) -> list[Row]:
    """Measure a case; one row per rival, or one row without a peer.

    Args:
        rounds: interleaved rounds whose median counts; three once they have taken a minute.
        threads: threads of the timed rounds; the second wall figure uses two.
    """
    ways = {"embkit": case.ours, **case.rivals}
    with _threads(threads):
        first = {name: _value(way()) for name, way in ways.items()}
        if case.check is not None:
            for name in case.rivals:
                try:
                    case.check(first["embkit"], first[name])
                except AssertionError as error:
                    raise EmbkitError(
                        f"{case.name}: the results of embkit and {name} differ: {error}"
                    ) from error
        scores = {name: case.score(found) for name, found in first.items()} if case.score else {}
        first.clear()
        samples: dict[str, list[Sample]] = {name: [] for name in ways}
        begun = time.monotonic()
        for done in range(case.rounds or rounds):
            if done >= _FEW_ROUNDS and time.monotonic() - begun > _LONG:
                break
            for name, way in ways.items():
                samples[name].append(measure(way))
    wall2 = None
    if case.two_threads and case.measure == "rate" and not scores and (os.cpu_count() or 1) > 1:
        with _threads(2):
            twice = [measure(case.ours).wall for _ in range(case.rounds or rounds)]
            wall2 = case.work / statistics.median(twice)
    medians = {name: _median(found) for name, found in samples.items()}
    facts = dict(case.facts) | dict(case.derive(medians) if case.derive else {})
    ours = medians["embkit"]
    value = scores.get("embkit", case.value(ours))
    rows = []
    for peer in case.rivals or (None,):
        theirs = medians[peer] if peer else None
        peer_value = scores.get(peer, case.value(theirs)) if peer and theirs else None
        ratio = None
        if peer_value and not scores:
            ratio = value / peer_value if case.measure == "rate" else peer_value / value
        rows.append(
            Row(
                name=case.name,
                value=value,
                unit=case.unit,
                peer=peer,
                peer_value=peer_value,
                ratio=ratio,
                wall=case.work / ours.wall,
                wall2=wall2,
                peak_bytes=ours.peak,
                peer_peak_bytes=theirs.peak if theirs else None,
                limit=case.limit[0] if case.limit else None,
                limit_share=value / case.limit[1] if case.limit else None,
                floor=case.floor,
                goal=case.goal,
                facts=facts,
                machine=machine(),
                commit=commit(),
                versions=versions(),
            )
        )
    return rows


def run_group(group: str, *, quick: bool = False, only: str = "") -> Iterator[Row | str]:
    """Yield the rows of a group as they are measured, and a line for each that cannot run.

    Args:
        only: run the cases whose function has this in its name, e.g. ``"exact"``.
    """
    if group not in GROUPS:
        raise UsageError(f"No bench group {group!r}; {nearest(group, GROUPS)}")
    module = importlib.import_module(f"embkit.bench.{group}")
    makers = [make for make in module.CASES if only in make.__name__]
    if not makers:
        names = ", ".join(make.__name__ for make in module.CASES)
        raise UsageError(f"No case of group {group!r} has {only!r} in its name.", fix=names)
    for make in makers:
        try:
            case = make(quick)
        except ImportError as error:
            yield f"{make.__name__}: not run, {error}"
            continue
        for rival, reason in case.skipped.items():
            yield f"{case.name}: without {rival}, {reason}"
        try:
            yield from run_case(case, rounds=3 if quick else 5)
        finally:
            if case.close is not None:
                case.close()


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table; with the time of a call where rows tell it (fact `ms`)."""
    timed = any("ms" in r.facts for r in rows)
    names = ["row", "embkit", "unit", "peer", "peer's", "ratio", "of limit", "peak"]
    lines = [_line(names + ["time"] * timed), "|" + "---|" * (len(names) + timed)]
    for r in rows:
        cells = [
            r.name,
            f"{r.value:.4g}",
            r.unit,
            r.peer or "-",
            f"{r.peer_value:.4g}" if r.peer_value else "-",
            f"{r.ratio:.2f}x" if r.ratio else "-",
            f"{r.limit_share:.0%} of {r.limit}" if r.limit_share else "-",
            f"{r.peak_bytes / 1e6:.0f} MB",
        ]
        if timed:
            ms = r.facts.get("ms", {})
            cells.append(f"{ms['embkit']:.4g} ms" if ms else "-")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def to_json(rows: list[Row]) -> str:
    """The rows as JSON (docs/benchmarks.md); the facts are fields of their own."""
    tables = [dataclasses.asdict(row) for row in rows]
    flat = [{k: v for k, v in t.items() if k != "facts"} | dict(t["facts"]) for t in tables]
    return json.dumps(flat, indent=1) + "\n"


def machine() -> str:
    """Processor, cores and memory in words, and the GPU when there is one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            x.split(":", 1)[1].strip()
            for x in cpuinfo.read_text().splitlines()
            if "model name" in x
        ]
        name = models[0] if models else name
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{name}, {len(os.sched_getaffinity(0))} cores, {pages / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def isa() -> str:
    """The vector extensions that matter here, as the processor reports them."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
    return next((name for name in known if name in flags), platform.machine())


def commit() -> str:
    """The commit of this checkout, or the installed version."""
    from embkit import __version__

    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists():
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return done.stdout.strip()
    return __version__


def versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    names = ("numpy", "torch", "triton", "transformers", "sentence-transformers", "faiss-cpu")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _median(samples: list[Sample]) -> Sample:
    return Sample(
        cpu=max(statistics.median(s.cpu for s in samples), 1e-9),
        wall=max(statistics.median(s.wall for s in samples), 1e-9),
        peak=max(s.peak for s in samples),
    )


def measure(way: Callable[[], Any]) -> Sample:
    """Time one call; a way that reports from another process is believed."""
    gc.collect()
    before = _reset_peak()
    cpu, wall = _cpu(), time.perf_counter()
    result = way()
    _synchronize()
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    if isinstance(result, Reported):
        return result.sample
    peak = _peak() - before
    del result
    return Sample(cpu, wall, max(peak, 0))


def peak_of(way: Callable[[], Any]) -> int:
    """Bytes by which one call raises the peak of resident memory."""
    return measure(way).peak


def _value(result: Any) -> Any:
    return result.value if isinstance(result, Reported) else result


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _reset_peak() -> int:
    """Reset the kernel's high-water mark of resident memory where it lets us; return bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Run with n threads: ours through EMBKIT_THREADS, torch's and BLAS's by their own switches."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch is not None else None
    old = os.environ.get("EMBKIT_THREADS")
    os.environ["EMBKIT_THREADS"] = str(n)
    if torch is not None:
        torch.set_num_threads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        if torch is not None and before is not None:
            torch.set_num_threads(before)
        if old is None:
            del os.environ["EMBKIT_THREADS"]
        else:
            os.environ["EMBKIT_THREADS"] = old
