"""What the stages that write examples share: asking a step, checks of what comes, publishing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.data.records import publish_records
from embkit.data.tables import Examples, concatenate, from_builder
from embkit.errors import CorruptError, UsageError, nearest
from embkit.synth.llm import LLM, STOP, Completion
from embkit.synth.parse import Invalid, read_answer
from embkit.synth.prompts import Prompt, Step
from embkit.synth.shards import Row, finish, forget

_FAULTS = ("refused", "shape", "empty", "too_long")  # rows that the backend could not answer


def ask(
    step: Step, rows: list[Row], values: list[dict[str, str]], options: Sequence[Any], llm: LLM,
    controls: Mapping[str, Sequence[str]], temperature: float,
) -> list[Completion]:  # fmt: skip
    """Ask a step of all rows that have no reason yet; what they answer goes to their values.

    A row that is answered wrongly gets its reason. Answers of a step with ``items`` are left to
    the caller.

    Returns:
        The answers of the rows that were asked, in order.
    """
    live = [i for i, row in enumerate(rows) if not row["reason"]]
    form: dict[str, Any] = {"stop": (STOP,)} if step.lines else {"schema": step.schema(controls)}
    answers = llm.generate(
        [step.render(values[i]) for i in live],
        max_tokens=step.max_tokens,
        temperature=temperature,
        seeds=[rows[i]["seed"] % (1 << 31) for i in live],
        **form,
    )
    for i, answer in zip(live, answers, strict=True):
        rows[i]["tokens"][0] += answer.prompt_tokens
        rows[i]["tokens"][1] += answer.completion_tokens
        if answer.reason:
            rows[i]["reason"] = answer.reason
            continue
        if step.items:
            continue
        try:
            found, mended = read_answer(answer.text, step, options[i], cut=answer.cut)
        except Invalid as error:
            refuse(rows[i], answer, error)
            continue
        rows[i]["mended"] = rows[i]["mended"] or mended
        values[i] |= found
    return answers


def refuse(row: Row, answer: Completion, error: Invalid) -> None:
    """Keep why an answer cannot be used, and its beginning."""
    reason = "cut" if answer.cut and error.reason == "not_json" else error.reason
    row |= {"reason": reason, "answer": answer.text[:500]}


def seed_of(seed: int, item: int, what: str = "") -> int:
    """The seed of an item: a function of the stage's and the item, whatever the order."""
    text = f"{seed} {what} {item}" if what else f"{seed} {item}"
    return int.from_bytes(bytes.fromhex(_rust.blake3(text.encode())[:12]))


def marked(text: str, prompt: Prompt) -> bool:
    """Whether a text has marks or lines of its prompt."""
    folded = " ".join(text.casefold().split())
    marks = ("<passage", "</passage", "<|", "|>", "json:", "```")
    lines = {
        " ".join(line.casefold().split())
        for step in (*prompt.lists, *prompt.steps)
        for line in step.instructions.splitlines()
    }
    return any(mark in folded for mark in marks) or any(
        len(line) > 20 and (line in folded or (len(folded) > 20 and folded in line))
        for line in lines
    )


def check_answered(
    counts: Counter[str], items: int, max_rejected: float, directory: Path | None = None
) -> str:
    """The counts in words.

    Args:
        directory: the stage's; on an error it forgets the shards with items that were not answered,
            so that the next run asks for these again and for no others.

    Raises:
        CorruptError: the backend has left more than ``max_rejected`` of the items unanswered.
    """
    failed = sum(counts[reason] for reason in _FAULTS)
    said = ", ".join(f"{n} x {why}" for why, n in sorted(counts.items()))
    if failed > max_rejected * items:
        if directory is not None:
            forget(directory, lambda row: row["reason"] in _FAULTS)
        raise CorruptError(
            f"{failed} of {items} items were not answered, the limit is {max_rejected:.1%}"
            f" ({said}).",
            fix="see to the server or the length of the passages and run again, only their "
            "shards are asked; or allow more with max_rejected",
        )
    return said


def retrieval_tasks(
    tables: Mapping[str, Examples], wanted: Sequence[str], where: Path
) -> dict[str, Examples]:
    """The retrieval tasks that are named, or all that have examples.

    Raises:
        UsageError: there is none, or one that is named is none.
    """
    found = {name: t for name, t in tables.items() if t.kind == "retrieval" and len(t)}
    for name in wanted:
        if name not in found:
            raise UsageError(
                f"There is no retrieval task {name!r}; {nearest(name, found)}", where=where
            )
    if not found:
        raise UsageError("These records have no retrieval task.", where=where)
    return {name: t for name, t in found.items() if not wanted or name in wanted}


def publish_examples(
    work: Any, rows: Sequence[Row], lines: Sequence[Mapping[str, Any]], *, task: str,
    prompt: Prompt, llm: LLM, report: Mapping[str, Any],
) -> None:  # fmt: skip
    """Publish a records directory of what a model has written.

    Beside the tables it has ``examples.jsonl``, the same as rows that any trainer reads, and
    ``rows.jsonl``.

    Args:
        work: the stage.
        rows: every item and what became of it.
        lines: the examples, as records.
        task: their task; ``prompt`` says its kind.
    """
    source = f"{llm.name} {prompt.name} {prompt.digest[:16]}"
    body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    builder = _rust.RecordsBuilder(dir=str(work.dir))
    builder.add_lines(body, source, task, prompt.kind)
    content = builder.finish()
    labels = dict(content["labels"]).get(task, ())
    tables = [from_builder(p, provenance=0, labels=labels) for p in content["examples"]]
    _rust.publish_file(str(work.dir / "examples.jsonl"), body)
    every = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
    _rust.publish_file(str(work.dir / "rows.jsonl"), every.encode())
    finish(work.dir)
    sources = [{"name": source, "form": "synth", "task": task, "kind": prompt.kind}]
    publish_records(work, int(content["texts"]), {task: concatenate(tables)}, sources, report)
