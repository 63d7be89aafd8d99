"""The ahead-of-time check: every shipped kernel passes it, and it finds each fault it looks for."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from embkit_kernels import aot

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "kernels.md"
SHIPPED = (80, 90, 100)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where triton compiles instead of interpreting."""
    environment = {**os.environ, **variables}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(Path(aot.__file__).parents[1])])
    command = [sys.executable, "-m", "embkit_kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def reports(path: Path) -> list[aot.Report]:
    return [aot.Report(**row) for row in json.loads(path.read_text())["reports"]]


@pytest.mark.timeout(900)
def test_every_shipped_kernel(tmp_path: Path) -> None:
    """Registers, shared memory, tensor cores, pipelining; and docs/kernels.md says the same."""
    done = run("--json", str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stderr
    found = reports(tmp_path / "aot.json")
    written = DOCUMENT.read_text()
    version = json.loads((tmp_path / "aot.json").read_text())["triton"]
    for op in dict.fromkeys(r.op for r in found):
        mine = [r for r in found if r.op == op]
        assert {r.arch for r in mine} == set(SHIPPED), f"{op} is not compiled for all of {SHIPPED}"
        old = aot.documented(written, op)
        hint = "run: python -m embkit_kernels.aot --write docs/kernels.md"
        assert old is not None, f"docs/kernels.md has no table of {op}; {hint}"
        if old[0] == version:  # another triton makes other numbers
            assert aot.table(mine) == old[1], f"the table of {op} is old; {hint}"


FAULTS = {
    "spills": ["bytes of stack, the budget is 0", "mma.sync instead of wgmma.mma_async"],
    "too large": ["262,144 bytes of shared memory, a block has 232,448"],
    "no tensor cores": ["no tensor-core instruction instead of wgmma.mma_async"],
    "not pipelined": ["the loads are not pipelined", "pendings = 0 alone"],
    "broken": ["constexpr cannot be reassigned"],
    "argument left out": ["do not match arguments ['a']"],
    "aborts": ["the compiler died: SIGABRT"],
}


def test_faults_are_found(tmp_path: Path) -> None:
    json_path = tmp_path / "aot.json"
    arguments = ("--module", "aot_samples", "--arch", "90", "--json", str(json_path))
    done = run(*arguments, "--write", str(tmp_path / "untouched.md"), EMBKIT_TEST_FAULTS="1")
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "untouched.md").exists()
    by_name = {r.name: r for r in reports(json_path)}
    assert by_name.keys() == FAULTS.keys()
    for name, texts in FAULTS.items():
        problems = "; ".join(by_name[name].problems)
        for text in texts:
            assert text in problems, f"{name}: {problems}"
            assert f"error: aot_samples {name!r} on sm_90" in done.stderr


def test_a_good_kernel_and_its_table(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("# Kernels\n")
    done = run("--module", "aot_samples", "--arch", "90", "--write", str(document))
    assert done.returncode == 0, done.stderr
    text = document.read_text()
    assert text.startswith("# Kernels\n\n`aot_samples`:")
    found = aot.documented(text, "aot_samples")
    assert found is not None
    # Two operands of 128 x 64 bf16, three buffers each: 98,304 bytes.
    good, capped = found[1].splitlines()[-2:]
    assert "/ 0 / 98.3, wgmma, 3 deep, 2 blocks" in good
    assert "| 96 / " in capped and "| 96 / " not in good


def test_a_table_is_renewed_in_its_place() -> None:
    old = aot.Report("op", "name", 90, registers=100, stack=8, shared=2000)
    text = aot.document("before\n", [old], "1.0") + "after\n"
    new = aot.document(text, [aot.Report("op", "name", 90, registers=99, shared=1000)], "1.1")
    assert "100 / 8 / 2.0" in text and aot.documented(text, "op") == ("1.0", aot.table([old]))
    assert "100 /" not in new and "99 / 0 / 1.0" in new and new.count("aot op") == 2
    assert new.startswith("before\n") and new.endswith("after\n")


def test_amd_only_informs() -> None:
    fault = {"problems": ["registers spill"]}
    assert not aot.Report("op", "name", 942, **fault).failed
    assert aot.Report("op", "name", 90, **fault).failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "70"], "unknown architecture 70"),
        (["--op", "sorting"], "no Triton kernels of 'sorting'"),
        (["--module", "no_such_module"], "No module named 'no_such_module'"),
    ],
)
def test_wrong_arguments(arguments: Sequence[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr


def test_the_interpreter_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
