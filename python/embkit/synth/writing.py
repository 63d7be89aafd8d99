"""Queries for passages, written by a language model: Gecko's FRet, SWIM-IR, Qwen3's configuration.

For each passage the prompt's steps are asked one after the other; what a step answers is a variable
of the next. An answer of the wrong form is dropped and counted by its reason. Optionally a second
prompt grades what is left, as Gemini's auto-rater does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embkit.data.records import KIND, Records
from embkit.data.tables import task_name
from embkit.errors import CorruptError, UsageError
from embkit.stage import stage
from embkit.synth.asking import ask, check_answered, marked, publish_examples, seed_of
from embkit.synth.llm import LLM
from embkit.synth.passages import Personas, read_passages
from embkit.synth.prompts import Prompt, load
from embkit.synth.score import graded
from embkit.synth.shards import Row, run_shards

_SAMPLES = 5  # of each reason, in the report


@dataclass(frozen=True, kw_only=True)
class Write:
    """How queries are written.

    Attributes:
        prompt: name or file of the prompt.
        sample: how many passages are drawn; 0 takes all.
        per_passage: queries of each passage, each with its own seed and controls.
        controls: options in the place of the prompt's own, by variable (``language = ["de"]``).
        temperature: of the model; 0 is greedy, and then a passage's queries differ by controls.
        seed: of controls and sampling.
        rater: prompt that grades the queries, or None. min_rating: the least grade that stays.
        max_rejected: share of items that the backend may fail to answer.
        shard: items of a shard.
    """

    prompt: str | Path | Prompt = "gecko"
    sample: int = 0
    per_passage: int = 1
    controls: Mapping[str, Sequence[str]] | None = None
    temperature: float = 0.7
    seed: int = 0
    rater: str | Path | Prompt | None = None
    min_rating: float = 1.0
    max_rejected: float = 0.05
    shard: int = 64

    def __post_init__(self) -> None:
        least = min(self.seed, self.temperature, self.sample)
        if self.per_passage < 1 or self.shard < 1 or least < 0:
            raise UsageError(
                "per_passage, shard, seed, sample or temperature is out of range.",
                fix="the first two are at least 1, the others at least 0",
            )
        if not 0 <= self.max_rejected <= 1:
            raise UsageError(f"max_rejected = {self.max_rejected} is no share.")


def write_queries(
    passages: Any,
    *,
    llm: LLM,
    out: Path | str,
    how: Write | None = None,
    task: str = "synthetic",
    personas: Personas | None = None,
    fresh: bool = False,
) -> Records:
    """Write queries for passages; a stage: resumes after a kill, free when done.

    Args:
        passages: see :func:`embkit.synth.passages.read_passages`.
        llm: a backend.
        out: records directory to publish: one retrieval task of (query, passage), ``rows.jsonl``
            with every item and what became of it, ``report.json`` with counts and samples.
        how: settings.
        task: name of the task.
        personas: for prompts with a variable ``{characters}``.
        fresh: do it again even when it is done.

    Raises:
        CorruptError: no passage, no query that can be used, or more than ``max_rejected`` of the
            items were not answered.
        BackendError: the backend as a whole does not answer.
    """
    how = how or Write()
    prompt = load(how.prompt)
    rater = None if how.rater is None else load(how.rater)
    if rater is not None:
        rater.graded  # noqa: B018  wrong ones raise before work begins
    if prompt.kind != "retrieval":
        raise UsageError(
            f"The prompt {prompt.name!r} writes {prompt.kind} data, and takes no passages.",
            fix="embkit synth --prompt NAME --examples N, without passages",
        )
    if any(step.labels or step.answer or step.items for step in prompt.steps):
        raise UsageError(f"The prompt {prompt.name!r} writes nothing.", fix="give its fields")
    if "query" not in prompt.steps[-1].fields:
        raise UsageError(f"The last step of {prompt.name!r} has no field 'query'.")
    controls = {name: tuple(found) for name, found in prompt.controls.items()}
    for name, options in (how.controls or {}).items():
        if name not in controls:
            raise UsageError(f"The prompt {prompt.name!r} has no control {name!r}.")
        controls[name] = tuple(options)
    texts, files, memory = read_passages(passages)
    if 0 < how.sample < len(texts):
        drawn = np.random.default_rng(seed_of(how.seed, 0, "sample")).permutation(len(texts))
        texts = [texts[i] for i in sorted(drawn[: how.sample].tolist())]
    params: dict[str, Any] = {
        "llm": llm.params(), "prompt": prompt.digest, "rater": rater and rater.digest,
        "controls": {name: list(found) for name, found in sorted(controls.items())},
        "per_passage": how.per_passage, "temperature": how.temperature, "seed": how.seed,
        "min_rating": how.min_rating if rater else None, "max_rejected": how.max_rejected,
        "shard": how.shard, "task": task_name(task), "memory": memory,
        "personas": personas and personas.texts,
        **({"sample": how.sample} if how.sample else {}),
    }  # fmt: skip
    with stage(out, name="synth", params=params, inputs=files, kind=KIND, fresh=fresh) as work:
        if not work.done:
            writer = _Writer(texts, llm, how, prompt, rater, controls, personas)
            rows = run_shards(
                work.dir, len(texts) * how.per_passage, how.shard, writer.rows, llm=llm,
                label="Write queries", unit="queries",
            )  # fmt: skip
            _publish(work, rows, texts, task_name(task), prompt, llm, how)
    return Records.open(out)


class _Writer:
    """Makes the rows of a shard: one per item, an item being a passage and a repetition."""

    def __init__(
        self, texts: list[str], llm: LLM, how: Write, prompt: Prompt, rater: Prompt | None,
        controls: Mapping[str, Sequence[str]], personas: Personas | None,
    ) -> None:  # fmt: skip
        self.texts, self.llm, self.how, self.prompt = texts, llm, how, prompt
        self.rater, self.controls, self.personas = rater, controls, personas

    def rows(self, start: int, stop: int) -> list[Row]:
        rows, values, options = [], [], []
        items = range(start, stop)
        passages = [self.texts[i // self.how.per_passage] for i in items]
        characters = self.personas.near(passages) if self.personas else [[]] * len(passages)
        for i, passage, near in zip(items, passages, characters, strict=True):
            seed = seed_of(self.how.seed, i)
            draw = np.random.default_rng(seed)
            drawn = {n: o[int(draw.integers(len(o)))] for n, o in self.controls.items()}
            rows.append({"passage": i // self.how.per_passage, "seed": seed, "reason": "",
                         "prompt": self.prompt.digest, "model": self.llm.name, "tokens": [0, 0],
                         "mended": False, **drawn})  # fmt: skip
            values.append({"passage": passage, **drawn} |
                          ({"characters": "; ".join(near)} if near else {}))  # fmt: skip
            options.append({**self.controls, "characters": near})
        for step in self.prompt.steps:
            ask(step, rows, values, options, self.llm, self.controls, self.how.temperature)
        for row, value in zip(rows, values, strict=True):
            if not row["reason"]:
                row |= {k: v for k, v in value.items() if k not in ("passage", "characters")}
                row["reason"] = unfit(value["query"], value["passage"], self.prompt)
        self._grade(rows, values)
        return rows

    def _grade(self, rows: list[Row], values: list[dict[str, str]]) -> None:
        live = [i for i, row in enumerate(rows) if not row["reason"]]
        if self.rater is None or not live:
            return
        step = self.rater.graded
        found, reasons = graded(
            self.llm, [step.render(values[i]) for i in live], list(step.labels.items())
        )
        for i, grade, reason in zip(live, found.tolist(), reasons, strict=True):
            if not reason:
                rows[i]["rating"] = round(grade, 6)
            rows[i]["reason"] = reason or ("rated" if grade < self.how.min_rating else "")


def unfit(query: str, passage: str, prompt: Prompt) -> str:
    """Why a query cannot be used, one word, or nothing.

    ``copy``: it is the passage, or a long piece of it. ``prompt``: it has marks or lines of the
    prompt, which is what a passage with orders in it leads to.
    """
    folded = " ".join(query.casefold().split())
    body = " ".join(passage.casefold().split())
    if folded == body or (len(folded.split()) > 20 and folded in body):
        return "copy"
    return "prompt" if marked(query, prompt) else ""


def _publish(
    work: Any, rows: list[Row], texts: list[str], task: str, prompt: Prompt, llm: LLM, how: Write
) -> None:
    """Tables of what stays, and the report."""
    counts = Counter(row["reason"] or "kept" for row in rows)
    said = check_answered(counts, len(rows), how.max_rejected, work.dir)
    samples: dict[str, list[Any]] = {}
    for row in rows:
        if row["reason"] and len(samples.setdefault(row["reason"], [])) < _SAMPLES:
            about = {k: row[k] for k in ("answer", "query", "rating") if k in row}
            samples[row["reason"]].append({"passage": texts[row["passage"]][:200], **about})
    report: dict[str, Any] = {
        "items": len(rows), "kept": counts["kept"],
        "dropped": {k: v for k, v in sorted(counts.items()) if k != "kept"},
        "mended": sum(row["mended"] and not row["reason"] for row in rows),
        "prompt_tokens": sum(row["tokens"][0] for row in rows),
        "completion_tokens": sum(row["tokens"][1] for row in rows),
        "prompt": {"name": prompt.name, "digest": prompt.digest}, "model": llm.name,
        "samples": samples,
    }  # fmt: skip
    kept = [row for row in rows if not row["reason"]]
    if not kept:
        raise CorruptError(
            f"No query can be used ({said}).",
            fix="try the prompt on the model by hand; a small model needs a simpler one",
        )
    lines = [
        {"query": row["query"], "positive": texts[row["passage"]],
         **({"task_text": row["task"]} if "task" in row else {})}
        for row in kept
    ]  # fmt: skip
    publish_examples(work, rows, lines, task=task, prompt=prompt, llm=llm, report=report)
