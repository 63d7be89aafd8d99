"""The sentence-transformers versions that exports are read with, each in an environment of its own.

``python tests/matrix.py`` builds the environments in the cache (``make matrix``): only what differs
lies in them, torch and the rest is that of the Python it runs with. ``test_export_matrix.py`` uses
those that are there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

# What these older versions need and the pinned stack does not have.
OLD = (
    "requests==2.32.5", "urllib3==2.5.0", "charset-normalizer==3.4.4", "pillow==11.3.0",
    "datasets==3.6.0",
)  # fmt: skip
# Name -> what lies over the pinned stack. `pinned` is the stack itself.
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "st-3.4.1": (
        "sentence-transformers==3.4.1", "transformers==4.48.3", "tokenizers==0.21.0",
        "huggingface_hub==0.28.1", *OLD,
    ),
    "st-5.1.0": (
        "sentence-transformers==5.1.0", "transformers==4.56.2", "tokenizers==0.22.0",
        "huggingface_hub==0.35.3", "optimum==2.1.0", "optimum-onnx==0.1.0", *OLD,
    ),
    "st-5.3.0": ("sentence-transformers==5.3.0", "transformers==5.3.0", "tokenizers==0.22.2"),
    "pinned": (),
}  # fmt: skip


def root() -> Path:
    """Where the environments are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("EMBKIT_MATRIX") or cache / "embkit" / "matrix")


def python(name: str) -> Path | None:
    """The interpreter of an environment, or None where it was not built."""
    if not ENVIRONMENTS[name]:
        return Path(sys.executable)
    place = root() / name
    stamp = place / "built.txt"
    if not stamp.is_file() or stamp.read_text() != _stamp(name):
        return None
    return place / "bin" / "python"


def build(name: str) -> None:
    """Make an environment, or leave it when it is there already."""
    if python(name) is not None:
        return
    place = root() / name
    venv.create(place, clear=True, with_pip=False, symlinks=True)
    inside = place / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (inside / "pinned.pth").write_text(sysconfig.get_path("purelib") + "\n")
    print(f"{name}: {' '.join(ENVIRONMENTS[name])}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--target", str(inside), *ENVIRONMENTS[name]],
        check=True,
    )  # fmt: skip
    (place / "built.txt").write_text(_stamp(name))


def _stamp(name: str) -> str:
    return "\n".join([*ENVIRONMENTS[name], sysconfig.get_path("purelib"), ""])


if __name__ == "__main__":
    for each in ENVIRONMENTS:
        build(each)
