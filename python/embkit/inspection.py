"""`embkit inspect` and `embkit verify`: what a file or directory holds, and whether it is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embkit import _rust, stage
from embkit.container import read_manifest
from embkit.errors import CorruptError


def describe(path: Path) -> str:
    """Text that says what ``path`` holds: a manifest's fields, or a file's tensors.

    Raises:
        CorruptError: damaged, or nothing that embkit wrote.
    """
    if path.is_dir():
        return _describe_directory(path)
    if path.suffix == ".safetensors":
        return _describe_tensors(path)
    if path.name == "manifest.json":
        return _describe_directory(path.parent)
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    raise CorruptError("This is no embkit file.", where=path, fix="give a stage's directory")


def verify(path: Path) -> tuple[int, int]:
    """Check every checksum under ``path``.

    Returns:
        Files checked and their bytes.

    Raises:
        CorruptError: the first file that is missing or damaged.
    """
    if path.is_file():
        _verify_file(path)
        return 1, path.stat().st_size
    if not path.is_dir():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    manifests = sorted(path.rglob("manifest.json"))
    if not manifests:
        read_manifest(path)  # says what is wrong
    files = size = 0
    for manifest_path in manifests:
        root = manifest_path.parent
        manifest = read_manifest(root)
        stage.check_files(root, manifest)
        for name in manifest["files"]:
            _verify_file(root / name)
            files += 1
            size += (root / name).stat().st_size
    return files, size


def _verify_file(path: Path) -> None:
    if path.name == "manifest.json":
        read_manifest(path.parent)
    elif path.suffix == ".safetensors":
        try:
            _rust.file_info(str(path))
        except CorruptError:
            if _is_foreign(path):  # a plain safetensors file: the manifest's BLAKE3 covers it
                return
            raise
        _rust.open_tensors(str(path), "open")


def _is_foreign(path: Path) -> bool:
    """Whether a file is safetensors of another writer (an exported model), without checksums."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as handle:
            return "format" not in (handle.metadata() or {}) or "crc" not in handle.keys()  # noqa: SIM118
    except SafetensorError:
        return False


def _describe_directory(path: Path) -> str:
    manifest = read_manifest(path)
    files = manifest.pop("files", {})
    size = sum(record["length"] for record in files.values())
    lines = [f"{path}: {manifest.get('format')}, {len(files)} files, {size:,} bytes"]
    for key in sorted(manifest.keys() - {"format", "crc32c"}):
        lines.append(f"  {key}: {_short(manifest[key])}")
    for name, record in sorted(files.items()):
        lines.append(f"  {record['length']:>12,}  {name}")
    return "\n".join(lines)


def _describe_tensors(path: Path) -> str:
    tensors, meta = _rust.open_tensors(str(path), "off")
    lines = [f"{path}: {path.stat().st_size:,} bytes"]
    lines += [f"  {key} = {_short(value)}" for key, value in sorted(meta.items())]
    lines += [
        f"  {code:>4} {list(array.shape)!s:>20}  {name}" for name, (code, array) in tensors.items()
    ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:197] + "..."
