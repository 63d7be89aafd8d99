"""Labelled sets as training examples, by the rules of docs/conversions.md.

A rule takes the rows of a set as dicts and gives rows of the normal columns, which are then read as
any others. What it leaves out is counted: faults (a row that is not what the rule reads) and drops
(a sound row that makes no example). All draws are functions of the seed and the row.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from embkit.errors import UsageError
from embkit.recipe.tasks import RULES, Conversion

Row = dict[str, Any]
_SAMPLES = 3  # rows that a report shows of each reason
_EXCERPT = 120

# Names of columns by what they are, the first that a row has is read.
COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentences", "query", "anchor"),
    "label": ("label", "labels", "class", "gold_label"),
    "sentence1": ("sentence1", "text1", "question1", "anchor", "source", "src", "sent1"),
    "sentence2": ("sentence2", "text2", "question2", "positive", "target", "tgt", "sent2"),
    "score": ("score", "scores", "label", "similarity_score", "similarity"),
    "pair_label": ("label", "labels", "is_duplicate", "score"),
    "premise": ("premise", "sentence1", "anchor"),
    "hypothesis": ("hypothesis", "sentence2"),
    "query": ("query", "question", "anchor", "query_text"),
    "positive": ("positive", "positives", "pos", "positive_passages"),
    "negative": ("negative", "negatives", "neg", "negative_passages"),
    "documents": ("documents", "docs", "passages", "texts"),
    "grades": ("grades", "labels", "scores", "relevance"),
    "title": ("title", "headline", "heading"),
    "body": ("body", "text", "abstract", "content", "contents", "passage"),
}


class Fault(ValueError):
    """A row is not what its rule reads; the message is the reason that is counted."""


@dataclass
class Counts:
    """What a conversion has seen.

    Attributes:
        rows: read. examples: made.
        faults, dropped: rows by reason. samples: the first of each reason.
    """

    rows: int = 0
    examples: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def drop(self, reason: str, row: int, text: object) -> None:
        """Count a sound row without an example."""
        self._count(self.dropped, reason, row, text)

    def fault(self, reason: str, row: int, text: object) -> None:
        """Count a row that cannot be read."""
        self._count(self.faults, reason, row, text)

    def _count(self, into: Counter[str], reason: str, row: int, text: object) -> None:
        into[reason] += 1
        if into[reason] <= _SAMPLES:
            self.samples.append({"row": row, "reason": reason, "text": str(text)[:_EXCERPT]})

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return {
            "rows": self.rows,
            "examples": self.examples,
            "faults": dict(sorted(self.faults.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Reader:
    """Cells of rows by what they are; numbers rows and counts those that cannot be read."""

    how: Conversion
    counts: Counts

    def cell(self, row: Row, name: str) -> Any:
        """A value, or None."""
        names = (self.how.columns[name],) if name in self.how.columns else COLUMNS[name]
        return next((row[n] for n in names if row.get(n) is not None), None)

    def text(self, row: Row, name: str) -> str:
        """A text that is not blank."""
        value = self.cell(row, name)
        if value is None:
            raise Fault(f"no column for {name}")
        return _text(value, name)

    def texts(self, row: Row, name: str) -> list[str]:
        """A list of texts, or one; empty where the column is missing."""
        value = self.cell(row, name)
        if value is None:
            return []
        return [_text(v, name) for v in (value if isinstance(value, list) else [value])]

    def label(self, row: Row, name: str = "label") -> str:
        """A class as text: 1, 1.0, True and "1" are the same."""
        value = self.cell(row, name)
        if isinstance(value, bool):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, (int, str)) or not str(value).strip():
            raise Fault("no label" if value is None else f"a label of type {type(value).__name__}")
        return self.how.names.get(str(value), str(value))

    def number(self, row: Row, name: str) -> float:
        """A finite number, also as text."""
        return _number(self.cell(row, name), name)

    def each(self, rows: Iterable[Row | None], read: Callable[[Row], Any]) -> Iterator[Any]:
        """``(number, what read gives)`` of each row that can be read; None is no JSON object."""
        for i, row in enumerate(rows):
            self.counts.rows += 1
            if row is None:
                self.counts.fault("no JSON object", i, "")
                continue
            try:
                found = read(row)
            except Fault as fault:
                self.counts.fault(str(fault), i, row)
                continue
            yield i, found


def convert(
    rows: Iterable[Row | None], how: Conversion, counts: Counts | None = None
) -> Iterator[Row]:
    """Rows of the normal columns from the rows of a labelled set.

    Args:
        rows: as they are in the set; None for a line that is no JSON object.
        how: the rule. Rules that group rows (classes, pairs, nli) hold all of them in memory.
        counts: filled with what was read, made, and left out.

    Raises:
        UsageError: a column is named for something that no rule knows.
    """
    counts = Counts() if counts is None else counts
    for name in how.columns:
        if name not in COLUMNS:
            raise UsageError(
                f"convert.columns names {name!r}.",
                fix="what columns are for: " + ", ".join(COLUMNS),
            )
    for row in _RULES[how.rule](rows, Reader(how, counts)):
        counts.examples += 1
        yield row


def classes(rows: Iterable[Row | None], how: Conversion) -> dict[str, str]:
    """The class of each text of a labelled set; texts of several classes are left out."""
    of = Reader(how, Counts())
    found: dict[str, str] = {}
    unclear: set[str] = set()
    for _, (text, label) in of.each(rows, lambda row: (of.text(row, "text"), of.label(row))):
        if found.setdefault(text, label) != label:
            unclear.add(text)
    return {text: label for text, label in found.items() if text not in unclear}


# ---------------------------------------------------------------- rules


def _classes(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """Another text of the class is the positive, texts of other classes are hard negatives."""
    label_of: dict[str, str] = {}
    first: dict[str, int] = {}
    unclear: set[str] = set()
    for i, (text, label) in of.each(rows, lambda row: (of.text(row, "text"), of.label(row))):
        if text not in label_of:
            label_of[text], first[text] = label, i
        elif label_of[text] == label:
            of.counts.drop("a repeat", i, text)
        else:
            unclear.add(text)
            of.counts.drop("a text of several classes", i, text)
    for text in unclear:
        of.counts.drop("a text of several classes", first[text], text)
        del label_of[text]
    # Texts in class order, so that those of other classes are all but one run.
    order = sorted(label_of, key=lambda text: (label_of[text], first[text]))
    bounds: dict[str, tuple[int, int]] = {}
    for place, text in enumerate(order):
        start, _ = bounds.get(label_of[text], (place, place))
        bounds[label_of[text]] = (start, place + 1)
    want = 1 if of.how.negatives is None else of.how.negatives
    place_of = {text: place for place, text in enumerate(order)}
    for text, label in label_of.items():
        i, (start, end) = first[text], bounds[label]
        if end - start < 2:
            of.counts.drop("no other text of its class", i, text)
            continue
        key = (of.how.seed, i)
        place = start + _draw(end - start - 1, *key, "positive")
        others = len(order) - (end - start)
        if want and not others:
            of.counts.drop("no text of another class", i, text)
            continue
        positive = order[place + (place >= place_of[text])]
        drawn = _sample(others, want, *key, "negative")
        negative = [order[n if n < start else n + end - start] for n in drawn]
        if of.how.unique_id:
            # Told apart by this alone, other examples' passages become easy, and the own hard
            # negative decides.
            mark = f" {_digest(*key, 'id')[:5].hex()}"
            text, positive = text + mark, positive + mark
            negative = [n + mark for n in negative]
        yield {"query": text, "positive": [positive], "negative": negative}


def _label_names(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """The name of the class is the positive, names of other classes are hard negatives."""
    found = list(of.each(rows, lambda row: (of.text(row, "text"), of.label(row))))
    labels = sorted({label for _, (_, label) in found})
    for i, (text, label) in found:
        others = [name for name in labels if name != label]
        if not others:
            of.counts.drop("no other class", i, text)
            continue
        if of.how.negatives is not None:
            drawn = _sample(len(others), of.how.negatives, of.how.seed, i, "negative")
            others = [others[n] for n in sorted(drawn)]
        yield {"query": text, "positive": [label], "negative": others}


def _pairs(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """Pairs of label 1 are pairs; of label 0, hard negatives of the same first sentence."""
    sides: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for i, (a, b, same) in of.each(rows, lambda row: _labelled(row, of)):
        if a == b:
            of.counts.drop("both sides are one text", i, a)
            continue
        sides.setdefault(a, ({}, {}))[0 if same else 1].setdefault(b, i)
    yield from _grouped(sides, of, "a pair of both labels", "no pair of label 1")


def _pair_scores(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """Pairs of label 1 and 0 as graded pairs."""
    for _, (a, b, same) in of.each(rows, lambda row: _labelled(row, of)):
        yield {"sentence1": a, "sentence2": b, "score": float(same)}


def _scored_pairs(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """Graded pairs of a high score as pairs."""

    def read(row: Row) -> tuple[str, str, float]:
        return of.text(row, "sentence1"), of.text(row, "sentence2"), of.number(row, "score")

    least = of.how.min_score if of.how.min_score is not None else 0.0
    for i, (a, b, score) in of.each(rows, read):
        if score < least:
            of.counts.drop("a score below min_score", i, a)
        elif a == b:
            of.counts.drop("both sides are one text", i, a)
        else:
            yield {"query": a, "positive": [b]}


def _bitext(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """Each side of a translation finds the other."""

    def read(row: Row) -> tuple[str, str]:
        both = row.get("translation")
        if isinstance(both, Mapping) and len(both) == 2:
            a, b = (_text(both[key], "translation") for key in sorted(both))
            return a, b
        return of.text(row, "sentence1"), of.text(row, "sentence2")

    for i, (a, b) in of.each(rows, read):
        if a == b:
            of.counts.drop("both sides are one text", i, a)
            continue
        yield {"query": a, "positive": [b]}
        yield {"query": b, "positive": [a]}


_NLI = {
    "0": "entailment",
    "1": "neutral",
    "2": "contradiction",
    "-1": "none",
    "-": "none",
    "not_entailment": "neutral",
}


def _nli(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """What a premise entails is its positive, what contradicts it a hard negative."""

    def read(row: Row) -> tuple[str, str, str]:
        label = of.label(row)
        label = _NLI.get(label, label)
        if label not in _NLI.values():
            raise Fault("a label that is no NLI label")
        return of.text(row, "premise"), of.text(row, "hypothesis"), label

    sides: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for i, (premise, hypothesis, label) in of.each(rows, read):
        if label in ("neutral", "none"):
            of.counts.drop("neutral" if label == "neutral" else "no gold label", i, hypothesis)
        elif premise == hypothesis:
            of.counts.drop("both sides are one text", i, premise)
        else:
            side = 0 if label == "entailment" else 1
            sides.setdefault(premise, ({}, {}))[side].setdefault(hypothesis, i)
    yield from _grouped(sides, of, "a pair of both labels", "no entailment of the premise")


def _reranking(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """A query with judged documents: the relevant are positives, the others hard negatives."""
    least = of.how.min_score

    def read(row: Row) -> tuple[str, list[str], list[str]]:
        query = of.text(row, "query")
        documents = of.texts(row, "documents")
        if not documents:
            return query, of.texts(row, "positive"), of.texts(row, "negative")
        grades = of.cell(row, "grades")
        if not isinstance(grades, list) or len(grades) != len(documents):
            raise Fault("as many grades as documents are needed")
        good = [
            g > 0 if least is None else g >= least for g in (_number(g, "grades") for g in grades)
        ]
        judged = list(zip(documents, good, strict=True))
        return query, [d for d, ok in judged if ok], [d for d, ok in judged if not ok]

    for i, (query, positive, negative) in of.each(rows, read):
        if not positive:
            of.counts.drop("no relevant document", i, query)
            continue
        there = set(positive)
        left = [d for d in dict.fromkeys(negative) if d not in there]
        if of.how.negatives is not None:
            left = [left[n] for n in sorted(_sample(len(left), of.how.negatives, of.how.seed, i))]
        yield {"query": query, "positive": list(dict.fromkeys(positive)), "negative": left}


def _title_body(rows: Iterable[Row | None], of: Reader) -> Iterator[Row]:
    """The title of a document finds its body."""

    def read(row: Row) -> tuple[str, str]:
        title, body = of.cell(row, "title"), of.cell(row, "body")
        for value in (title, body):
            if value is not None and not isinstance(value, str):
                raise Fault("a title or body that is no text")
        return (title or "").strip(), (body or "").strip()

    for i, (title, body) in of.each(rows, read):
        if title and body.startswith(title):  # or the pair would be found by its first words
            body = body[len(title) :].lstrip(" \t\r\n.:-–—")
        if not title:
            of.counts.drop("no title", i, body)
        elif not body:
            of.counts.drop("no body beside the title", i, title)
        else:
            yield {"query": title, "positive": [body]}


_RULES: dict[str, Callable[[Iterable[Row | None], Reader], Iterator[Row]]] = {
    "classes": _classes,
    "label-names": _label_names,
    "pairs": _pairs,
    "pair-scores": _pair_scores,
    "scored-pairs": _scored_pairs,
    "bitext": _bitext,
    "nli": _nli,
    "reranking": _reranking,
    "title-body": _title_body,
}
assert _RULES.keys() == RULES.keys()


# ---------------------------------------------------------------- parts of rules


def _labelled(row: Row, of: Reader) -> tuple[str, str, bool]:
    label = of.label(row, "pair_label")
    if label not in ("0", "1"):
        raise Fault("a label that is neither 0 nor 1")
    return of.text(row, "sentence1"), of.text(row, "sentence2"), label == "1"


def _grouped(
    sides: Mapping[str, tuple[dict[str, int], dict[str, int]]], of: Reader, both: str, none: str
) -> Iterator[Row]:
    """One example per first sentence, from its positive and negative partners by row."""
    for query, (positive, negative) in sides.items():
        for text in [t for t in positive if t in negative]:
            of.counts.drop(both, max(positive.pop(text), negative.pop(text)), text)
        if not positive:
            for text, i in negative.items():
                of.counts.drop(none, i, text)
            continue
        kept = list(negative)
        if of.how.negatives is not None:
            key = (of.how.seed, next(iter(positive.values())))
            kept = [kept[n] for n in sorted(_sample(len(kept), of.how.negatives, *key))]
        yield {"query": query, "positive": list(positive), "negative": kept}


def _text(value: Any, name: str) -> str:
    if isinstance(value, Mapping):  # a passage with a title of its own
        value = " ".join(str(value[k]) for k in ("title", "text") if value.get(k))
    if not isinstance(value, str):
        raise Fault(f"{name} is no text")
    if not value.strip():
        raise Fault(f"{name} is blank")
    return value


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Fault(f"{name} is no number") from None
    if number != number or abs(number) == float("inf"):
        raise Fault(f"{name} is no finite number")
    return number


def _digest(*key: object) -> bytes:
    return hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()


def _draw(n: int, *key: object) -> int:
    """A number from 0 to n - 1 that depends on the key alone."""
    return int.from_bytes(_digest(*key), "little") % n


def _sample(n: int, count: int, *key: object) -> list[int]:
    """``count`` different numbers below n (all, when there are fewer), by Floyd's method."""
    if count >= n:
        return list(range(n))
    chosen: dict[int, None] = {}
    for j in range(n - count, n):
        drawn = _draw(j + 1, *key, j)
        chosen[j if drawn in chosen else drawn] = None
    return list(chosen)
