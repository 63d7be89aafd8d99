"""`make gpu`: everything that needs a GPU, in one command with a time limit.

    python -m embkit.bench.gpu                    checks, tests, benches, tuner; under 8 minutes
    python -m embkit.bench.gpu --quick            the same path in small, on a CPU: a dry run
    python -m embkit.bench.gpu --parts checks,infonce --write

It needs torch, and triton for the kernels: no Rust, no installed embkit (PYTHONPATH=python is
enough). Rivals are used where they are installed; EMBKIT_WHEELS names a folder of wheels to take
them from. Each part is a process with a limit of its own, so that one that hangs or crashes costs
itself alone, and the JSON file holds whatever was measured so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parents[3]
LIMIT = 470.0
"""Seconds that all parts together may take: under 8 minutes with the start of Python."""

PARTS = {
    "checks": 120.0,
    "tests": 90.0,
    "infonce_3072": 60.0,
    "infonce_1024": 45.0,
    "infonce_768": 45.0,
    "infonce_65536": 60.0,
    "mean_pool": 60.0,
    "similarity": 30.0,
    "cosent": 30.0,
    "tune": 90.0,
}
"""Parts in order of importance, and the seconds that each may take."""

Emit = Callable[[str, dict[str, Any]], None]


def run_checks(emit: Emit, quick: bool) -> None:
    """Correctness and determinism at real sizes; in the interpreter for a dry run."""
    from embkit.bench import gpu_checks as checks
    from embkit.bench.kernel_clock import device, dtype

    for check in checks.all_checks(checks.TINY if quick else checks.FULL, device(), dtype()):
        emit("checks", dataclasses.asdict(check))
        state = "FAILED" if check.problems else "ok"
        errors = ", ".join(f"{what} {error:.1e}" for what, error in check.errors.items())
        print(f"  {state:6} {check.name} [{check.provider}]: {errors} ({check.seconds:.1f} s)")
        for problem in check.problems:
            print(f"         {problem}")


def run_tests(emit: Emit, quick: bool) -> None:
    """The tests that are marked gpu."""
    if not (tests := REPO / "tests" / "kernels").is_dir():
        print("  no tests here: not a checkout")
        return
    # Warnings are no errors: another host has other versions, and they warn of other things.
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default"]
    command = [sys.executable, "-m", "pytest", *options, str(tests)]
    if quick:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=REPO, text=True, stdout=subprocess.PIPE, check=False)
    lines = done.stdout.strip().splitlines()
    print("\n".join(f"  {line}" for line in lines[-40:]))
    # Code 5: no test is marked. Skipped ones count as passed, and are seen in the summary.
    failed = done.returncode not in (0, 5)
    emit("tests", {"summary": lines[-1] if lines else "", "problems": ["failed"] * failed})


def run_bench(case: str) -> Callable[[Emit, bool], None]:
    """The part that measures the cases with this in their name."""

    def run(emit: Emit, quick: bool) -> None:
        from embkit import bench

        rows: list[bench.Row] = []
        for row in bench.run_group("kernels", quick=quick, only=case):
            if isinstance(row, str):
                print(f"  {row}")
                emit("notes", {"part": case, "note": row})
            else:
                rows.append(row)
                emit("rows", json.loads(bench.to_json([row]))[0])
        print(bench.table(rows))

    return run


def run_tune(emit: Emit, quick: bool) -> None:
    """Try other launch parameters; the best are stored with --write."""
    from embkit.bench import gpu_tune

    write = bool(os.environ.get("EMBKIT_TUNE_WRITE"))
    for found in gpu_tune.tune(quick=quick, write=write):
        emit("tuned", found)
        print(f"  {found['op']} {found['key']}: {found['text']}")


def runner(part: str) -> Callable[[Emit, bool], None]:
    """The function of a part."""
    own = {"checks": run_checks, "tests": run_tests, "tune": run_tune}
    return own.get(part) or run_bench(part)


def child(part: str, path: Path, quick: bool) -> int:
    """Run one part in this process; each result is a line in `path` as soon as it is there."""
    with path.open("a") as out:

        def emit(kind: str, value: dict[str, Any]) -> None:
            out.write(json.dumps({"kind": kind, "value": value}) + "\n")
            out.flush()

        runner(part)(emit, quick)
    return 0


def results(path: Path) -> Iterator[tuple[str, Any]]:
    """What a part wrote, whole lines alone: its process may have been killed while writing."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return
        yield found["kind"], found["value"]


def host() -> dict[str, Any]:
    """What was measured on: GPU, driver, versions, commit."""
    from embkit import bench

    found: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": bench.machine(),
        "platform": platform.platform(),
        "commit": os.environ.get("EMBKIT_COMMIT") or bench.commit(),
        "versions": bench.versions(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "bytes": p.total_memory,
            "l2_bytes": p.L2_cache_size,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def install(wheels: Path, target: Path) -> str | None:
    """Unpack a folder of wheels for the parts to import; return what pip said if it failed."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
               "--disable-pip-version-check", "--target", str(target)]  # fmt: skip
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        return f"{wheels} holds no wheel"
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def environment(site: Path, quick: bool) -> dict[str, str]:
    """Of a part: its imports, and the interpreter where a dry run has no GPU."""
    variables = dict(os.environ)
    paths = [
        str(REPO / "python"),
        str(REPO / "kernels"),
        str(site),
        variables.get("PYTHONPATH", ""),
    ]
    variables["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    variables["PYTHONUNBUFFERED"] = "1"
    variables["TRITON_INTERPRET"] = "1" if quick and not torch.cuda.is_available() else "0"
    return variables


def run(parts: Sequence[str], out: Path, *, quick: bool, limit: float, write: bool) -> int:
    """Run the parts and write `out` after each; return the exit code."""
    begun = time.monotonic()
    found: dict[str, Any] = {"host": host(), "quick": quick, "parts": {}}
    gpu = found["host"]["gpu"]
    print(f"{gpu['name'] if gpu else 'no GPU: a dry run on the CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        if wheels := os.environ.get("EMBKIT_WHEELS"):
            found["wheels"] = install(Path(wheels), site) or "installed"
            print(f"wheels: {found['wheels']}")
        variables = environment(site, quick) | ({"EMBKIT_TUNE_WRITE": "1"} if write else {})
        for part in parts:
            left = limit - (time.monotonic() - begun)
            allowed = min(PARTS[part], left)
            print(f"\n== {part} (at most {max(allowed, 0):.0f} s)", flush=True)
            lines = Path(folder, f"{part}.jsonl")
            command = [sys.executable, "-m", "embkit.bench.gpu", "--child", part,
                       "--out", str(lines), *(["--quick"] if quick else [])]  # fmt: skip
            state = _run_part(command, variables, allowed)
            found["parts"][part] = state
            for kind, value in results(lines):
                found.setdefault(kind, []).append(value)
            if state["ended"] != "done":
                print(f"  {part}: {state['ended']}")
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    chart = out.with_suffix(".html")
    if rows := found.get("rows"):
        from embkit.bench import kernel_plot

        chart.write_text(kernel_plot.page(rows, f"Kernels: {rows[0]['machine']}"))
    print("\n" + summary(found))
    print(f"\n{out}: {time.monotonic() - begun:.0f} s")
    return 1 if failures(found) else 0


def _run_part(command: list[str], variables: dict[str, str], allowed: float) -> dict[str, Any]:
    begun = time.monotonic()
    if allowed < 5:
        return {"ended": "not run: no time was left", "seconds": 0.0}
    # A session of its own: a part's compilers and tests are ended with it.
    process = subprocess.Popen(command, env=variables, start_new_session=True)
    try:
        code = process.wait(timeout=allowed)
        ended = "done" if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        ended = f"stopped after {allowed:.0f} s"
    return {"ended": ended, "seconds": round(time.monotonic() - begun, 1)}


def failures(found: dict[str, Any]) -> list[str]:
    """Everything that is wrong, in words."""
    wrong = [f"{p}: {s['ended']}" for p, s in found["parts"].items() if s["ended"] != "done"]
    for check in found.get("checks", []):
        wrong += [f"{check['name']}: {problem}" for problem in check["problems"]]
    for tests in found.get("tests", []):
        wrong += [f"tests: {tests['summary']}" for _ in tests["problems"]]
    return wrong


def summary(found: dict[str, Any]) -> str:
    """The table that is printed last: a line a row, every way's time in it."""
    lines = []
    checks = found.get("checks", [])
    if checks:
        good = sum(not c["problems"] for c in checks)
        lines.append(f"checks: {good} of {len(checks)} passed")
    lines += [f"tests: {t['summary']}" for t in found.get("tests", [])]
    by_name: dict[str, dict[str, Any]] = {r["name"]: r for r in found.get("rows", [])}
    for name, row in by_name.items():
        times = dict(row["ms"])
        ours = times.pop("embkit")
        beside = ", ".join(f"{peer} {ms:.3g} ({ms / ours:.2f}x)" for peer, ms in times.items())
        share = f", {row['limit_share']:.0%} of {row['limit']}" if row["limit_share"] else ""
        extra = row.get("extra_bytes", {}).get("embkit")
        memory = f", {extra / 1e6:,.0f} MB besides results" if extra is not None else ""
        lines.append(
            f"{name}: {ours:.3g} ms, {row['value']:.4g} {row['unit']}{share}, "
            f"{row['times_floor']:.2f}x its floor{memory}; {beside or 'no peer'}"
            + (f" [goal: {row['goal']}]" if row["goal"] and not found["quick"] else "")
        )
    lines += [f"FAILED {wrong}" for wrong in failures(found)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 when a check, a test or a part failed."""
    parser = argparse.ArgumentParser(
        prog="python -m embkit.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="JSON file; by default in benches/results")
    parser.add_argument("--quick", action="store_true", help="small sizes: a dry run")
    parser.add_argument("--write", action="store_true", help="store the tuner's best")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.child:
        return child(given.child, given.out, given.quick)
    parts = given.parts.split(",")
    if unknown := [p for p in parts if p not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if not given.quick and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; --quick makes a dry run on the CPU")
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if not given.quick else "dry-run"
    out = given.out or REPO / "benches" / "results" / f"{date.today().isoformat()}-{name}-gpu.json"
    return run(parts, out, quick=given.quick, limit=given.limit, write=given.write)


if __name__ == "__main__":
    sys.exit(main())
