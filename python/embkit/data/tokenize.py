"""From records to a token store: every distinct text tokenised once per form it is used in.

A form is a prompt plus a length limit, decided by the role a text plays in the examples: query,
passage, or either (sentence pairs and labelled texts, which take no prompt and the longer limit). A
task may have prompts of its own.
Forms with the same prompt share one row, so without prompts every text is one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.data import vocabulary
from embkit.data.loader import KIND, Store
from embkit.data.records import Records, as_directory
from embkit.data.tables import Array, Examples
from embkit.data.task_texts import TASK_TEXT, fill
from embkit.errors import UsageError, nearest
from embkit.progress import bar, say
from embkit.stage import stage

QUERY, PASSAGE, BOTH = 0, 1, 2
Use = tuple[str, str]  # of a text: role (query, passage, either) and prompt


def tokenize(
    records: Any,
    *,
    out: Path | str,
    tokenizer: Any = None,
    vocab_size: int = 16000,
    max_length_query: int = 32,
    max_length_passage: int = 96,
    prompts: Mapping[str, str] | None = None,
    task_prompts: Mapping[str, Mapping[str, str]] | None = None,
    task_texts: Mapping[str, str] | None = None,
    prompt_dropout: bool = False,
    end_token: str = "",
    on_long: str = "truncate",
    backend: str = "auto",
    fresh: bool = False,
) -> Store:
    """Tokenise records into a store.

    Args:
        records: a Records, a records directory, or anything :func:`embkit.data.read` takes.
        out: the store directory to publish.
        tokenizer: what :func:`embkit.data.vocabulary.load_tokenizer` takes; None trains a
            WordPiece of ``vocab_size`` on these records.
        max_length_query, max_length_passage: tokens kept, special tokens included.
        prompts: text before a query or passage, ``{"query": "", "passage": ""}``.
        task_prompts: per task what takes the place of ``prompts``: ``query`` and ``passage`` of a
            retrieval task, ``text`` of the others. A query's may have ``{task_text}``.
        task_texts: by query, what takes its place. A query that has none, or one of more than half
            of the query's tokens, takes ``prompts``; both are counted.
        prompt_dropout: keep every text without its prompt too, for training that leaves prompts
            out at random.
        end_token: a token of the vocabulary to put behind each text, e.g. ``"<|endoftext|>"``; the
            store's tokenizer has it in its post-processor.
        on_long: ``"truncate"`` cuts texts above their limit and counts them; ``"error"`` publishes
            nothing when there is one.
        backend: ``"auto"`` takes the fast path where it knows the tokenizer (docs/tokenizers.md),
            ``"tokenizers"`` the package of that name for every text. The shards are the same.
        fresh: do it again even when it is done.

    Raises:
        UsageError: unknown tokenizer, prompt role or option, lengths below 3, no examples at all,
            or a text above its limit with ``on_long="error"``.
    """
    _one_of("on_long", on_long, ("truncate", "error"))
    _one_of("backend", backend, ("auto", "tokenizers"))
    prompts = dict(prompts or {})
    wrong = set(prompts) - {"query", "passage"}
    if wrong:
        raise UsageError(f"Unknown prompt {sorted(wrong)}.", fix="the roles are query and passage")
    if any(TASK_TEXT in prompt for prompt in prompts.values()):
        raise UsageError(
            f"{TASK_TEXT} is said by the rows of a task, and this prompt is that of all.",
            fix="put it into tasks.NAME.description or tasks.NAME.prompt_query",
        )
    if min(max_length_query, max_length_passage) < 3:
        raise UsageError("A text needs room for 3 tokens.", fix="raise max_length_*")
    given = vocabulary.load_tokenizer(tokenizer) if tokenizer is not None else None
    if given and end_token:
        given = vocabulary.ending_with(given[0], end_token), given[1]
    records = as_directory(records, out)
    params: dict[str, Any] = {
        "tokenizer": _rust.blake3(given[0].encode()) if given else None,
        "vocab_size": None if given else vocab_size,
        "max_length": {"query": max_length_query, "passage": max_length_passage},
        "prompts": {role: prompts.get(role, "") for role in ("query", "passage")},
    }
    own = dict(task_texts or {})
    if task_prompts:
        _check_task_prompts(task_prompts, records)
        params["task_prompts"] = {task: dict(sides) for task, sides in task_prompts.items()}
        if any(TASK_TEXT in sides.get("query", "") for sides in task_prompts.values()):
            said = json.dumps(own, sort_keys=True).encode()  # ASCII: a half of a character too
            params["task_texts"] = _rust.blake3(said)
    if prompt_dropout:
        params["prompt_dropout"] = True
    if end_token and given is None:  # of a tokenizer that is given, its digest says it
        params["end_token"] = end_token
    if on_long == "error":  # a finished store that was cut must not pass for one that was not
        params["on_long"] = on_long
    with stage(
        out, name="tokenize", params=params, inputs=[records.dir], kind=KIND, fresh=fresh
    ) as work:
        if not work.done:
            _run(records, given, params, work, backend, own)
    return Store(out)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"Unknown {name} = {value!r}; {nearest(value, known)}")


def _run(
    records: Records, given: Any, params: dict[str, Any], work: Any, backend: str,
    task_texts: Mapping[str, str],
) -> None:  # fmt: skip
    texts = records.texts
    tables = records.tasks()
    if not sum(map(len, tables.values())):
        raise UsageError("The records hold no examples.", where=records.dir)
    if given is None:
        with bar("Train tokenizer", total=len(texts), unit="texts") as progress:
            given = vocabulary.train_wordpiece(texts, vocab_size=params["vocab_size"]), {}
            progress.update(len(texts))
        if "end_token" in params:
            given = vocabulary.ending_with(given[0], params["end_token"]), {}
    tokenizer_json, config = given
    plain = "prompt_dropout" in params
    named = params.get("task_prompts", {})
    rows = plan_rows(tables, len(texts), params["prompts"], task_prompts=named, plain=plain)
    source = _sources(tables, len(texts))
    longest = max(params["max_length"].values())
    _check_room(rows.row_of, tokenizer_json, {**params["max_length"], "either": longest})
    told = None
    if "task_texts" in params:
        rows, told = fill(
            rows, texts, task_texts, tokenizer_json=tokenizer_json,
            limit=params["max_length"]["query"], role=params["prompts"]["query"],
        )  # fmt: skip
    limits = [params["max_length"]["query"], params["max_length"]["passage"], longest]
    with bar("Tokenize", total=len(rows.text), unit="rows") as progress:
        done = _rust.tokenize(
            str(work.dir),
            texts.shards,
            rows.text,
            rows.prompt,
            rows.prompts,
            rows.role,
            source[rows.text],
            texts.text_id[rows.text],
            texts.cluster[rows.text],
            tokenizer_json,
            limits,
            backend=backend,
            refuse_long="on_long" in params,
            progress=progress.update,
        )
        progress.update(len(rows.text))
    if done["slow"] and backend == "auto":
        say(f"tokenized by {done['backend']} alone: {done['slow']}")
    tasks = []
    for index, (old, table) in enumerate(
        zip(records.manifest["tasks"], tables.values(), strict=True)
    ):
        query, passage = uses_of(table.name, table.kind, params["prompts"], named)
        table = table.mapped(rows.row_of[passage], query_of=rows.row_of[query])
        table.save(work.dir, index=index)
        tasks.append({**old, "examples": len(table)})
    vocabulary.write(work.dir / "tokenizer", tokenizer_json, config)
    work.publish(
        {
            "tasks": tasks,
            "sources": records.manifest["sources"],
            "tokenizer": {
                "fingerprint": _rust.blake3(tokenizer_json.encode()),
                "vocab_size": len(json.loads(tokenizer_json)["model"].get("vocab", ())),
                "backend": str(done["backend"]),
            },
            "prompts": params["prompts"],
            **({"task_prompts": named} if named else {}),
            **({"plain_rows": True} if plain else {}),
            "max_length": params["max_length"],
            "counts": {
                "rows": len(rows.text),
                "shards": int(done["shards"]),
                "tokens": int(done["tokens"]),
                "truncated": int(done["truncated"]),
                "examples": sum(t["examples"] for t in tasks),
                **({"task_texts": told} if told else {}),
            },
        }
    )


# ---------------------------------------------------------------- which rows a store has


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a store to be.

    Attributes:
        text: U64 [rows], the text of each row.
        prompt: U16 [rows], an index into ``prompts``.
        role: U8 [rows], 0 query, 1 passage, 2 both or either.
        prompts: the distinct prompts.
        row_of: per use U64 [texts], the row of a text so used.
    """

    text: Array
    prompt: Array
    role: Array
    prompts: list[str]
    row_of: dict[Use, Array]


def plan_rows(
    tables: Mapping[str, Examples],
    texts: int,
    prompts: Mapping[str, str],
    *,
    task_prompts: Mapping[str, Mapping[str, str]] | None = None,
    plain: bool = False,
) -> Rows:
    """Decide the rows: texts in their order, for each the forms that the examples use.

    Args:
        tables: the examples, in text rows.
        texts: number of texts.
        prompts: prompt per role; texts used either way take none.
        task_prompts: per task instead, see :func:`tokenize`.
        plain: give every text a row without a prompt, next to the one with it.
    """
    named = task_prompts or {}
    used: dict[Use, Array] = {}
    for table in tables.values():
        query, passage = uses_of(table.name, table.kind, prompts, named)
        for use, columns in ((query, [table.query]), (passage, [table.positive, table.negative])):
            at = used.setdefault(use, np.zeros(texts, bool))
            for column in columns:
                at[column] = True
    distinct = list(dict.fromkeys([prompts["query"], prompts["passage"], ""]))
    distinct += sorted({prompt for _, prompt in used} - set(distinct))
    there = np.zeros((texts, len(distinct)), bool)
    role = np.zeros((texts, len(distinct)), np.uint8)
    for i, before in enumerate(distinct):
        mine = [(r, at) for (r, p), at in used.items() if p == before or (plain and not before)]
        q = np.logical_or.reduce([at for r, at in mine if r != "passage"] or [there[:, i]])
        p = np.logical_or.reduce([at for r, at in mine if r != "query"] or [there[:, i]])
        there[:, i] = q | p
        role[:, i] = np.where(q & p, BOTH, np.where(p, PASSAGE, QUERY))
    row = np.cumsum(there.reshape(-1)).reshape(there.shape) - 1
    text, prompt = np.nonzero(there)
    return Rows(
        text=text.astype(np.uint64),
        prompt=prompt.astype(np.uint16),
        role=role[there],
        prompts=distinct,
        row_of={use: row[:, distinct.index(use[1])].astype(np.uint64) for use in used},
    )


def uses_of(
    task: str,
    kind: str,
    prompts: Mapping[str, str],
    task_prompts: Mapping[str, Mapping[str, str]],
) -> tuple[Use, Use]:
    """How a task uses the texts of its query and its positive column: (role, prompt)."""
    own = task_prompts.get(task, {})
    if kind != "retrieval":
        use = ("either", own.get("text", ""))
        return use, use
    return tuple((r, own.get(r, prompts[r])) for r in ("query", "passage"))  # type: ignore[return-value]


def _check_task_prompts(given: Mapping[str, Mapping[str, str]], records: Records) -> None:
    kinds = {t["name"]: t["kind"] for t in records.manifest["tasks"]}
    for task, sides in given.items():
        if task not in kinds:
            raise UsageError(f"task_prompts: no task {task!r}; {nearest(task, kinds)}")
        known = ("query", "passage") if kinds[task] == "retrieval" else ("text",)
        for side in sides:
            if side not in known:
                raise UsageError(
                    f"task_prompts.{task} has {side!r}, and the task is {kinds[task]}.",
                    fix=f"its texts are {' and '.join(known)}",
                )
            if side != "query" and TASK_TEXT in sides[side]:
                raise UsageError(
                    f"task_prompts.{task}.{side} has {TASK_TEXT}, which is said of queries.",
                    fix="put it into the prompt of a retrieval task's query",
                )


def _check_room(uses: Iterable[Use], tokenizer_json: str, limits: Mapping[str, int]) -> None:
    """Refuse a prompt that leaves no token for the text behind it."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_truncation()
    for role, prompt in uses:
        taken = len(tokenizer.encode(prompt).ids)
        if prompt and taken >= limits[role]:
            raise UsageError(
                f"The prompt {prompt!r} takes {taken} tokens, and max_length is {limits[role]}.",
                where=f"texts of role {role}",
                fix="raise max_length_query or max_length_passage, or shorten the prompt",
            )


def _sources(tables: Mapping[str, Examples], texts: int) -> Array:
    """U16 [texts]: the first source that names each text."""
    source = np.full(texts, np.iinfo(np.uint16).max, np.uint16)
    for table in tables.values():
        order = table.provenance.astype(np.uint16)
        np.minimum.at(source, table.query, order)
        for offsets, values in (
            (table.positive_offsets, table.positive),
            (table.negative_offsets, table.negative),
        ):
            np.minimum.at(source, values, np.repeat(order, np.diff(offsets.astype(np.int64))))
    return source
