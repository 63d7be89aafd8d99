"""The layers of the house: Rust never sees torch, kernels never see embkit, losses call kernels."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "python" / "embkit"
KERNELS = REPO / "kernels" / "embkit_kernels"


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, relative level, at import time) of every import statement in a file."""
    tree = ast.parse(path.read_text(), str(path))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.If))
        for inner in ast.walk(node)
        if not isinstance(node, ast.If) or "TYPE_CHECKING" in ast.unparse(node.test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, 0, id(node) not in lazy
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level, id(node) not in lazy


def python_files(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*.py") if "kernels" not in p.relative_to(folder).parts)
    assert found, f"no files in {folder}"
    return found


def test_kernels_import_only_torch_triton_and_the_standard_library() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(REPO)}: {module}"
        for path in sorted(KERNELS.rglob("*.py"))
        for module, level, _ in imports(path)
        if level == 0 and module.split(".")[0] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("room", "never"),
    [
        # A room may not import, even lazily, what lies downstream of it.
        ("data", {"embkit.train", "embkit.losses", "embkit.pipeline", "embkit.cli"}),
        ("losses", {"embkit.train", "embkit.data", "embkit._rust", "embkit.pipeline"}),
        ("model", {"embkit.train", "embkit.losses", "embkit.pipeline", "embkit.cli"}),
        # `train` evaluates while it trains; it mines in a process that it is told of.
        ("train", {"embkit.pipeline", "embkit.cli", "embkit.mine"}),
        ("evaluate", {"embkit.train", "embkit.pipeline", "embkit.cli"}),
    ],
)
def test_rooms_do_not_look_downstream(room: str, never: set[str]) -> None:
    wrong = [
        f"{path.relative_to(REPO)}: {module}"
        for path in python_files(PACKAGE / room)
        for module, _, _ in imports(path)
        if any(module == bad or module.startswith(bad + ".") for bad in never)
    ]
    assert not wrong


def test_losses_have_no_maths_of_their_own() -> None:
    banned = {"logsumexp", "softmax", "log_softmax", "cross_entropy", "softplus", "exp", "matmul"}
    wrong = [
        f"{path.name}: {node.attr}"
        for path in python_files(PACKAGE / "losses")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in banned
    ]
    assert not wrong, "losses call embkit.kernels"


def test_only_the_binding_crate_names_pyo3_and_rust_never_sees_torch() -> None:
    crates = sorted((REPO / "rust").glob("embkit-*/Cargo.toml"))
    assert len(crates) == 5
    order = {"embkit-core": 0, "embkit-store": 1, "embkit-dedup": 1, "embkit-ann": 2}
    for path in crates:
        manifest = tomllib.loads(path.read_text())
        name, depends = manifest["package"]["name"], set(manifest.get("dependencies", {}))
        assert not depends & {"tch", "torch-sys"}
        if name != "embkit-py":
            assert not depends & {"pyo3", "numpy"}, name
            inner = {d for d in depends if d.startswith("embkit-")}
            assert all(order[d] < order[name] for d in inner), f"{name} looks downstream: {inner}"


PICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
RUNNERS = ("torch.load", "torch.save", "exec", "eval", "compile", "__import__", "os.system")


def test_nothing_reads_pickles() -> None:
    """P8, the static half: no call that could unpickle, anywhere in the package."""
    wrong = []
    for path in [*python_files(PACKAGE), *sorted(KERNELS.rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                names.append(getattr(node, "module", "") or "")
                wrong += [f"{path}: import {n}" for n in names if n in PICKLERS]
            elif isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                if call in RUNNERS or (
                    call in ("np.load", "numpy.load") and "allow_pickle=True" in ast.unparse(node)
                ):
                    wrong.append(f"{path}: {call}")
    assert not wrong


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has after running ``code``."""
    probe = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_kernels_need_no_rust_and_data_needs_no_torch() -> None:
    kernels = modules_after("import embkit.kernels")
    assert "torch" in kernels
    assert not kernels & {"embkit._rust", "transformers", "datasets"}
    data = modules_after("import embkit.data")
    assert "embkit._rust" in data
    assert not data & {"torch", "transformers", "datasets", "triton"}


def test_import_embkit_is_quick() -> None:
    """P19: under 150 ms, because every name loads on first use."""
    code = (
        "import time; t = time.perf_counter(); import embkit; "
        "print((time.perf_counter() - t) * 1e3)"
    )
    times = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        times.append(float(done.stdout))
    assert min(times) < 150


def test_the_function_is_the_public_name_even_after_its_module_is_imported() -> None:
    code = (
        "import embkit, embkit.mine, embkit.soup\n"
        "from embkit.mine import mine\n"
        "assert embkit.mine is mine and callable(embkit.soup)\n"
        "assert set(embkit.__all__) <= set(dir(embkit))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
