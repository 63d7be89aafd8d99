"""embkit trains text-embedding models: data, losses, mining, training, soup, evaluation, export.

Names load on first use, so that ``import embkit`` costs nothing, ``import embkit.kernels`` needs
neither the Rust extension nor transformers, and ``import embkit.data`` does not need torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from embkit import kernels as kernels
    from embkit.data import read as read
    from embkit.data.dedup import dedup as dedup
    from embkit.data.filter import filter as filter
    from embkit.data.tokenize import tokenize as tokenize
    from embkit.errors import EmbkitError as EmbkitError
    from embkit.evaluate import evaluate as evaluate
    from embkit.mine import mine as mine
    from embkit.model import Encoder as Encoder
    from embkit.pipeline import run as run
    from embkit.recipe import Recipe as Recipe
    from embkit.soup import soup as soup
    from embkit.train import finetune as finetune
    from embkit.train import prefinetune as prefinetune

_HOME = {
    "read": "embkit.data",
    "dedup": "embkit.data",
    "filter": "embkit.data",
    "tokenize": "embkit.data",
    "Encoder": "embkit.model",
    "prefinetune": "embkit.train",
    "finetune": "embkit.train",
    "mine": "embkit.mine",
    "soup": "embkit.soup",
    "evaluate": "embkit.evaluate",
    "run": "embkit.pipeline",
    "Recipe": "embkit.recipe",
    "EmbkitError": "embkit.errors",
}
__all__ = [*_HOME, "kernels"]

_kernels = Path(__file__).with_name("kernels")
if _kernels.is_file() and not _kernels.is_symlink():  # a checkout made without symlinks
    raise ImportError(
        "python/embkit/kernels is a text file: this checkout was made without symbolic links.\n"
        "  fix: git config core.symlinks true && git checkout -- python/embkit/kernels "
        "(on Windows use WSL)"
    )


class _Package(ModuleType):
    """Keeps ``embkit.mine`` the function: importing the module of that name would replace it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("embkit.kernels")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'embkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
