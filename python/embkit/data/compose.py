"""Stores out of stores: append, merge, subset. The inputs are never changed.

Rows of the first store keep their numbers when something is appended or merged, so embeddings of it
and tables that name its rows stay valid; docs/stores.md says what else stays. Rows are matched and
copied in Rust; the example tables are joined here, one task at a time.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.container import read_manifest
from embkit.data.loader import KIND, Store, as_store
from embkit.data.records import as_directory
from embkit.data.tables import Array, Examples, concatenate
from embkit.data.task_texts import TASK_TEXT
from embkit.data.tokenize import Use, tokenize, uses_of
from embkit.errors import UsageError, nearest
from embkit.progress import bar
from embkit.stage import stage

_MAX_SOURCES = np.iinfo(np.uint16).max
_UNUSED = 255  # the form of a row that no example names; prompts have the numbers below
_KEY = 0x5B5E7  # tells the permutation of subset from those of training


def merge(stores: Sequence[Any], *, out: Path | str, fresh: bool = False) -> Store:
    """Join stores into one: rows of the first in place, then what each further one adds.

    Every distinct (prompt, text) is one row: a text that an earlier store has, behind the same
    prompt, maps to the earlier row, its role and cluster joined. Tasks of the same name and kind
    are concatenated (class labels matched by name), sources of the same name told apart by
    ``#2``, ``#3``.

    Args:
        stores: two or more stores or their directories, made with one tokenizer, the same prompts
            and the same lengths.
        out: the store directory to publish; none of the inputs.
        fresh: do it again even when it is done.

    Raises:
        UsageError: stores that do not fit together, a task of two kinds, or fewer than two stores.
        CorruptError: a damaged store.
    """
    opened = [as_store(s) for s in stores]
    if len(opened) < 2:
        raise UsageError("There is nothing to merge.", fix="give two stores or more")
    for other in opened[1:]:
        _fits(opened[0], other)
    _apart(out, opened)
    tasks = _task_list(opened)
    _task_prompts(opened)
    inputs = [s.path for s in opened]
    with stage(out, name="merge", params={}, inputs=inputs, kind=KIND, fresh=fresh) as work:
        if not work.done:
            _merge(opened, tasks, work)
    return Store(out)


def append(store: Any, more: Any, *, out: Path | str, fresh: bool = False) -> Store:
    """A store with more examples behind its own.

    Args:
        store: a store or its directory; its rows keep their numbers.
        more: another store, or records: anything that :func:`embkit.data.read` takes. Records are
            tokenised as ``store`` was, into ``<out>.added``, which may be deleted afterwards.
        out: the store directory to publish; not ``store`` itself.
        fresh: do it again even when it is done.

    Raises:
        UsageError: as :func:`merge`.
    """
    first = as_store(store)
    _apart(out, [first])
    if not isinstance(more, Store) and not _is_store(more):
        added = Path(out).with_name(Path(out).name + ".added")
        records = as_directory(more, added)
        tasks = {task["name"] for task in records.manifest["tasks"]}
        more = tokenize(
            records,
            out=added,
            tokenizer=first.tokenizer,
            max_length_query=first.max_length["query"],
            max_length_passage=first.max_length["passage"],
            prompts=first.prompts,
            task_prompts={t: own for t, own in first.task_prompts.items() if t in tasks},
            prompt_dropout=bool(first.manifest.get("plain_rows")),
            fresh=fresh,
        )
    return merge([first, more], out=out, fresh=fresh)


def subset(
    store: Any,
    *,
    out: Path | str,
    tasks: Sequence[str] | None = None,
    examples: Mapping[str, Any] | None = None,
    max_examples: int | Mapping[str, int] | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> Store:
    """Some of a store's examples, with the rows that they name and no others.

    Examples and rows keep their order; rows are numbered anew, and keep tokens, role, cluster and
    source. Label lists and sources stay whole, so their numbers mean the same.

    Args:
        store: a store or its directory.
        out: the store directory to publish; not ``store`` itself.
        tasks: names of the tasks to keep (all).
        examples: per task a bool mask or distinct example numbers; tasks not named stay whole.
        max_examples: at most so many per task, drawn evenly from what is left; a number for all
            or one per task.
        seed: of the draw.
        fresh: do it again even when it is done.

    Raises:
        UsageError: an unknown task, a mask or numbers that do not fit it, or nothing left.
    """
    whole = as_store(store)
    _apart(out, [whole])
    limits = max_examples if isinstance(max_examples, Mapping) else {}
    names = whole.task_names
    for name in [*(tasks or ()), *(examples or ()), *limits]:
        if name not in names:
            raise UsageError(f"No task {name!r}; {nearest(name, names)}", where=whole.path)
    kept = [n for n in names if tasks is None or n in tasks]
    sizes = {t["name"]: int(t["examples"]) for t in whole.manifest["tasks"]}
    chosen: dict[str, Array] = {}
    for place, name in enumerate(names):
        if name not in kept:
            continue
        at = _chosen(name, (examples or {}).get(name), sizes[name])
        limit = limits.get(name) if isinstance(max_examples, Mapping) else max_examples
        if limit is not None and len(at) > limit:
            if limit < 1:
                raise UsageError(f"max_examples = {limit} leaves nothing of task {name!r}.")
            drawn = _rust.permute(len(at), (seed << 20) ^ (place << 40) ^ _KEY, 0, limit)
            at = at[np.sort(drawn.astype(np.int64))]
        if len(at):
            chosen[name] = at
    if not chosen:
        raise UsageError("No example is left.", where=whole.path, fix="keep more")
    params = {name: _rust.blake3(at.tobytes()) for name, at in chosen.items()}
    with stage(
        out, name="subset", params={"examples": params}, inputs=[whole.path], kind=KIND, fresh=fresh
    ) as work:
        if not work.done:
            _subset(whole, chosen, work)
    return Store(out)


# ---------------------------------------------------------------- merge


def _merge(stores: list[Store], tasks: list[dict[str, Any]], work: Any) -> None:
    sources, source_of = _sources(stores)
    number = _prompt_numbers(stores)
    form = np.concatenate([_forms(s, number) for s in stores])
    source = np.concatenate(
        [m[_column(s, "source")] for s, m in zip(stores, source_of, strict=True)]
    )
    parts, limits = _parts(stores), _limits(stores[0])
    with bar("Match texts", total=len(form), unit="rows") as progress:
        row_of, plan = _rust.merge_rows(parts, form, source, limits, progress=progress.update)
    lengthened = plan.pop("lengthened")
    renamed = [
        {old["name"]: sources[int(m[i])]["name"] for i, old in enumerate(s.manifest["sources"])}
        for s, m in zip(stores, source_of, strict=True)
    ]
    entries = []
    for index, task in enumerate(tasks):
        tables, names = [], set()
        for i, s in enumerate(stores):
            own = next((t for t in s.manifest["tasks"] if t["name"] == task["name"]), None)
            if own is None:
                continue
            table = s.examples(task["name"]).mapped(row_of[i])
            table = replace(table, provenance=source_of[i].astype(np.uint32)[table.provenance])
            tables.append(_relabelled(table, task["labels"]))
            names |= {renamed[i][name] for name in own["sources"]}
        joined = concatenate(tables)
        joined.save(work.dir, index=index)
        entries.append({**task, "examples": len(joined), "sources": sorted(names)})
    _publish(stores, plan, entries, sources, work, {"lengthened": lengthened})


def _fits(first: Store, other: Store) -> None:
    """Refuse a store whose tokens were made in another way."""
    pairs = {
        "tokenizer": (first.fingerprint[:16], other.fingerprint[:16]),
        "prompts": (first.prompts, other.prompts),
        "max_length": (first.max_length, other.max_length),
    }
    wrong = [f"{name} is {b}, not {a}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise UsageError(
            f"The store does not fit {first.path.name}: {'; '.join(wrong)}.",
            where=other.path,
            fix="tokenize its records with the tokenizer, prompts and lengths of the first store "
            "(embkit.data.append does so when it is given records)",
        )


def _task_prompts(stores: Sequence[Store]) -> dict[str, dict[str, str]]:
    """Prompts of single tasks in the merged store.

    Raises:
        UsageError: a task has other prompts in one store than in another.
    """
    found: dict[str, dict[str, str]] = {}
    used: dict[str, tuple[Use, Use]] = {}
    for s in stores:
        for task in s.manifest["tasks"]:
            name = task["name"]
            uses = uses_of(name, task["kind"], s.prompts, s.task_prompts)
            if used.setdefault(name, uses) != uses:
                query, passage = (repr(prompt) for _, prompt in used[name])
                raise UsageError(
                    f"The prompts of task {name!r} are not those of a store before, {query} and "
                    f"{passage}.",
                    where=s.path,
                    fix="tokenize its records with those prompts (embkit.data.append does so when "
                    "it is given records), or under another task name",
                )
            if any(TASK_TEXT in prompt for _, prompt in uses) and len(stores) > 1:
                raise UsageError(
                    f"The queries of task {name!r} have prompts of their own, and the store does "
                    "not say which.",
                    where=s.path,
                    fix="tokenize all records together",
                )
            if name in s.task_prompts:
                found.setdefault(name, s.task_prompts[name])
    return found


def _task_list(stores: list[Store]) -> list[dict[str, Any]]:
    """The merged tasks in order of appearance, with the union of their labels."""
    tasks: dict[str, dict[str, Any]] = {}
    for s in stores:
        for task in s.manifest["tasks"]:
            there = tasks.setdefault(task["name"], {**task, "labels": []})
            if there["kind"] != task["kind"]:
                raise UsageError(
                    f"Task {task['name']!r} holds {task['kind']} examples here and "
                    f"{there['kind']} examples in a store before.",
                    where=s.path,
                    fix="read one of them under another task name",
                )
            there["labels"] += [n for n in task["labels"] or () if n not in there["labels"]]
    return list(tasks.values())


def _relabelled(table: Examples, labels: list[str]) -> Examples:
    """The table with its classes numbered as in ``labels``."""
    at = {name: i for i, name in enumerate(labels)}
    new = np.array([*(at[name] for name in table.labels), -1], np.int32)  # -1 stays the last
    return replace(table, label=new[table.label], labels=tuple(labels))


def _sources(stores: list[Store]) -> tuple[list[dict[str, Any]], list[Array]]:
    """The merged list of sources with distinct names, and each store's numbers in it (U16)."""
    merged: list[dict[str, Any]] = []
    taken: set[str] = set()
    numbers = []
    for s in stores:
        start = len(merged)
        for source in s.manifest["sources"]:
            name, count = source["name"], 1
            while name in taken:
                count += 1
                name = f"{re.sub(r'#[0-9]+$', '', source['name'])}#{count}"
            taken.add(name)
            merged.append({**source, "name": name})
        numbers.append(np.arange(start, len(merged)))
    if len(merged) > _MAX_SOURCES:
        raise UsageError(
            f"The stores have {len(merged)} sources; there may be {_MAX_SOURCES}.",
            fix="read fewer, larger files",
        )
    return merged, [n.astype(np.uint16) for n in numbers]


def _prompt_numbers(stores: Sequence[Store]) -> dict[str, int]:
    """A number for each distinct prompt, the same in all stores; "" is among them.

    Raises:
        UsageError: more prompts than a row's form can tell apart.
    """
    first = stores[0].prompts
    named = {p for s in stores for own in s.task_prompts.values() for p in own.values()}
    distinct = dict.fromkeys([first["query"], first["passage"], "", *sorted(named)])
    if len(distinct) > _UNUSED:
        raise UsageError(
            f"The stores have {len(distinct)} prompts; there may be {_UNUSED}.",
            fix="give tasks the same prompts",
        )
    return {prompt: i for i, prompt in enumerate(distinct)}


def _forms(store: Store, number: Mapping[str, int]) -> Array:
    """U8 [rows]: the number of the prompt that stands before each row's text."""
    prompts, named = store.prompts, store.task_prompts
    form = np.full(store.rows, _UNUSED, np.uint8)
    for table in store.tasks().values():
        (_, query), (_, passage) = uses_of(table.name, table.kind, prompts, named)
        form[table.query] = number[query]
        form[table.positive] = number[passage]
        form[table.negative] = number[passage]
    rest = np.flatnonzero(form == _UNUSED).astype(np.uint64)
    if not len(rest):
        return form
    # Rows that no example names: role and prompt tell the form. With prompts of single tasks they
    # are those without one, which prompt dropout takes.
    role, plain = store.role(rest), store.prompt_len(rest) == 0
    if named and not plain.all():
        raise UsageError(
            "The store has rows that no example names, behind prompts of single tasks: they do "
            "not say which.",
            where=store.path,
            fix="tokenize all records together",
        )
    use = np.where(role == 0, number[prompts["query"]], number[prompts["passage"]])
    has = np.where(role == 0, prompts["query"] != "", prompts["passage"] != "")
    form[rest] = np.where(plain & (has | (role == 2) | bool(named)), number[""], use)
    return form


# ---------------------------------------------------------------- subset


def _chosen(name: str, given: Any, size: int) -> Array:
    """Example numbers (int64, ascending) that a mask or a list of numbers names."""
    if given is None:
        return np.arange(size)
    wanted = np.asarray(given)
    if wanted.dtype == bool:
        if wanted.shape != (size,):
            raise UsageError(
                f"The mask of task {name!r} has shape {wanted.shape}, the task {size} examples."
            )
        return np.flatnonzero(wanted)
    if wanted.ndim != 1 or (wanted.size and not np.issubdtype(wanted.dtype, np.integer)):
        raise UsageError(f"examples[{name!r}] is neither a bool mask nor a list of whole numbers.")
    sorted_ = np.unique(wanted.astype(np.int64))
    if len(sorted_) != len(wanted):
        raise UsageError(f"examples[{name!r}] names an example twice.")
    if len(sorted_) and not 0 <= sorted_[0] <= sorted_[-1] < size:
        raise UsageError(
            f"examples[{name!r}] names example {sorted_[0] if sorted_[0] < 0 else sorted_[-1]}, "
            f"the task has {size}."
        )
    return sorted_


def _subset(store: Store, chosen: dict[str, Array], work: Any) -> None:
    used = np.zeros(store.rows, bool)
    for name, at in chosen.items():
        table = store.examples(name).take(at)
        for column in (table.query, table.positive, table.negative):
            used[column] = True
    new_row = np.cumsum(used, dtype=np.uint64) - np.uint64(1)
    row = np.flatnonzero(used).astype(np.uint64)
    entries: list[dict[str, Any]] = []
    for name, at in chosen.items():
        old = next(t for t in store.manifest["tasks"] if t["name"] == name)
        table = store.examples(name).take(at).mapped(new_row)
        table.save(work.dir, index=len(entries))
        names = {store.manifest["sources"][i]["name"] for i in np.unique(table.provenance)}
        entries.append({**old, "examples": len(table), "sources": sorted(names)})
    plan = {
        "row": row,
        "text_id": store.text_id(row),
        "cluster": store.cluster(row),
        "role": store.role(row),
        "source": store.rows_store.source(row),
    }
    _publish([store], plan, entries, store.manifest["sources"], work)


# ---------------------------------------------------------------- both


def _publish(
    stores: list[Store],
    plan: Mapping[str, Any],
    tasks: list[dict[str, Any]],
    sources: list[dict[str, Any]],
    work: Any,
    extra: Mapping[str, int] | None = None,
) -> None:
    first = stores[0]
    with bar("Write shards", total=len(plan["row"]), unit="rows") as progress:
        done = _rust.compose_store(
            str(work.dir),
            _parts(stores),
            **plan,
            digest=work.digest,
            max_length=_limits(first),
            progress=progress.update,
        )
    shutil.copytree(first.tokenizer, work.dir / "tokenizer", dirs_exist_ok=True)
    backends: list[str] = []
    for s in stores:
        backends += [
            b for b in s.manifest["tokenizer"]["backend"].split(" + ") if b not in backends
        ]
    counts = {k: int(done[k]) for k in ("rows", "shards", "tokens", "truncated")}
    plain_rows = all(s.manifest.get("plain_rows") for s in stores)
    named = _task_prompts(stores) if len(stores) > 1 else first.task_prompts
    work.publish(
        {
            "tasks": tasks,
            "sources": sources,
            "tokenizer": {**first.manifest["tokenizer"], "backend": " + ".join(backends)},
            "prompts": first.prompts,
            **({"task_prompts": named} if named else {}),
            # A subset leaves rows out that no example names, and those without prompts are such.
            **({"plain_rows": True} if len(stores) > 1 and plain_rows else {}),
            "max_length": first.max_length,
            "counts": {**counts, "examples": sum(t["examples"] for t in tasks), **(extra or {})},
        }
    )


def _parts(stores: Iterable[Store]) -> list[tuple[str, int]]:
    return [(str(s.path), int(s.manifest["counts"]["shards"])) for s in stores]


def _limits(store: Store) -> list[int]:
    """Limit in tokens of the roles query, passage, both."""
    query, passage = store.max_length["query"], store.max_length["passage"]
    return [query, passage, max(query, passage)]


def _column(store: Store, name: str) -> Array:
    return getattr(store.rows_store, name)(np.arange(store.rows, dtype=np.uint64))


def _is_store(item: Any) -> bool:
    if not isinstance(item, (str, Path)) or not (Path(item) / "manifest.json").is_file():
        return False
    return bool(read_manifest(item).get("format") == KIND)


def _apart(out: Path | str, stores: Iterable[Store]) -> None:
    """Refuse to write over an input."""
    for s in stores:
        if Path(out).resolve() == s.path.resolve():
            raise UsageError(
                "The output is one of the inputs, which are never changed.",
                where=out,
                fix="write to a new directory, then move it",
            )
