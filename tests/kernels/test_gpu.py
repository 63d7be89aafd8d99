"""On a GPU: every op and option at ragged sizes against float64, twice, in three dtypes.

`make gpu` does the same at real sizes. Without a GPU the rest of this file walks through that
command in small, so that its first run on one does not end at a typo.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("embkit") is None:
    sys.path.insert(0, str(REPO / "python"))

from embkit import bench  # noqa: E402
from embkit.bench import gpu, gpu_checks, gpu_tune, kernel_clock, kernel_ways  # noqa: E402
from embkit.bench import kernels as cases  # noqa: E402
from embkit.kernels import _triton  # noqa: E402

DIMS = (16, 48, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["infonce", "mean_pool", "others"])
def test_ragged_sizes(op: str, dtype: torch.dtype) -> None:
    checks = list(gpu_checks.all_checks(gpu_checks.RAGGED, torch.device("cuda"), dtype, op))
    assert checks
    wrong = [f"{c.name} [{c.provider}]: {problem}" for c in checks for problem in c.problems]
    assert not wrong, "\n".join(wrong)


def test_checks_in_small(tmp_path: Path) -> None:
    """The part `checks` as its process runs it; on this device, with the kernels that run here."""
    gpu.child("checks", tmp_path / "lines", quick=True)
    found = [value for kind, value in gpu.results(tmp_path / "lines") if kind == "checks"]
    assert len(found) > 20
    assert not [f"{c['name']}: {c['problems']}" for c in found if c["problems"]]
    names = {c["name"].split(",")[0] for c in found}
    assert {"infonce", "mean_pool", "cosent", "spread_out"} <= names
    assert all(c["errors"] for c in found)


def wrong_by(factor: float) -> Any:
    def step(x: Tensor) -> list[Tensor]:
        return [x * (2.0 if x.dtype == torch.float64 else factor)]

    return step


def test_checks_find_what_is_wrong() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    limits = lambda want: {"loss": 1e-5}  # noqa: E731
    assert not gpu_checks.compare("ok", "infonce", wrong_by(2.0), [x], limits).problems
    (problem,) = gpu_checks.compare("off", "infonce", wrong_by(2.001), [x], limits).problems
    assert problem == "loss is off by 5.0e-04, allowed 1.0e-05"
    assert gpu_checks.compare("nan", "infonce", wrong_by(float("nan")), [x], limits).problems
    peer = lambda x: [x * 2]  # noqa: E731
    loose = lambda want: {"grad": 1e-2}  # noqa: E731
    (problem,) = gpu_checks.compare("worse", "x", wrong_by(2.001), [x], loose, peer).problems
    assert problem == "grad is off by 5.0e-04, torch by 5.0e-06"

    calls = iter(range(1, 100))
    moving = lambda x: [x * 2 + 1e-7 * next(calls)]  # noqa: E731
    (problem,) = gpu_checks.compare("moves", "infonce", moving, [x], limits).problems
    assert "values differ in a second run" in problem

    def raises(x: Tensor) -> list[Tensor]:
        raise RuntimeError("no such thing")

    (problem,) = gpu_checks.compare("raises", "infonce", raises, [x], limits).problems
    assert problem == "RuntimeError: no such thing"


def test_the_independent_formula() -> None:
    rng = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, 64, generator=rng, dtype=torch.float64) for n in (10, 14))
    plain = kernel_ways.with_gradients(lambda a, b: kernel_ways.infonce_eager(a, b, DIMS, 0.1))
    for got, want in zip(
        gpu_checks.exact_infonce(q, p, DIMS, 0.1, rows=3), plain(q, p), strict=True
    ):
        # The eager one casts its scores to float32.
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-7)


def test_the_segment_formulation_is_the_same_loss() -> None:
    rng = torch.Generator().manual_seed(0)
    q, p = (torch.randn(n, 64, generator=rng) for n in (10, 14))
    both = [
        kernel_ways.with_gradients(lambda a, b, f=f: f(a, b, DIMS, 0.05))(q, p)
        for f in (kernel_ways.infonce_segments, kernel_ways.infonce_eager)
    ]
    for got, want in zip(*both, strict=True):
        assert gpu_checks.relative(got, want) < 1e-6


def test_rivals_that_cannot_run_say_why() -> None:
    x = torch.ones(2)

    def raises(error: Exception) -> Any:
        def way(x: Tensor) -> Any:
            raise error

        return way

    ways = {
        "good": lambda x: (x + 1,),
        "missing": raises(ImportError("not installed")),
        "small": raises(ValueError("as many passages")),
        "crashes": raises(RuntimeError("out of registers\nand more")),
        "asserts": raises(AssertionError("is_cuda")),
        "wrong": lambda x: (x + 2,),
    }
    timed = {name: kernel_clock.Timed(way, [(x,)]) for name, way in ways.items()}
    able, unable = kernel_clock.comparable(timed["good"], timed, cases._close)
    assert list(able) == ["good"]
    assert unable == {
        "missing": "not installed",
        "small": "as many passages",
        "crashes": "RuntimeError: out of registers",
        "asserts": "AssertionError: is_cuda",
        "wrong": "its results differ: relative difference 3.33e-01",
    }


class Event:
    """Stands for a CUDA event: the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: Any) -> float:
        return 1e3 * (end.time - self.time)


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, inputs in turn and peaks, with a GPU that is a clock and two numbers."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1700)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(kernel_clock, "BUDGET_MS", 40.0)
    seen: list[float] = []

    def way(x: Tensor) -> tuple[Tensor, ...]:
        seen.append(float(x[0]))
        time.sleep(0.004 if len(seen) % 9 else 0.03)
        return (x,)

    sets = [(torch.full((2,), float(i)),) for i in range(3)]
    sample = kernel_clock.gpu_sample(way, sets)
    assert 0.004 <= sample.wall < 0.02 and sample.peak == 700
    assert seen[-3:] in ([0, 1, 2], [1, 2, 0], [2, 0, 1])


def test_enough_inputs_to_pass_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 1000

    class Cuda(kernel_clock.torch.Generator):  # a CPU generator under a GPU's name
        def __new__(cls, device: Any) -> Any:
            return super().__new__(cls)

    monkeypatch.setattr(kernel_clock, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch, "Generator", Cuda)
    sets = kernel_clock.inputs(lambda rng: (torch.randn(125, generator=rng),))
    assert len(sets) * 500 > 3 * 1000 and not torch.equal(sets[0][0], sets[1][0])


def test_a_tuner_that_finds_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = {"default": {"forward": {"BLOCK": 64, "num_warps": 4}}}
    table["candidates"] = {"forward": [{"BLOCK": 32}, {"BLOCK": 16}, {"BLOCK": 128}, {"BLOCK": 8}]}
    (tmp_path / "toy.json").write_text(json.dumps(table))
    monkeypatch.setattr(_triton, "CONFIGS", tmp_path)
    monkeypatch.setattr(_triton, "gpu_names", lambda index: ("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(gpu_tune, "provider", lambda op, device: ("triton", "triton"))
    _triton._table.cache_clear()

    def way(x: Tensor) -> tuple[Tensor, ...]:
        block = _triton.config("toy", "forward")["BLOCK"]
        if block == 128:
            raise RuntimeError("out of shared memory")
        return (x + (block == 8),)

    def block_as_time(way: Any, leaves: Any, quick: bool) -> float:
        return float(_triton.config("toy", "forward")["BLOCK"])

    monkeypatch.setattr(gpu_tune, "workload", lambda op, quick: (way, (torch.ones(3),)))
    monkeypatch.setattr(gpu_tune, "_time", block_as_time)
    (found,) = gpu_tune.tune(write=True)
    assert found["best"] == {"BLOCK": 16, "num_warps": 4}
    assert ["out of shared memory" in t or "results differ" in t
            for t in found["passed_over"].values()] == [True, True]  # fmt: skip
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["NVIDIA H200"] == {"arch": "sm_90", "forward": {"BLOCK": 16, "num_warps": 4}}
    assert stored["default"] == table["default"]
    _triton._table.cache_clear()


def test_neighbours_where_no_candidates_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "candidates", lambda op, key: [])
    tried = list(gpu_tune.candidates("toy", "k", {"B": 1, "num_warps": 8, "num_stages": 1}))
    pairs = [(t["num_warps"], t["num_stages"]) for t in tried]
    assert pairs == [(4, 1), (4, 2), (8, 2)] and all(t["B"] == 1 for t in tried)


def test_tuner_in_small(tmp_path: Path) -> None:
    """Every shipped table, with the kernels that run here."""
    gpu.child("tune", tmp_path / "lines", quick=True)
    found = [value for _, value in gpu.results(tmp_path / "lines")]
    assert {f["op"] for f in found} == {p.stem for p in _triton.CONFIGS.glob("*.json")}


def test_command_in_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Parts in processes of their own: rows, a table, JSON; and a part that is stopped."""
    out = tmp_path / "results.json"
    assert gpu.main(["--quick", "--parts", "infonce_768", "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert "kernels.infonce.768:" in text and "eager torch" in text
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert row["ms"]["embkit"] > 0 and row["floor_ms"] > 0 and row["commit"] and row["versions"]
    assert found["parts"]["infonce_768"]["ended"] == "done"
    page = out.with_suffix(".html").read_text()
    assert "<td>kernels.infonce.768</td>" in page and "<svg" in page and "http" not in page

    assert gpu.main(["--quick", "--parts", "cosent,tune", "--out", str(out), "--limit", "6"]) == 1
    found = json.loads(out.read_text())
    assert found["parts"]["tune"]["ended"] == "not run: no time was left"


def test_a_part_that_hangs_or_fails_is_told(tmp_path: Path) -> None:
    begun = time.monotonic()
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert gpu._run_part(slow, dict(os.environ), 5.0)["ended"] == "stopped after 5 s"
    assert time.monotonic() - begun < 20
    assert gpu._run_part([sys.executable, "-c", "raise SystemExit(3)"], {}, 9.0)["ended"] == (
        "ended with code 3"
    )


def test_half_a_line_is_left_out(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    lines.write_text('{"kind": "rows", "value": 1}\n{"kind": "ro')
    assert list(gpu.results(lines)) == [("rows", 1)]
    assert list(gpu.results(tmp_path / "none")) == []


def test_summary_names_every_failure() -> None:
    found = {
        "parts": {"checks": {"ended": "done"}, "tune": {"ended": "stopped after 9 s"}},
        "checks": [{"name": "a", "problems": ["off"]}, {"name": "b", "problems": []}],
        "tests": [{"summary": "1 failed", "problems": ["failed"]}],
    }
    text = gpu.summary(found)
    assert "checks: 1 of 2 passed" in text
    assert text.splitlines()[-3:] == [
        "FAILED tune: stopped after 9 s", "FAILED a: off", "FAILED tests: 1 failed",
    ]  # fmt: skip


def test_parts_cover_every_case() -> None:
    names = [make.__name__ for make in cases.CASES]
    for name in names:
        assert sum(part in name for part in gpu.PARTS) == 1, f"{name} is measured once"
    assert bench.GROUPS  # the harness that the parts use
