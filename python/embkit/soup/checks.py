"""What may be averaged: one architecture, one tokenizer; of other starts it warns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.errors import CorruptError, UsageError

_SAME = ("config.json", "embkit.json", "modules.json", "tokenizer.json")
# What says nothing of the model: who wrote it, with what, and of which weights it is.
_ASIDE = {
    "config.json": {
        "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
        "use_cache",
    },
    "embkit.json": {"digest", "soup", "tuning", "version"},
    "modules.json": set(),
    "tokenizer.json": {"padding", "truncation", "version"},
}  # fmt: skip
_SHOWN = 4


def model_of(run: Any) -> Path:
    """The model directory of a run.

    Raises:
        CorruptError: it has no weights. FileNotFoundError: no such directory.
    """
    path = Path(getattr(run, "path", None) or run)
    if not path.is_dir():
        raise FileNotFoundError(2, "No such training run or model", str(path))
    model = path / "model" if (path / "model" / "config.json").is_file() else path
    if not any((model / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise CorruptError(
            "The run has no finished model (model.safetensors).",
            where=model,
            fix="finish the training run, or leave it out",
        )
    return model


def check_compatible(models: Sequence[Path]) -> None:
    """Refuse models that cannot be averaged: another architecture, other settings or tokenizer.

    Raises:
        UsageError: it says what differs.
    """
    first = models[0]
    for model in models[1:]:
        for name in _SAME:
            found = differences(_content(first / name), _content(model / name), _ASIDE[name])
            if not found:
                continue
            what = "tokenizers" if name == "tokenizer.json" else "architectures"
            shown = "; ".join(found[:_SHOWN])
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise UsageError(
                f"The runs have different {what}: {name} differs in {shown}{more}.",
                where=f"{first} and {model}",
                fix="average runs that were fine-tuned from the same model",
            )


def differences(a: Any, b: Any, aside: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """Where two JSON values differ, in words: ``"hidden_size: 16, and 24"``."""
    if type(a) is type(b) and isinstance(a, dict):
        out = []
        for key in sorted(set(a) | set(b)):
            if key in aside or a.get(key) == b.get(key):
                continue
            inner = differences(a.get(key), b.get(key))
            out += [f"{key}.{d}" if isinstance(a.get(key), dict) else f"{key}: {d}" for d in inner]
        return out
    return [] if a == b else [f"{_short(a)}, and {_short(b)}"]


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)) and len(json.dumps(value)) > 60:
        return f"{len(value)} entries"
    return "nothing" if value is None else json.dumps(value)


def same_start(starts: Mapping[str, str | None]) -> bool | None:
    """Whether runs began from the same weights; None where too few of them say.

    Args:
        starts: ``init_sha256`` by the name of the run.
    """
    known = [start for start in starts.values() if start is not None]
    if len(set(known)) > 1:
        return False
    return True if len(known) == len(starts) else None


def start_of(model: Path) -> str | None:
    """``init_sha256`` of the run that made a model, when it is recorded."""
    for directory in (model.parent, model):
        manifest = directory / "manifest.json"
        if manifest.is_file():
            found = json.loads(_rust.read_manifest(str(manifest))).get("init_sha256")
            if found is not None:
                return str(found)
    return None


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptError(f"Not JSON: {error}", where=path, fix="copy it again") from error
