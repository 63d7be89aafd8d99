"""The passages that a model reads: from files, a records directory or memory; and personas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit.data.readers import joined, read_jsonl
from embkit.data.records import Records
from embkit.errors import CorruptError, UsageError

_TEXTS = ("text", "positive", "passage", "contents", "document")


def read_passages(source: Any) -> tuple[list[str], list[Path], list[str]]:
    """Distinct passages, in order.

    Args:
        source: a JSON lines file (plain, .zst or .gz; ``text`` with an optional ``title``, or
            ``positive``, ``passage``, ``contents``, ``document``); a records directory (the
            positives of its retrieval tasks); or a list, in which a ``Path`` is one of these and a
            string is a text.

    Returns:
        The passages, the files that they come from, and the texts themselves where there is none.

    Raises:
        CorruptError: a row without a text, or no passage at all.
    """
    paths: list[Path] = []
    texts: list[str] = []
    memory: list[str] = []
    alone = isinstance(source, (str, Path, Records))
    for item in [Path(source)] if isinstance(source, str) else [source] if alone else list(source):
        if isinstance(item, str):
            memory.append(item)
            texts.append(item)
            continue
        path = item.dir if isinstance(item, Records) else Path(item)
        paths.append(path)
        texts += _of_records(path) if (path / "manifest.json").is_file() else _of_file(path)
    kept = list(dict.fromkeys(text for text in texts if text.strip()))
    if not kept:
        raise CorruptError("There are no passages.", where=paths[0] if paths else None)
    return kept, paths, memory


def _of_file(path: Path) -> list[str]:
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        name = next((n for n in _TEXTS if isinstance(row.get(n), str)), None)
        if name is None:
            raise CorruptError(
                f"Row {number} has no text.", where=path, fix=f"name a column {', '.join(_TEXTS)}"
            )
        found.append(joined({"title": row.get("title"), "text": row[name]}))
    return found


def _of_records(path: Path) -> list[str]:
    records = Records.open(path)
    rows = [t.positive for t in records.tasks().values() if t.kind == "retrieval"]
    if not rows:
        raise UsageError("These records have no retrieval task.", where=path)
    return [records.texts.get(int(row)) for row in np.unique(np.concatenate(rows))]


def read_lines(path: Path | str) -> list[str]:
    """The texts of a file with one a line; blank lines are none.

    Raises:
        CorruptError: there is none, or the file is no UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise CorruptError("The file is no UTF-8.", where=path) from error
    found = [" ".join(line.split()) for line in lines if line.strip()]
    if not found:
        raise CorruptError("The file has no line.", where=path, fix="one entry a line")
    return found


class Personas:
    """Characters by the passages that would interest them: word overlap, weighted by rarity.

    Args:
        texts: descriptions of people, one each.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [" ".join(text.split()) for text in texts if text.strip()]
        if len(self.texts) < 2:
            raise UsageError("There are less than two personas.", fix="one description a line")

    @classmethod
    def read(cls, path: Path | str) -> Personas:
        """One persona a line."""
        return cls(read_lines(path))

    def near(self, passages: Sequence[str], k: int = 5) -> list[list[str]]:
        """The ``k`` best personas of each passage, ties by their order in the file."""
        from embkit.evaluate.bm25 import bm25_rank

        found = bm25_rank(list(passages), self.texts, k=k)
        return [[self.texts[int(i)] for i in row] for row in found]
