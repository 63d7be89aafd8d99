"""Labelled texts and graded pairs out of nothing: Gemini Embedding's multi-stage prompts.

First the model makes lists (personas, products, films), one under the entries of another where the
prompt says so, and only the tail of each list is used: what comes first comes every time. Then it
writes texts for a label under drawn entries and controls; labels follow a target distribution. At
last it judges each text again without being told the label, and what does not fit is dropped.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.data.records import KIND, Records
from embkit.data.tables import task_name
from embkit.errors import CorruptError
from embkit.progress import say
from embkit.stage import stage
from embkit.synth.asking import ask, check_answered, marked, publish_examples, refuse, seed_of
from embkit.synth.labelled_plan import Labelled, Plan, apportion
from embkit.synth.llm import LLM
from embkit.synth.parse import Invalid, read_list
from embkit.synth.prompts import Listing, Prompt
from embkit.synth.score import label_weights
from embkit.synth.shards import Row, run_shards

_SAMPLES = 5  # of each reason, in the report
Entries = dict[str, list[dict[str, str]]]  # of each list: its variable, and those it was made under


def write_labelled(
    *, llm: LLM, out: Path | str, how: Labelled | None = None, task: str | None = None,
    fresh: bool = False,
) -> Records:  # fmt: skip
    """Write labelled texts or graded pairs; a stage: resumes after a kill, free when done.

    Args:
        llm: a backend; one with log-probabilities where texts are judged.
        out: records directory to publish: one task, ``rows.jsonl`` with every text and what became
            of it, ``lists.jsonl`` with every entry of the lists, ``report.json``.
        how: settings.
        task: name of the task; the prompt's by default.
        fresh: do it again even when it is done.

    Raises:
        UsageError: a prompt of another kind, or unknown labels, lists or controls.
        CorruptError: a list without two entries, texts of less than two labels, or more than
            ``max_rejected`` of the requests not answered.
        BackendError: the backend as a whole does not answer.
    """
    plan = Plan(how or Labelled())
    name = task_name(task or plan.prompt.name)
    params = {"llm": llm.params(), "task": name, **plan.params()}
    with stage(out, name="labelled", params=params, kind=KIND, fresh=fresh) as work:
        if not work.done:
            entries, made = _lists(plan, llm, work.dir)
            writer = _Writer(plan, llm, entries)
            rows = run_shards(
                work.dir, plan.requests, plan.how.shard, writer.rows, llm=llm,
                label="Write texts", unit="requests",
            )  # fmt: skip
            _publish(work, plan, llm, name, rows, made)
    return Records.open(out)


# ---------------------------------------------------------------- lists


def _lists(plan: Plan, llm: LLM, directory: Path) -> tuple[Entries, list[Row]]:
    """Entries of all lists, and a row for each answer or entry, with what became of it."""
    entries: Entries = {}
    every: list[Row] = []
    for listing in plan.prompt.lists:
        name = listing.name
        if name in plan.given:
            entries[name] = [{name: text} for text in plan.given[name]]
            continue
        above = plan.parent(listing)
        contexts = [c for c in (entries[above] if above else [{}]) for _ in range(listing.calls)]
        folder = directory / "lists" / name
        folder.mkdir(parents=True, exist_ok=True)

        def work(start: int, stop: int, listing: Listing = listing, under: Any = contexts) -> Any:
            return _entries(plan, llm, listing, under, start, stop)

        made = run_shards(
            folder, len(contexts), plan.how.shard, work, llm=llm, label=f"List of {name}",
            unit="lists",
        )  # fmt: skip
        seen: set[tuple[str, str]] = set()
        for row in made:
            key = (row["under"].get(above, ""), str(row.get("entry")).casefold())
            if not row["reason"] and key in seen:
                row["reason"] = "repeat"
            seen.add(key)
        every += made
        entries[name] = [{**row["under"], name: row["entry"]} for row in made if not row["reason"]]
        if len(entries[name]) < 2:
            said = check_answered(_reasons(made), len(made), 1.0)
            raise CorruptError(
                f"The list {name!r} has {len(entries[name])} entries ({said}).",
                fix="try the prompt on the model by hand, or give the list's entries yourself",
            )
    return entries, every


def _entries(
    plan: Plan, llm: LLM, listing: Listing, under: Sequence[dict[str, str]], start: int, stop: int
) -> list[Row]:
    asked: list[Row] = []
    values: list[dict[str, str]] = []
    for i in range(start, stop):
        seed = seed_of(plan.how.seed, i, f"list {listing.name}")
        drawn = _drawn(plan, seed)
        asked.append({"list": listing.name, "call": i, "under": under[i], "seed": seed,
                      "reason": "", "tokens": [0, 0], "mended": False})  # fmt: skip
        values.append({**drawn, **under[i]})
    return _each(listing, asked, values, plan, llm, "entry")


def _drawn(plan: Plan, seed: int) -> dict[str, str]:
    """Options of all controls."""
    draw = np.random.default_rng(seed)
    return {n: options[int(draw.integers(len(options)))] for n, options in plan.controls.items()}


def _each(
    step: Any, asked: list[Row], values: list[dict[str, str]], plan: Plan, llm: LLM, field: str
) -> list[Row]:
    """Ask a step with a list for an answer: a row for each text of it, or one with the reason."""
    live = [row for row in asked if not row["reason"]]
    options = [plan.controls] * len(asked)
    answers = ask(step, asked, values, options, llm, plan.controls, plan.how.temperature)
    answer_of = {id(row): answer for row, answer in zip(live, answers, strict=True)}
    out: list[Row] = []
    for row in asked:
        if row["reason"]:
            out.append(row)
            continue
        answer = answer_of[id(row)]
        try:
            found, mended = read_list(answer.text, step)
        except Invalid as error:
            refuse(row, answer, error)
            out.append(row)
            continue
        for at, (text, reason) in enumerate(found):
            reason = reason or ("prompt" if marked(text, plan.prompt) else "")
            # What an answer has cost is counted once.
            out.append({**row, "at": at, field: text, "reason": reason, "mended": mended,
                        "tokens": row["tokens"] if at == 0 else [0, 0]})  # fmt: skip
    return out


# ---------------------------------------------------------------- texts


class _Writer:
    """Makes the rows of a shard: a request is a label, an entry of each list, and controls."""

    def __init__(self, plan: Plan, llm: LLM, entries: Entries) -> None:
        self.plan, self.llm, self.entries = plan, llm, entries
        made = [one for one in plan.prompt.lists if one.name not in plan.given]
        above = {plan.parent(listing) for listing in made}
        # An entry brings those along that it was made under.
        self.leaves = [name for name in entries if name not in above]

    def rows(self, start: int, stop: int) -> list[Row]:
        plan, prompt = self.plan, self.plan.prompt
        asked: list[Row] = []
        values: list[dict[str, str]] = []
        for i in range(start, stop):
            seed = seed_of(plan.how.seed, i, "text")
            label = plan.labels[i]
            drawn = {**_drawn(plan, seed), **self._entries(i)}
            asked.append({"request": i, "at": 0, "seed": seed, "reason": "", "label": label,
                          "prompt": prompt.digest, "model": self.llm.name, "tokens": [0, 0],
                          "mended": False, **drawn})  # fmt: skip
            values.append({"label": label, "about": prompt.labels[label].about, **drawn})
        *first, last = prompt.steps
        options = [plan.controls] * len(asked)
        for step in first:
            ask(step, asked, values, options, self.llm, plan.controls, plan.how.temperature)
        if last.items:
            rows = _each(last, asked, values, plan, self.llm, "text")
        else:
            ask(last, asked, values, options, self.llm, plan.controls, plan.how.temperature)
            rows = asked
            for row, value in zip(rows, values, strict=True):
                if not row["reason"]:
                    row |= {name: value[name] for step in prompt.steps for name in step.fields}
                    row["reason"] = self._unfit(row)
        self._judge(rows)
        return rows

    def _entries(self, i: int) -> dict[str, str]:
        """Entries of request ``i``: each list is gone through in a new order each time."""
        out: dict[str, str] = {}
        for name in self.leaves:
            turn, at = divmod(i, len(self.entries[name]))
            draw = np.random.default_rng(seed_of(self.plan.how.seed, turn, f"turn {name}"))
            out |= self.entries[name][int(draw.permutation(len(self.entries[name]))[at])]
        return out

    def _unfit(self, row: Row) -> str:
        texts = [row[name] for name in _columns(self.plan.prompt)]
        if len({text.casefold() for text in texts}) < len(texts):
            return "copy"
        return "prompt" if any(marked(text, self.plan.prompt) for text in texts) else ""

    def _judge(self, rows: list[Row]) -> None:
        """What the model takes a text for, when it is not told the label."""
        how, prompt = self.plan.how, self.plan.prompt
        live = [row for row in rows if not row["reason"]]
        if not how.judge or prompt.judge is None or not live:
            return
        step = prompt.judge
        names = list(step.labels)
        weights, reasons = label_weights(self.llm, [step.render(row) for row in live], names)
        for row, weight, reason in zip(live, weights, reasons, strict=True):
            if reason:
                row["reason"] = reason
                continue
            weight = weight / weight.sum()
            row["judged"] = names[int(weight.argmax())]
            if prompt.kind == "classification":
                row["fit"] = round(float(weight[names.index(row["label"])]), 6)
                fits = row["fit"] >= how.min_fit
            else:
                row["grade"] = round(float((weight * list(step.labels.values())).sum()), 6)
                fits = (
                    abs(row["grade"] - float(prompt.labels[row["label"]].score or 0)) <= how.max_off
                )
            row["reason"] = "" if fits else "label"


def _columns(prompt: Prompt) -> tuple[str, ...]:
    return ("text",) if prompt.kind == "classification" else ("sentence1", "sentence2")


def _reasons(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row["reason"] or "kept" for row in rows)


def _publish(work: Any, plan: Plan, llm: LLM, task: str, rows: list[Row], made: list[Row]) -> None:
    """Repeats and what is too much of a label go; then tables and report."""
    prompt, columns = plan.prompt, _columns(plan.prompt)
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        if row["reason"]:
            continue
        key = tuple(" ".join(row[name].casefold().split()) for name in columns)
        row["reason"] = "repeat" if key in seen else ""
        seen.add(key)
    written = Counter(row["label"] for row in rows if not row["reason"])
    if plan.how.balance:
        _balance(rows, plan.shares, written)
    kept = [row for row in rows if not row["reason"]]
    counts, stays = _reasons(rows), Counter(row["label"] for row in kept)
    said = check_answered(counts, len(rows), plan.how.max_rejected, work.dir)
    if none := [name for name, share in plan.shares.items() if share > 0 and not stays[name]]:
        say(f"no text can be used of: {', '.join(none)} ({said})")
    if len(stays) < 2:
        raise CorruptError(
            f"Texts of {len(stays)} labels can be used ({said}).",
            fix="try the prompt on the model by hand; a small model needs a simpler one",
        )
    samples: dict[str, list[Any]] = {}
    for row in rows:
        if row["reason"] and len(samples.setdefault(row["reason"], [])) < _SAMPLES:
            about = ("label", *columns, "fit", "grade", "judged", "answer")
            samples[row["reason"]].append({k: row[k] for k in about if k in row})
    total = sum(plan.shares.values())
    report: dict[str, Any] = {
        "requests": plan.requests, "items": len(rows), "kept": len(kept),
        "dropped": {k: v for k, v in sorted(counts.items()) if k != "kept"},
        "labels": {
            name: {"wanted": round(share / total, 6), "fit": written[name], "kept": stays[name],
                   "share": round(stays[name] / len(kept), 6)}
            for name, share in plan.shares.items()
        },
        "lists": {
            listing.name: dict(sorted(_reasons([r for r in made if r["list"] == listing.name])
                                      .items())) or {"given": len(plan.given[listing.name])}
            for listing in prompt.lists
        },
        "mended": sum(row["mended"] for row in kept),
        "prompt_tokens": sum(row["tokens"][0] for row in [*rows, *made]),
        "completion_tokens": sum(row["tokens"][1] for row in [*rows, *made]),
        "prompt": {"name": prompt.name, "digest": prompt.digest}, "model": llm.name,
        "samples": samples,
    }  # fmt: skip
    lines = []
    for row in kept:
        line = {name: row[name] for name in columns}
        score = prompt.labels[row["label"]].score
        lines.append(line | ({"score": score} if prompt.kind == "sts" else {"label": row["label"]}))
    body = "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in made)
    _rust.publish_file(str(work.dir / "lists.jsonl"), body.encode())
    shutil.rmtree(work.dir / "lists", ignore_errors=True)
    publish_examples(work, rows, lines, task=task, prompt=prompt, llm=llm, report=report)


def _balance(rows: Sequence[Row], shares: Mapping[str, float], written: Counter[str]) -> None:
    """Mark the last rows of labels that have more than their share of what can be kept.

    A label without any text is left out: it would leave nothing of the others.
    """
    there = {name: share for name, share in shares.items() if share > 0 and written[name]}
    if len(there) < 2:
        return
    most = min(int(written[name] * sum(there.values()) / share) for name, share in there.items())
    room = {name: min(n, written[name]) for name, n in
            zip(there, apportion(list(there.values()), most), strict=True)}  # fmt: skip
    for row in rows:
        if row["reason"]:
            continue
        room[row["label"]] -= 1
        row["reason"] = "surplus" if room[row["label"]] < 0 else ""
