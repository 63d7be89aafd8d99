"""P19: the wheel and the sdist hold exactly the tracked kernels, install in clean venvs, import."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
MAX_WHEEL = 10 << 20


def tracked(folder: str, *suffixes: str) -> set[str]:
    listed = subprocess.run(
        ["git", "-C", str(REPO), "ls-files", folder], capture_output=True, text=True, check=True
    )
    return {
        str(Path(line).relative_to(folder))
        for line in listed.stdout.splitlines()
        if line.endswith(suffixes)
    }


# Built beside the release build of this checkout, in the same environment, or cargo would compile
# the dependencies again.
TARGET = os.environ.get("CARGO_TARGET_DIR", str(REPO / "target"))


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel of this checkout, the sdist, and the wheel that pip makes of the sdist."""
    out = tmp_path_factory.mktemp("dist")
    maturin = Path(sys.executable).with_name("maturin")
    if not maturin.is_file():
        pytest.skip("maturin is not in this environment: `make build` installs it")
    env = {
        **os.environ, "CARGO_TERM_COLOR": "never", "CARGO_TARGET_DIR": TARGET, "PIP_QUIET": "1",
        "VIRTUAL_ENV": sys.prefix, "PATH": f"{maturin.parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir"]

    def run(*words: str | Path) -> None:
        subprocess.run([str(w) for w in words], cwd=REPO, check=True, timeout=900, env=env)

    run(maturin, "build", "--release", "--quiet", "--out", out)
    run(maturin, "sdist", "--out", out)
    sdist = only(out, "*.tar.gz")
    run(*pip, "--wheel-dir", out / "again", sdist)
    return {
        "checkout": only(out, "*.whl"),
        "sdist": sdist,
        "of sdist": only(out / "again", "*.whl"),
    }


def only(dist: Path, pattern: str) -> Path:
    found = list(dist.glob(pattern))
    assert len(found) == 1, found
    return found[0]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", ["checkout", "of sdist"])
def test_wheel_holds_the_tracked_kernels_recipes_and_demo_data(
    dist: dict[str, Path], which: str
) -> None:
    wheel = dist[which]
    assert "cp311-abi3" in wheel.name
    assert wheel.stat().st_size < MAX_WHEEL
    names = set(zipfile.ZipFile(wheel).namelist())

    def under(prefix: str) -> set[str]:
        return {n.removeprefix(prefix) for n in names if n.startswith(prefix) and n != prefix}

    assert under("embkit/kernels/") == tracked("kernels/embkit_kernels", ".py", ".json")
    assert under("embkit/demo/") == tracked("python/embkit/demo", "")
    assert under("embkit/recipes/") == tracked("python/embkit/recipes", "")
    assert {"embkit/py.typed", "embkit/_rust.pyi"} <= names


@pytest.mark.timeout(1200)
def test_sdist_holds_the_tracked_kernels_and_every_crate(dist: dict[str, Path]) -> None:
    """Sources byte for byte: cargo then takes for the sdist what it compiled for the checkout."""
    with tarfile.open(dist["sdist"]) as archive:
        files = [m for m in archive.getmembers() if m.isfile()]
        held = {m.name.split("/", 1)[1]: archive.extractfile(m) for m in files}
        members = set(held)
        for name, file in held.items():
            if name.startswith("rust/") or name in ("Cargo.lock", "pyproject.toml"):
                assert file is not None and file.read() == (REPO / name).read_bytes(), name
    prefix = "python/embkit/kernels/"
    found = {n.removeprefix(prefix) for n in members if n.startswith(prefix)}
    assert found == tracked("kernels/embkit_kernels", ".py", ".json")
    assert {"Cargo.lock", "pyproject.toml", "LICENSE"} <= members
    for crate in ("core", "store", "dedup", "ann", "py"):
        assert any(n.startswith(f"rust/embkit-{crate}/src/") for n in members), crate


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("which", ["checkout", "of sdist"])
def test_both_install_in_a_clean_venv_and_import(
    dist: dict[str, Path], tmp_path: Path, which: str
) -> None:
    """Dependencies come from this environment by a path file: what is tested is our package."""
    home = tmp_path / "venv"
    venv.create(home)
    python = home / "bin" / "python"
    env = {**os.environ, "PIP_QUIET": "1"}
    env.pop("PYTHONPATH", None)  # a developer's source tree must not stand in for the wheel
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    subprocess.run([*pip, str(dist[which])], check=True, timeout=900, cwd=tmp_path, env=env)
    purelib = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    here = next(p for p in sys.path if p.endswith("site-packages"))
    # Ours first: this environment may hold an editable embkit.
    Path(purelib, "dependencies.pth").write_text(f"import sys; sys.path.append({here!r})\n")
    code = (
        "import embkit, embkit._rust, embkit.kernels, embkit.data, embkit.recipe, pathlib\n"
        f"assert str({str(home)!r}) in embkit.__file__, embkit.__file__\n"
        "assert embkit._rust.crc32c(b'123456789') == 0xE3069283\n"
        "assert embkit.recipe.load('quickstart').name == 'quickstart'\n"
        "demo = pathlib.Path(embkit.__file__).parent / 'demo' / 'data'\n"
        "assert (demo / 'train' / 'retrieval.jsonl.zst').is_file()\n"
    )
    subprocess.run([str(python), "-c", code], check=True, timeout=120, cwd=tmp_path, env=env)
    embkit = [str(home / "bin" / "embkit"), "run", "quickstart", "--dry-run"]
    done = subprocess.run(
        embkit, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120, env=env
    )
    assert str(home) in done.stdout, "the bundled data is package data"
    assert "prefinetune: 1 x" in done.stdout
