"""Check of every shipped kernel without a GPU: compile, read the machine code's needs, tabulate.

    python -m embkit_kernels.aot                          every kernel, sm_80, sm_90, sm_100
    python -m embkit_kernels.aot --op infonce --arch 90,gfx942
    python -m embkit_kernels.aot --write docs/kernels.md  put the tables between their markers

Each `specs()` of the package names what is shipped. A compiler says nothing when a kernel spills
registers, outgrows the shared memory of its GPU, misses the tensor cores or loses its software
pipeline: this check does, and ends with exit code 1. AMD's gfx942 is told of, never an error. Each
compilation is a process of its own, because some failures of the compiler abort the process.
"""

import argparse
import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ._triton import ARCHES, Spec

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376,
                942: 65_536}  # fmt: skip
"""Bytes of shared memory that one block may have."""

SHARED_TOTAL = {80: 167_936, 86: 102_400, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
"""Bytes of shared memory of one multiprocessor; each block costs 1,024 besides its own."""

TENSOR_CORES = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 120: "mma.sync",
                90: "wgmma.mma_async", 100: "tcgen05.mma", 942: "v_mfma"}  # fmt: skip
"""The instruction that reaches the full rate, as PTX (or AMD's assembly) spells it."""

INFORMATIONAL = (942,)
TIMEOUT = 180.0


@dataclass
class Report:
    """What one kernel needs on one architecture, and what is wrong with it."""

    op: str
    name: str
    arch: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_cores: str = ""
    buffers: int = 0
    blocks: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the check must fail."""
        return bool(self.problems) and self.arch not in INFORMATIONAL


def collect(ops: Sequence[str] = (), modules: Sequence[str] = ()) -> list[tuple[str, Spec]]:
    """Every `Spec` of the package's Triton files as (op, spec), sorted by op.

    Args:
        ops: only these ops.
        modules: import these modules instead of walking the package.

    Raises:
        ValueError: two specs of an op share a name, or `ops` names one without kernels.
    """
    found: dict[tuple[str, str], Spec] = {}
    for name in modules or _triton_modules():
        module = importlib.import_module(name)
        op = name.removeprefix(f"{__package__}.").split(".")[0].removesuffix("_triton")
        for spec in getattr(module, "specs", tuple)():
            if found.setdefault((op, spec.name), spec) is not spec:
                raise ValueError(f"{name}: two specs of {op!r} are called {spec.name!r}")
    known = sorted({op for op, _ in found})
    if missing := sorted(set(ops) - set(known)):
        raise ValueError(f"no Triton kernels of {missing[0]!r}; there are: {', '.join(known)}")
    return sorted(
        ((op, spec) for (op, _), spec in found.items() if not ops or op in ops),
        key=lambda pair: pair[0],
    )


def _triton_modules() -> Iterator[str]:
    root = importlib.import_module(__package__)
    for info in pkgutil.walk_packages(root.__path__, f"{__package__}."):
        parts = info.name.split(".")[1:]
        if parts[-1] != "_triton" and (parts[-1].endswith("_triton") or "triton" in parts[:-1]):
            yield info.name


def check(specs: Iterable[tuple[str, Spec]], arches: Sequence[int], jobs: int = 2) -> list[Report]:
    """Compile every spec for every architecture it is for, `jobs` at a time, in order."""
    work = [(op, s, a) for op, s in specs for a in arches if s.arch is None or a in s.arch]
    fork = multiprocessing.get_context("fork")
    reports: list[Report | None] = [None] * len(work)
    running: dict[Connection, tuple[int, Any, float]] = {}
    todo = iter(enumerate(work))
    while True:
        while len(running) < jobs and (item := next(todo, None)) is not None:
            here, there = fork.Pipe(duplex=False)
            child = fork.Process(target=_child, args=(there, *item[1]))
            child.start()
            there.close()
            running[here] = (item[0], child, time.monotonic())
        if not running:
            return [r for r in reports if r is not None]
        ended = wait(list(running), timeout=1.0)
        for pipe in [p for p in running if p in ended]:
            index, child, _ = running.pop(pipe)
            reports[index] = _receive(pipe, child, work[index])
        for late, (index, child, begun) in list(running.items()):
            if time.monotonic() - begun > TIMEOUT:
                child.kill()
                del running[late]
                reports[index] = _broken(work[index], f"not compiled within {TIMEOUT:.0f} s")


def _receive(pipe: Connection, child: Any, item: tuple[str, Spec, int]) -> Report:
    try:
        report = pipe.recv()
    except EOFError:
        report = None
    child.join()
    if report is not None:
        return report
    ended = signal.Signals(-child.exitcode).name if child.exitcode < 0 else child.exitcode
    return _broken(item, f"the compiler died: {ended}")


def _broken(item: tuple[str, Spec, int], why: str) -> Report:
    op, spec, arch = item
    return Report(op, spec.name, arch, problems=[why])


def _child(pipe: Connection, op: str, spec: Spec, arch: int) -> None:
    """One compilation; what the compiler prints is dropped, save for the error of a failure."""
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 1)
        os.dup2(noise.fileno(), 2)
        try:
            report = compile_spec(op, spec, arch)
        except Exception as error:  # whatever the compiler raises is a result
            noise.seek(0)
            said = [x for x in noise.read().decode(errors="replace").splitlines() if "error:" in x]
            text = (said or str(error).strip().splitlines() or [""])[-1].strip()
            report = _broken((op, spec, arch), f"{type(error).__name__}: {text[:300]}")
        pipe.send(report)


def compile_spec(op: str, spec: Spec, arch: int) -> Report:
    """Compile one spec in this process and judge it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    if wrong := set(names) ^ (spec.signature.keys() | spec.constexprs.keys()):
        raise ValueError(f"signature and constexprs do not match arguments {sorted(wrong)}")
    source = ASTSource(
        fn=spec.kernel,
        signature={n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names},
        constexprs=dict(spec.constexprs),
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.aligned},
    )
    target = GPUTarget("hip", f"gfx{arch}", 64) if arch == 942 else GPUTarget("cuda", arch, 32)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    if spec.maxnreg is not None and arch != 942:
        options["maxnreg"] = spec.maxnreg
    begun = time.monotonic()
    made = triton.compile(source, target=target, options=options)
    report = Report(op, spec.name, arch, shared=made.metadata.shared)
    report.seconds = time.monotonic() - begun
    if arch == 942:
        _read_amd(report, made.asm["amdgcn"])
    else:
        _read_nvidia(report, made.asm, spec.num_warps)
    report.problems = list(_judge(report, spec, made.asm["ttgir"]))
    return report


def _read_nvidia(report: Report, asm: dict[str, Any], num_warps: int) -> None:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        done = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True)
    used = dict(re.findall(r"\b(REG|STACK):(\d+)", done.stdout))
    if len(used) < 2:
        raise RuntimeError(f"cuobjdump told no registers: {done.stdout}{done.stderr}")
    report.registers, report.stack = int(used["REG"]), int(used["STACK"])
    report.tensor_cores = _instruction(asm["ptx"])
    report.buffers = _buffers(asm["ttgir"])
    # Registers are given out to warps in pieces of 256; a multiprocessor has 65,536.
    per_warp = -(-report.registers * 32 // 256) * 256
    by_registers = 65_536 // (per_warp * num_warps)
    by_shared = SHARED_TOTAL[report.arch] // (report.shared + 1024)
    report.blocks = min(by_registers, by_shared, 2048 // (32 * num_warps), 32)


def _read_amd(report: Report, assembly: str) -> None:
    def number(name: str) -> int:
        return int((re.search(rf"\.{name}:\s*(\d+)", assembly) or ["", "0"])[1])

    report.registers = number("vgpr_count")
    report.stack = number("private_segment_fixed_size")
    report.tensor_cores = _instruction(assembly)


def _instruction(assembly: str) -> str:
    names = dict.fromkeys(TENSOR_CORES.values())
    return next((name for name in names if re.search(re.escape(name), assembly)), "")


def _buffers(ttgir: str) -> int:
    """Buffers of the deepest software pipeline of loads; 1 when no load is ahead of its use."""
    if not re.search(r"async_copy_global_to_local|async_tma_copy_global_to_local", ttgir):
        return 1
    rings = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x((?:\d+x)+)(?!i64)", ttgir)
    return max((int(depth) for depth, _ in rings), default=1)


def _judge(report: Report, spec: Spec, ttgir: str) -> Iterator[str]:
    if report.stack > spec.stack_budget:
        yield f"{report.stack} bytes of stack, the budget is {spec.stack_budget}: registers spill"
    if report.shared > SHARED_LIMIT[report.arch]:
        yield f"{report.shared:,} bytes of shared memory, a block has {SHARED_LIMIT[report.arch]:,}"
    want = TENSOR_CORES[report.arch]
    if spec.tensor_cores and report.tensor_cores != want:
        yield f"{report.tensor_cores or 'no tensor-core instruction'} instead of {want}"
    if not spec.pipelined or report.arch in INFORMATIONAL:
        return
    if report.buffers < 2:
        yield "the loads are not pipelined"
    if want == "wgmma.mma_async" and spec.tensor_cores:
        waits = re.findall(r"warp_group_dot_wait.*?pendings = (\d+)", ttgir)
        if not any(int(pending) for pending in waits):
            yield "every product is waited for at once: pendings = 0 alone"


def table(reports: Sequence[Report]) -> str:
    """One op's reports as Markdown: a row a kernel, a column an architecture."""
    arches = sorted({r.arch for r in reports})
    cells = {(r.name, r.arch): _cell(r) for r in reports}
    lines = [f"| kernel | {' | '.join(map(label, arches))} |", "|---" * (len(arches) + 1) + "|"]
    for name in dict.fromkeys(r.name for r in reports):
        row = " | ".join(cells.get((name, arch), "-") for arch in arches)
        lines.append(f"| {name} | {row} |")
    return "\n".join(lines) + "\n"


def _cell(r: Report) -> str:
    if not r.registers:
        return r.problems[0].split(":")[0] if r.problems else "-"
    unit = r.tensor_cores.split(".")[0].removeprefix("v_")
    parts = [f"{r.registers} / {r.stack} / {r.shared / 1000:.1f}", unit]
    parts += [
        f"{r.buffers} deep" if r.buffers > 1 else "",
        f"{r.blocks} blocks" if r.blocks else "",
    ]
    return ", ".join(p for p in parts if p)


def label(arch: int) -> str:
    """An architecture as its vendor writes it."""
    return f"gfx{arch}" if arch == 942 else f"sm_{arch}"


def document(text: str, reports: Sequence[Report], triton_version: str) -> str:
    """Put each op's table between its markers; an op without markers gets them at the end."""
    for op in dict.fromkeys(r.op for r in reports):
        begin, end = f"<!-- aot {op}", f"<!-- end aot {op} -->"
        body = table([r for r in reports if r.op == op])
        block = f"{begin}, triton {triton_version} -->\n{body}{end}"
        old = re.search(rf"{begin},.*?{re.escape(end)}", text, re.DOTALL)
        text = text.replace(old[0], block) if old else f"{text.rstrip()}\n\n`{op}`:\n\n{block}\n"
    return text


def documented(text: str, op: str) -> tuple[str, str] | None:
    """The triton version and the table that a document has for an op; None without one."""
    found = re.search(
        rf"<!-- aot {op}, triton (\S+) -->\n(.*?)<!-- end aot {op} -->", text, re.DOTALL
    )
    return (found[1], found[2]) if found else None


def _arches(text: str) -> list[int]:
    arches = [int(part.removeprefix("sm_").removeprefix("gfx")) for part in text.split(",")]
    if unknown := [a for a in arches if a not in SHARED_LIMIT]:
        raise argparse.ArgumentTypeError(f"unknown architecture {unknown[0]}")
    return arches


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", default=[], help="only this op (repeatable)")
    parser.add_argument("--arch", type=_arches, default=[a for a in ARCHES if a != 942],
                        help="comma-separated: 80,86,89,90,100,120,gfx942")  # fmt: skip
    parser.add_argument("--module", action="append", default=[], help="check this module instead")
    parser.add_argument("--write", type=Path, help="document whose tables are renewed")
    parser.add_argument("--json", type=Path, help="write every report here")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at a time")
    given = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    try:
        import triton
    except ImportError:
        parser.error("triton is not installed (pip install triton, Linux only)")
    try:
        specs = collect(given.op, given.module)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    reports = check(specs, given.arch, given.jobs)
    for op in dict.fromkeys(r.op for r in reports):
        print(f"{op} (registers / stack bytes / shared KB)")
        print(table([r for r in reports if r.op == op]))
    for r in reports:
        for problem in r.problems:
            level = "error" if r.failed else "note"
            print(f"{level}: {r.op} {r.name!r} on {label(r.arch)}: {problem}", file=sys.stderr)
    if given.json:
        rows = [dataclasses.asdict(r) for r in reports]
        given.json.write_text(json.dumps({"triton": triton.__version__, "reports": rows}, indent=1))
    failed = sum(r.failed for r in reports)
    if given.write and not failed:
        given.write.write_text(document(given.write.read_text(), reports, triton.__version__))
    print(f"triton {triton.__version__}: {len(reports)} compilations, {failed} failed, "
          f"{sum(r.seconds for r in reports):.0f} s of compiling")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
