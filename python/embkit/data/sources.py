"""Where records come from: files, folders, globs, Parquet, Hugging Face datasets, BEIR folders.

Python finds the files and lets pyarrow decode Parquet and datasets; the records themselves are
parsed and validated in Rust (``RecordsBuilder``). JSON lines are read there, Arrow batches handed
over as they are; only rows that exist as Python dicts become JSON lines on the way.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.container import read_manifest
from embkit.data.convert import Counts, classes, convert
from embkit.data.decoding import batches, line_of, lines_of, rows_of
from embkit.data.readers import JSONL, beir_file
from embkit.data.tables import KINDS, task_name
from embkit.data.task_texts import key
from embkit.errors import CorruptError, UsageError, nearest
from embkit.recipe.tasks import RULES, Conversion, Task

SUFFIXES = (*JSONL, ".parquet")
_QUERY = ("query", "anchor", "question", "query_text", "instruction")  # by rank, as in Rust


@dataclass(frozen=True)
class Source:
    """One input: a file, a saved dataset, a BEIR folder or a dataset in memory.

    Attributes:
        form: ``"jsonl"``, ``"parquet"``, ``"saved"``, ``"beir"`` or ``"memory"``.
        name: shown in reports and recorded in the manifest; never a whole path.
        task: the task its examples belong to.
        kind: ``"auto"`` or one of the kinds.
        path: the file or directory, None for a dataset in memory.
        dataset: the dataset in memory.
        conversion: how its rows become examples, None when they are examples.
    """

    form: str
    name: str
    task: str
    kind: str
    path: Path | None = None
    dataset: Any = None
    conversion: Conversion | None = None


def find(inputs: Any, *, task: str | None, kind: str) -> list[Source]:
    """Turn paths, globs, folders and datasets into sources, in a fixed order.

    Raises:
        UsageError: a remote address, an unknown suffix, kind or empty folder.
        FileNotFoundError: a path that is not there or a pattern without a match.
    """
    if kind not in ("auto", *KINDS):
        raise UsageError(f"Unknown kind {kind!r}; {nearest(kind, ('auto', *KINDS))}")
    many = isinstance(inputs, (list, tuple))
    sources: list[Source] = []
    for item in inputs if many else [inputs]:
        if isinstance(item, Source):
            sources.append(item)
        elif isinstance(item, (str, Path)):
            for path in _expand(item):
                sources += list(_at(path, task, kind))
        else:
            sources.append(_in_memory(item, task, kind))
    if not sources:
        raise UsageError("Nothing to read: the list of inputs is empty.")
    return _named_apart(sources)


def of_tasks(sources: Sequence[Source], tasks: Mapping[str, Task]) -> list[Source]:
    """Sources with the kind and the conversion that a recipe gives to their tasks.

    Raises:
        UsageError: a task without a source, or a conversion of a BEIR folder.
    """
    names = {source.task for source in sources}
    for name in tasks:
        if name not in names:
            raise UsageError(
                f"The recipe has a task {name!r}, and nothing to read for it.",
                where="tasks",
                fix=nearest(name, names),
            )
    return [
        converted(replace(source, kind=task.kind if task.kind != "auto" else source.kind), how)
        for source in sources
        for task in [tasks.get(source.task, Task())]
        for how in [task.convert]
    ]


def converted(source: Source, how: Conversion) -> Source:
    """A source with a conversion, if that is on."""
    if not how.on:
        return source
    if source.form == "beir":
        raise UsageError(
            "A BEIR folder holds queries and positives already.",
            where=source.path,
            fix="leave its conversion out",
        )
    return replace(source, kind=RULES[how.rule], conversion=how)


def kind_of(source: Source) -> str:
    """The kind of a source's examples: as it is given, or as its first row's columns say.

    Raises:
        CorruptError: no row is of a kind.
    """
    if source.kind != "auto":
        return source.kind
    row = next((row for row in rows_of(source) if row is not None), {})
    builder = _rust.RecordsBuilder()
    builder.add_lines(line_of(row), source.name, source.task, source.kind)
    kind: str = builder.finish()["examples"][0]["kind"]
    return kind


def classes_of(source: Source) -> dict[str, str]:
    """The class of each text of a labelled set that is converted."""
    assert source.conversion is not None
    return classes(rows_of(source), source.conversion)


def written_in(directory: Path) -> list[Source]:
    """The rows of records that a language model has written, as a source."""
    manifest = read_manifest(directory)
    path = directory / "examples.jsonl"
    return [
        Source("jsonl", of["name"], of["task"], of["kind"], path)
        for of in manifest["sources"]
        if path.is_file()
    ]


def task_texts_of(source: Source) -> dict[str, str]:
    """The column ``task_text`` of a source, by query; of equal queries the first one's."""
    found: dict[str, str] = {}
    for row in rows_of(source):
        said = (row or {}).get("task_text")
        query = next(((row or {})[n] for n in _QUERY if n in (row or {})), None)
        if isinstance(said, str) and isinstance(query, str) and said.strip():
            found.setdefault(key(query), " ".join(said.split()))
    return found


def _named_apart(sources: list[Source]) -> list[Source]:
    """Sources of the same file name get a number: reports and provenance name them apart."""
    seen: dict[str, int] = {}
    out = []
    for source in sources:
        seen[source.name] = count = seen.get(source.name, 0) + 1
        out.append(replace(source, name=f"{source.name}#{count}") if count > 1 else source)
    return out


def stem(path: Path) -> str:
    """File name without the suffixes that are read."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def feed(source: Source, builder: Any) -> Counts | None:
    """Give all records of a source to a ``RecordsBuilder``.

    Returns:
        What its conversion has seen, if it has one.

    Raises:
        CorruptError: no rows at all, or a file that cannot be decoded.
    """
    where = (source.name, source.task, source.kind)
    if source.conversion is not None:
        counts = Counts()
        for block in lines_of(convert(rows_of(source), source.conversion, counts)):
            builder.add_lines(block, *where)
        if not counts.examples:
            raise CorruptError(
                f"The rule {source.conversion.rule!r} makes no example of {counts.rows} rows: "
                + ", ".join(f"{n} x {why}" for why, n in (counts.faults + counts.dropped).items()),
                where=source.path or source.name,
                fix="docs/conversions.md says what the rule reads; name the set's columns",
            )
        return counts
    if source.form == "jsonl":
        builder.add_jsonl(str(source.path), *where)
        return None
    empty = True
    for batch in batches(source):
        if isinstance(batch, bytes):
            builder.add_lines(batch, *where)
        elif batch.num_rows:
            builder.add_arrow(batch, *where)
        else:
            continue
        empty = False
    if empty:
        raise CorruptError(
            "The source has no rows.",
            where=source.path or source.name,
            fix="give data with records",
        )
    return None


# ---------------------------------------------------------------- finding


def _expand(item: str | Path) -> list[Path]:
    text = str(item)
    if "://" in text:
        raise UsageError(
            "Remote addresses are not read.",
            where=text,
            fix="download first, or hand over a dataset:\n"
            "           data = datasets.load_dataset('parquet', data_files='https://...', "
            "split='train')\n"
            "           records = embkit.read(data)",
        )
    path = Path(text).expanduser()
    if path.exists():
        return [path]
    if glob.has_magic(text):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))  # noqa: PTH207
        if not found:
            raise FileNotFoundError(2, "No file matches the pattern", text)
        return found
    raise FileNotFoundError(2, "No such file or directory", text)


def _at(path: Path, task: str | None, kind: str) -> Iterator[Source]:
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UsageError(
                f"Cannot read {path.name}: the suffix is not known.",
                where=path,
                fix="one of " + ", ".join(SUFFIXES),
            )
        form = "parquet" if path.suffix == ".parquet" else "jsonl"
        yield Source(form, path.name, task_name(task or stem(path)), kind, path)
        return
    name = task_name(task or path.resolve().name)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        yield Source("saved", path.name, name, kind, path)
    elif (path / "train").is_dir() and not (path / "dataset_info.json").is_file():
        yield from _at(path / "train", task, kind)
    elif beir_file(path, "corpus") and beir_file(path, "queries"):
        yield Source("beir", path.name, name, "retrieval" if kind == "auto" else kind, path)
    else:
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
        if not files:
            raise UsageError(
                "The folder holds no file that can be read.",
                where=path,
                fix="one file per task, with a suffix of " + ", ".join(SUFFIXES),
            )
        for file in files:
            yield from _at(file, task, kind)


def _in_memory(item: Any, task: str | None, kind: str) -> Source:
    if isinstance(item, dict) and "train" in item:  # a DatasetDict
        item = item["train"]
    if isinstance(item, dict) or not isinstance(item, Iterable):
        raise UsageError(
            f"Cannot read a {type(item).__name__}.",
            fix="give a path, a glob, a list of them, or a datasets.Dataset (one split)",
        )
    name = task_name(task or getattr(getattr(item, "info", None), "dataset_name", None) or "data")
    return Source("memory", name, name, kind, None, item)


def describe(sources: Sequence[Source]) -> list[dict[str, str]]:
    """What a manifest and a digest say of sources; no paths."""
    return [
        {
            "name": s.name,
            "form": s.form,
            "task": s.task,
            "kind": s.kind,
            **({"conversion": _words(s.conversion)} if s.conversion else {}),
        }
        for s in sources
    ]


def _words(how: Conversion) -> str:
    """A conversion as text: the settings that are not the defaults."""
    plain = asdict(Conversion())
    changed = {k: v for k, v in asdict(how).items() if v != plain[k]}
    return json.dumps(changed, sort_keys=True, ensure_ascii=False)
