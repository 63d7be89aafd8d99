"""Small readers of JSON lines and judgements, for evaluation sets and BEIR folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from embkit.errors import CorruptError

JSONL = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".ndjson", ".ndjson.zst", ".ndjson.gz")


def beir_file(folder: Path, name: str) -> Path | None:
    """``folder/name`` with any suffix of JSON lines, or None."""
    for suffix in JSONL:
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    return None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON lines file (plain, .zst or .gz); for sets that fit in memory.

    Raises:
        CorruptError: a broken compressed stream or a line that is no JSON object.
    """
    import pyarrow as pa

    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    try:
        with pa.OSFile(str(path)) as raw:
            data = (pa.CompressedInputStream(raw, codec) if codec else raw).read()
        lines = data.decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptError(
            f"The file cannot be decoded: {error}.", where=path, fix="fetch or write it again"
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorruptError(
                f"Line {number} is not JSON: {error.msg}.", where=path, fix="one object per line"
            ) from error
        if not isinstance(row, dict):
            raise CorruptError(f"Line {number} is not a JSON object.", where=path)
        rows.append(row)
    return rows


def read_qrels(path: Path) -> list[tuple[str, str, float]]:
    """Query id, document id and grade of each judgement, from JSON lines or a BEIR ``.tsv``."""
    if path.suffix != ".tsv":
        rows = read_jsonl(path)
        out = []
        for number, row in enumerate(rows, 1):
            query = row.get("query_id", row.get("query-id"))
            document = row.get("corpus_id", row.get("corpus-id"))
            if query is None or document is None:
                raise CorruptError(
                    f"Row {number} has no query_id or corpus_id.",
                    where=path,
                    fix="columns query_id, corpus_id, score",
                )
            out.append((str(query), str(document), float(row.get("score", 1))))
        return out
    judged = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], 2):
        cells = line.split("\t")
        if len(cells) != 3:
            raise CorruptError(f"Line {number} has {len(cells)} cells, not 3.", where=path)
        judged.append((cells[0], cells[1], float(cells[2])))
    return judged


def joined(row: dict[str, Any]) -> str:
    """Title and text of a passage, joined as they are for training."""
    title, text = str(row.get("title") or ""), str(row.get("text") or "")
    return f"{title} {text}".strip()
