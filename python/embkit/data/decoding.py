"""Rows of a source, in their order: Arrow batches that pyarrow decodes, or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.data.readers import beir_file, joined, read_jsonl, read_qrels
from embkit.errors import CorruptError, UsageError

if TYPE_CHECKING:
    from embkit.data.sources import Source

_BATCH = 2048  # rows handed to Rust at once
_BLOCK = 4 << 20  # ... or, as JSON lines, bytes


def batches(source: Source) -> Iterator[Any]:
    """Arrow tables or batches, or blocks of JSON lines, in the order of the rows."""
    if source.form == "parquet":
        return _parquet(Path(str(source.path)))
    if source.form == "beir":
        return lines_of(_beir(Path(str(source.path))))
    dataset = source.dataset
    if source.form == "saved":
        from datasets import load_from_disk

        dataset = load_from_disk(str(source.path))
        dataset = dataset["train"] if isinstance(dataset, dict) else dataset
    return _arrow(dataset) if _has_arrow(dataset) else lines_of(_dicts(dataset))


def rows_of(source: Source) -> Iterator[dict[str, Any] | None]:
    """The rows of a source one by one; None for a line that is no JSON object."""
    if source.form == "jsonl":
        yield from _json_rows(Path(str(source.path)))
        return
    for batch in batches(source):
        if isinstance(batch, bytes):
            yield from map(json.loads, batch.splitlines())
        else:
            yield from batch.to_pylist()


def _json_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    import pyarrow as pa

    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    rest = b""
    try:
        with pa.OSFile(str(path)) as raw:
            stream = pa.CompressedInputStream(raw, codec) if codec else raw
            while block := stream.read(_BLOCK):
                *lines, rest = (rest + block).split(b"\n")
                yield from (_json_row(line) for line in lines if line.strip())
    except OSError as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise CorruptError(
            f"The file cannot be decoded: {error}.", where=path, fix="fetch or write it again"
        ) from error
    if rest.strip():
        yield _json_row(rest)


def _json_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # also for bytes that are no UTF-8
        return None
    return row if isinstance(row, dict) else None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(batch_size=_BATCH)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise CorruptError(
            f"The Parquet file cannot be decoded: {str(error).splitlines()[0]}.",
            where=path,
            fix="fetch or write the file again",
        ) from error


def _has_arrow(dataset: Any) -> bool:
    """Whether a dataset holds Arrow tables, not rows that Python code makes one by one."""
    if not hasattr(dataset, "with_format"):
        return False
    stream = getattr(dataset, "_ex_iterable", None)  # of a datasets.IterableDataset only
    return stream is None or getattr(stream, "iter_arrow", None) is not None


def _arrow(dataset: Any) -> Iterator[Any]:
    features = getattr(dataset, "features", None) or {}
    named = {column: f for column, f in features.items() if hasattr(f, "int2str")}
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
        for column, feature in named.items():
            at = table.column_names.index(column)
            table = table.set_column(at, column, _class_names(table.column(column), feature.names))
        table.validate()  # cheap, and Rust trusts the outer offsets
        yield table


def _class_names(column: Any, names: list[str]) -> Any:
    """Class labels, stored as numbers, by name; what is no class (-1) stays a number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pc.if_else(pc.greater_equal(column, 0), column, None)
    return pc.coalesce(pc.take(pa.array(names, pa.string()), known), pc.cast(column, pa.string()))


def lines_of(rows: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    """Blocks of JSON lines."""
    batch: list[bytes] = []
    size = 0
    for row in rows:
        batch.append(line_of(row))
        size += len(batch[-1])
        if size >= _BLOCK or len(batch) == _BATCH:
            yield b"".join(batch)
            batch, size = [], 0
    if batch:
        yield b"".join(batch)


def _dicts(dataset: Any) -> Iterator[dict[str, Any]]:
    features = getattr(dataset, "features", None) or {}
    names = {column: f for column, f in features.items() if hasattr(f, "int2str")}
    for row in dataset:
        if not isinstance(row, dict):
            raise UsageError(
                f"A row is a {type(row).__name__}, not a dict of columns.",
                fix="give a datasets.Dataset or an iterable of dicts",
            )
        yield {k: _label(names[k], v) if k in names else v for k, v in row.items()}


def _label(feature: Any, value: Any) -> Any:
    return feature.int2str(value) if isinstance(value, int) and value >= 0 else value


def line_of(row: dict[str, Any]) -> bytes:
    """One JSON line; columns without a value are left out, unknown types become text."""
    kept = {k: v for k, v in row.items() if v is not None}
    text = json.dumps(kept, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogateescape") + b"\n"


def _beir(folder: Path) -> Iterator[dict[str, Any]]:
    corpus = {str(d["_id"]): d for d in read_jsonl(_must(folder, "corpus"))}
    queries = {str(q["_id"]): q["text"] for q in read_jsonl(_must(folder, "queries"))}
    positives: dict[str, list[str]] = {}
    qrels = beir_file(folder, "qrels") or folder / "qrels" / "train.tsv"
    for query, document, score in read_qrels(qrels):
        if score > 0 and query in queries and document in corpus:
            positives.setdefault(query, []).append(joined(corpus[document]))
    for query, texts in positives.items():
        yield {"query": queries[query], "positive": texts}


def _must(folder: Path, name: str) -> Path:
    path = beir_file(folder, name)
    if path is None:
        raise FileNotFoundError(2, "No such file", str(folder / f"{name}.jsonl[.zst|.gz]"))
    return path
