"""Real pairs as data folders for the group `recipes`: train/, dev/ held out of them, test/.

`EMBKIT_REAL_DATA` names a folder with pairs/{prefinetune,finetune}/NAME.en.jsonl.zst, sts/, and
retrieval/ and classification/ sets. dev/ is held out of its training files by a hash, whole groups
at a time (all pairs of a passage, all examples of a command), so that everything can be tuned
without a look at its test sets. Without it, or in quick form, the bundled demo data is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from embkit.data.readers import read_jsonl
from embkit.stage import stage

Row = dict[str, Any]

PRE = ("debian_desc", "wordnet", "foldoc", "tldr_page")
FINE = ("medquad", "tldr_code", "scifact_train", "mbpp_train", "debian_desc")
LABELS = ("banking77", "trec6", "amazon-cf-en", "snips")
TEST = ("scifact", "cranfield", "debian-en", "tldr-code", "medquad-en", "mbpp-code")
FEW = ("medquad", "tldr_code")
HELD = ("medquad", "tldr_code", "debian_desc", "foldoc")  # retrieval sets of dev/
_VERSION = 1  # of what is written here
_SHARE = 16  # a group in so many is held out
_QUERIES = 400
_TEXTS = 500
_PER_LABEL = 40


def source() -> Path | None:
    """The folder of EMBKIT_REAL_DATA, where it has pairs."""
    given = os.environ.get("EMBKIT_REAL_DATA")
    found = Path(given) if given else None
    return found if found is not None and (found / "pairs").is_dir() else None


def part(text: str, of: int) -> int:
    """A number from 0 to ``of - 1`` that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % of


def group(task: str, row: Row) -> str:
    """What is held out together: a command's examples, or the pairs of a passage."""
    text = str(row["positive"])
    return text.split(maxsplit=1)[0] if task == "tldr_code" else text


def build(real: Path, out: Path) -> Path:
    """Write the data folder of the real pairs; free when it is there."""
    files = {str(p.relative_to(real)): p.stat().st_size for p in sorted(real.rglob("*.zst"))}
    params = {"version": _VERSION, "files": files}
    with stage(out, name="real-data", params=params, inputs=[]) as work:
        if not work.done:
            for name in sorted({*PRE, *FINE}):
                _pairs(real, name, work.dir)
            _sentences(real, work.dir)
            for name in LABELS:
                _labelled(real, name, work.dir)
            for name in TEST:
                for file in ("corpus", "queries", "qrels"):
                    rows = read_jsonl(real / "retrieval" / name / f"{file}.jsonl.zst")
                    write(work.dir / "test" / "retrieval" / name / f"{file}.jsonl", rows)
            work.publish()
    return out


def variant(
    folder: Path, out: Path, name: str, change: Callable[[str, list[Row]], list[Row]]
) -> Path:
    """A data folder with the same dev/ and test/ and other training rows.

    Args:
        name: of the variant, which says all about ``change``.
        change: the task and its rows to its new rows; none for a task that goes.
    """
    with stage(out, name="variant", params={"name": name}, inputs=[folder / "train"]) as work:
        if not work.done:
            for split in ("dev", "test"):
                shutil.copytree(folder / split, work.dir / split)
            for path in sorted((folder / "train").iterdir()):
                rows = change(path.name.split(".")[0], read_jsonl(path))
                if rows:
                    write(work.dir / "train" / path.name.removesuffix(".zst"), rows)
            work.publish()
    return out


def noisy(task: str, rows: list[Row], *, share: int = 3) -> list[Row]:
    """One pair in ``share`` of the fine-tuning tasks gets the positive of another pair."""
    if task not in FINE or task in PRE:
        return rows
    wrong = [i for i, row in enumerate(rows) if part(row["query"] + row["positive"], share) == 0]
    taken = [rows[i]["positive"] for i in wrong]
    out = [dict(row) for row in rows]
    for i, positive in zip(wrong, [*taken[1:], *taken[:1]], strict=True):
        out[i]["positive"] = positive
    return out


def few(task: str, rows: list[Row], *, keep: int = 2000) -> list[Row]:
    """Two tasks with few examples, so that a short run visits each several times."""
    if task not in FEW:
        return []
    order = sorted(
        range(len(rows)), key=lambda i: part(rows[i]["query"] + rows[i]["positive"], 2**60)
    )
    return [rows[i] for i in sorted(order[:keep])]


def _pairs(real: Path, name: str, out: Path) -> None:
    folder = "prefinetune" if name in PRE else "finetune"
    rows: list[Row] = [
        {str(k): row[k] for k in ("query", "positive", "negatives") if k in row}
        for row in read_jsonl(real / "pairs" / folder / f"{name}.en.jsonl.zst")
    ]
    held = [row for row in rows if part(group(name, row), _SHARE) == 0] if name in HELD else []
    kept = [row for row in rows if part(group(name, row), _SHARE)] if name in HELD else rows
    write(out / "train" / f"{name}.jsonl", kept)
    if not held:
        return
    corpus = {row["positive"]: str(i) for i, row in enumerate(held)}
    answers: dict[str, set[str]] = {}
    for row in held:
        answers.setdefault(row["query"], set()).add(corpus[row["positive"]])
    asked = sorted(answers, key=lambda query: part(query, 2**60))[:_QUERIES]
    place = out / "dev" / "retrieval" / name
    write(place / "corpus.jsonl", ({"_id": i, "title": "", "text": t} for t, i in corpus.items()))
    write(place / "queries.jsonl", ({"_id": f"q{i}", "text": q} for i, q in enumerate(asked)))
    judged = [(f"q{i}", a) for i, q in enumerate(asked) for a in sorted(answers[q])]
    write(place / "qrels.jsonl", ({"query_id": q, "corpus_id": a, "score": 1} for q, a in judged))


def _sentences(real: Path, out: Path) -> None:
    for split, target in (
        ("train", "train/stsb"),
        ("dev", "dev/sts/stsb"),
        ("test", "test/sts/stsb"),
    ):
        rows = read_jsonl(real / "sts" / f"stsb-en.{split}.jsonl.zst")
        write(out / f"{target}.jsonl", rows)


def _labelled(real: Path, name: str, out: Path) -> None:
    train = read_jsonl(real / "classification" / f"{name}.train.jsonl.zst")
    test = read_jsonl(real / "classification" / f"{name}.test.jsonl.zst")
    held = [row for row in train if part(row["text"], 8) == 0]
    kept = [row for row in train if part(row["text"], 8)]
    write(out / "train" / f"{name}.jsonl", kept)
    for split, rows, probe in (("dev", held, kept), ("test", test, train)):
        place = out / split / "classification" / name
        write(place / "test.jsonl", sorted(rows, key=lambda r: part(r["text"], 2**60))[:_TEXTS])
        write(place / "train.jsonl", per_label(probe))


def per_label(rows: Iterable[Row]) -> list[Row]:
    """At most 40 rows a label, enough for ten draws of eight."""
    taken: dict[str, int] = {}
    out = []
    for row in sorted(rows, key=lambda r: part(r["text"], 2**60)):
        label = str(row["label"])
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= _PER_LABEL:
            out.append(row)
    return out


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")
