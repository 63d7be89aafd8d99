"""Records: validated text examples, read lazily from sources and saved as a directory.

``read`` only describes; ``Records.save`` parses (in Rust), rejects bad rows with a report, and
publishes distinct texts plus one examples table per task.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data import sources as src
from embkit.data.convert import Counts
from embkit.data.tables import Examples, Texts, concatenate, from_builder
from embkit.errors import CorruptError, UsageError
from embkit.progress import bar
from embkit.recipe.tasks import Conversion, Task
from embkit.stage import check_files, local, stage

KIND = "embkit.records"
_COLUMNS_HINT = (
    "query + positive (retrieval), sentence1 + sentence2 + score (sts) or text + label "
    "(classification); docs/formats.md lists the other names"
)


@dataclass(frozen=True)
class Records:
    """Records on disk, or a description of what to read. Made by :func:`read` or :meth:`open`.

    Attributes:
        sources: what is read; empty when the records are already a directory.
        max_rejected: share of bad rows above which a source is refused.
        path: the records directory, None before :meth:`save`.
    """

    sources: tuple[src.Source, ...] = ()
    max_rejected: float = 0.01
    path: Path | None = None

    @classmethod
    def open(cls, directory: Path | str) -> Records:
        """Records that a stage has written.

        Raises:
            CorruptError: not a records directory, or a file is missing or is another one.
        """
        directory = Path(directory)
        check_files(directory, container.read_manifest(directory, kind=KIND))
        return cls(path=directory)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest: tasks, sources, counts."""
        return container.read_manifest(self.dir, kind=KIND)

    @property
    def dir(self) -> Path:
        """The directory.

        Raises:
            UsageError: the records are not saved yet.
        """
        if self.path is None:
            raise UsageError("These records are not saved yet.", fix="records.save('records/')")
        return self.path

    def __fspath__(self) -> str:
        return str(self.dir)

    @cached_property
    def texts(self) -> Texts:
        """The distinct texts."""
        return Texts.load(self.dir)

    def tasks(self) -> dict[str, Examples]:
        """The examples of every task."""
        n = len(self.texts)
        return {t["name"]: Examples.load(self.dir, t, rows=n) for t in self.manifest["tasks"]}

    @cached_property
    def report(self) -> dict[str, Any]:
        """What was read, kept and rejected."""
        return json.loads((self.dir / "report.json").read_text(encoding="utf-8"))

    def save(self, out: Path | str, *, fresh: bool = False) -> Records:
        """Parse, validate and publish; free when it is already there.

        Args:
            out: the records directory.
            fresh: parse again even when it is there.

        Raises:
            CorruptError: an empty source, wrong columns, too many rejected rows, a broken file.
            FileNotFoundError: a source has gone.
        """
        if self.path is not None:
            raise UsageError("These records are already saved.", where=self.path)
        params: dict[str, Any] = {
            "sources": src.describe(self.sources),
            "max_rejected": self.max_rejected,
        }
        files = [s.path for s in self.sources if s.path is not None]
        with self._in_memory(out) as parsed:
            if parsed is not None:  # nothing on disk to digest: what was parsed is the identity
                params["memory"] = parsed.digest()
            with stage(
                out, name="records", params=params, inputs=files, kind=KIND, fresh=fresh
            ) as work:
                if not work.done:
                    parsed = self._parse(work.dir) if parsed is None else parsed.move(work.dir)
                    self._publish(parsed, work)
        return Records.open(out)

    @contextmanager
    def _in_memory(self, out: Path | str) -> Iterator[_Parsed | None]:
        """What a dataset in memory holds, parsed beside ``out``: only then its digest is known."""
        if all(s.form != "memory" for s in self.sources):
            yield None
            return
        local(out)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        folder = Path(_rust.temp_path(str(out)))  # a name that is swept when we are killed
        folder.mkdir()
        try:
            yield self._parse(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _parse(self, directory: Path) -> _Parsed:
        """Run every source through Rust; the texts go to raw shards in ``directory``."""
        builder = _rust.RecordsBuilder(dir=str(directory))
        sizes = [_size(s) for s in self.sources]
        with bar("Read", total=sum(sizes) / 1e6 or None, unit="MB") as progress:
            conversions = []
            for source, size in zip(self.sources, sizes, strict=True):
                conversions.append(src.feed(source, builder))
                progress.advance(size / 1e6, file=source.name)
            return _Parsed(directory, builder.finish(), tuple(conversions))

    def _publish(self, parsed: _Parsed, work: Any) -> None:
        """Check the rejected rows, join the sources of each task, write and publish."""
        content = parsed.content
        report = _report(self.sources, content["rejected"], parsed.conversions)
        for source, entry in zip(self.sources, report["sources"], strict=True):
            _judge(source, entry, self.max_rejected)
        labels = dict(content["labels"])
        by_task: dict[str, list[Examples]] = {}
        for i, part in enumerate(content["examples"]):
            table = from_builder(part, provenance=i, labels=labels.get(part["task"], ()))
            by_task.setdefault(table.name, []).append(table)
        tables = {name: concatenate(parts) for name, parts in by_task.items()}
        sources = src.describe(self.sources)
        publish_records(work, int(content["texts"]), tables, sources, report)


@dataclass(frozen=True)
class _Parsed:
    """What the builder has found, its raw shards in ``directory``."""

    directory: Path
    content: dict[str, Any]
    conversions: tuple[Counts | None, ...]

    def digest(self) -> str:
        """BLAKE3 over texts, examples and rejected rows, whatever form they were read from."""
        parts: list[Any] = [_rust.blake3_file(str(p)) for p in sorted(self.directory.iterdir())]
        for table in self.content["examples"]:
            parts += [
                value if isinstance(value, str) else _rust.blake3(value.tobytes())
                for value in table.values()
            ]
        parts += [self.content["labels"], self.content["rejected"]]
        return _rust.blake3(json.dumps(parts, sort_keys=True).encode())

    def move(self, directory: Path) -> _Parsed:
        """The same with its shards in another directory."""
        for stale in directory.glob("raw-*"):
            stale.unlink()
        for path in self.directory.iterdir():
            path.replace(directory / path.name)
        return replace(self, directory=directory)


def read(
    inputs: Any,
    *,
    task: str | None = None,
    kind: str = "auto",
    max_rejected: float = 0.01,
    convert: Conversion | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> Records:
    """Describe records to read; nothing is parsed before ``save`` (or the stage that needs it).

    Args:
        inputs: a path, glob or folder (``.jsonl``, ``.zst``, ``.gz``, ``.parquet``, a saved
            dataset, a BEIR folder, a data folder with ``train/``), a ``datasets`` Dataset or
            IterableDataset, a records directory, or a list of these.
        task: task name for everything read; by default each file's stem.
        kind: ``"auto"`` (found from the columns), ``"retrieval"``, ``"sts"``, ``"classification"``.
        max_rejected: share of bad rows above which a source is refused.
        convert: how the rows of labelled sets become examples (docs/conversions.md).
        tasks: kind and conversion of single tasks instead, by name.

    Raises:
        UsageError: a remote address, an unknown suffix or kind, an empty folder, settings of a
            task that is not there.
        FileNotFoundError: a missing file or a pattern without a match.
    """
    if not 0 <= max_rejected <= 1:
        raise UsageError(f"max_rejected is a share between 0 and 1, not {max_rejected}.")
    if isinstance(inputs, (list, tuple)) and len(inputs) == 1:
        inputs = inputs[0]
    if isinstance(inputs, (str, Path)) and (Path(inputs) / "manifest.json").is_file():
        return Records.open(inputs)
    if isinstance(inputs, Records):
        return inputs
    found = src.find(inputs, task=task, kind=kind)
    if convert is not None:
        found = [src.converted(source, convert) for source in found]
    return Records(tuple(src.of_tasks(found, tasks) if tasks else found), max_rejected)


def as_directory(records: Any, beside: Path | str) -> Records:
    """Saved records from whatever a stage was given; unsaved ones go to ``<beside>.records``."""
    found = records if isinstance(records, Records) else read(records)
    if found.path is None:
        beside = Path(beside)
        found = found.save(beside.with_name(beside.name + ".records"))
    return found


def write_records(
    work: Any,
    texts: Texts,
    tables: Mapping[str, Examples],
    sources: list[dict[str, str]],
    report: Mapping[str, Any],
) -> None:
    """Write and publish a records directory."""
    texts.save(work.dir)
    publish_records(work, len(texts), tables, sources, report)


def publish_records(
    work: Any,
    texts: int,
    tables: Mapping[str, Examples],
    sources: list[dict[str, str]],
    report: Mapping[str, Any],
) -> None:
    """Publish a records directory whose raw shards are there already.

    Args:
        work: the stage.
        texts: number of texts.
    """
    tasks = []
    for i, (name, table) in enumerate(tables.items()):
        table.save(work.dir, index=i)
        tasks.append(
            {
                "name": name,
                "kind": table.kind,
                "examples": len(table),
                "labels": list(table.labels),
                "sources": sorted({sources[j]["name"] for j in np.unique(table.provenance)}),
            }
        )
    text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (work.dir / "report.json").write_text(text + "\n", encoding="utf-8")
    counts = {"texts": texts, "examples": sum(len(t) for t in tables.values())}
    work.publish({"tasks": tasks, "sources": sources, "counts": counts})


def _size(source: src.Source) -> int:
    if source.path is None:
        return 0
    if source.path.is_file():
        return source.path.stat().st_size
    return sum(p.stat().st_size for p in source.path.rglob("*") if p.is_file())


def _report(
    sources: tuple[src.Source, ...], rejected: Any, conversions: Sequence[Counts | None]
) -> dict[str, Any]:
    """The rejected rows of every source in JSON types, plus totals."""
    entries: list[dict[str, Any]] = []
    for source, got, counts in zip(sources, rejected, conversions, strict=True):
        samples = [
            {"line": int(line), "reason": str(reason), "text": str(excerpt)}
            for line, reason, excerpt in got["samples"]
        ]
        entries.append(
            {
                "source": source.name,
                "task": source.task,
                "read": int(got["read"]),
                "kept": int(got["kept"]),
                "rejected": int(got["rejected"]),
                "reasons": {str(k): int(v) for k, v in got["reasons"].items()},
                "samples": samples,
                **({"conversion": counts.as_json()} if counts is not None else {}),
            }
        )
    totals = {key: sum(e[key] for e in entries) for key in ("read", "kept", "rejected")}
    return {**totals, "sources": entries}


def _judge(source: src.Source, entry: Mapping[str, Any], limit: float) -> None:
    """Refuse a source that is empty, has the wrong columns or too many bad rows."""
    where = source.path or source.name
    if entry["read"] == 0:
        raise CorruptError("The source has no rows.", where=where, fix="give a file with records")
    _judge_conversion(entry.get("conversion"), limit, where)
    share = entry["rejected"] / entry["read"]
    if share <= limit and entry["kept"]:
        return
    reasons = sorted(entry["reasons"].items(), key=lambda kv: (-kv[1], kv[0]))
    lines = [f"    {count} x {reason}" for reason, count in reasons]
    lines += [
        f"    line {s['line']}: {s['reason']}: {s['text'][:70]!r}" for s in entry["samples"][:3]
    ]
    if not entry["kept"] and reasons and "column" in reasons[0][0]:
        head, fix = "No row has the columns of a training example", f"columns: {_COLUMNS_HINT}"
    else:
        head = f"{entry['rejected']} of {entry['read']} rows are rejected, the limit is {limit:.1%}"
        fix = "mend the file, or allow more with max_rejected"
    raise CorruptError(head + ":\n" + "\n".join(lines), where=where, fix=fix)


def _judge_conversion(counts: Mapping[str, Any] | None, limit: float, where: Any) -> None:
    """Refuse a set with too many rows that its rule cannot read."""
    if counts is None or sum(counts["faults"].values()) <= limit * counts["rows"]:
        return
    reasons = sorted(counts["faults"].items(), key=lambda kv: (-kv[1], kv[0]))
    lines = [f"    {count} x {reason}" for reason, count in reasons]
    lines += [
        f"    row {s['row']}: {s['reason']}: {s['text'][:70]!r}"
        for s in counts["samples"]
        if s["reason"] in counts["faults"]
    ][:3]
    raise CorruptError(
        f"{sum(counts['faults'].values())} of {counts['rows']} rows are not what the rule reads, "
        f"the limit is {limit:.1%}:\n" + "\n".join(lines),
        where=where,
        fix="name the set's columns (docs/conversions.md), or allow more with max_rejected",
    )
