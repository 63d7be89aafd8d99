"""Real data folders on which whole recipes are run: English, Chinese, and three languages.

Everything comes from the training files of `EMBKIT_REAL_DATA` and from dev splits that were made
for tuning; its retrieval/ and test files are left alone. A hash holds out whole groups (all pairs
of a passage); a quarter of what is held out is dev/, which a recipe may choose by, the rest is
test/, where the rows of the table are scored.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from embkit.bench.recipes_data import Row, part, per_label, write
from embkit.data.readers import read_jsonl
from embkit.stage import stage

_VERSION = 1  # of what is written here
_QUERIES = 400
_CORPUS = 2500
_PAIRS = 6000
_DEV_CORPUS = 300  # passages of a set of dev/, which is scored often
THREE = ("de", "fr", "ja")
LABELS = ("trec6", "snips")
SHORT = ("debian_desc", "tldr_code")


def english(real: Path, whole: Path, out: Path) -> Path:
    """Five retrieval tasks of at most 6,000 pairs, STS-B and two sets of labels; ``whole`` is the
    folder of the other rows of the group, whose held-out sets are cut in two here."""

    def make(train: Path, held: Path) -> None:
        names = ("debian_desc", "foldoc", "tldr_page", "medquad", "tldr_code", "stsb", *LABELS)
        for name in names:
            rows = read_jsonl(next((whole / "train").glob(f"{name}.jsonl*")))
            if "positive" in rows[0]:
                rows.sort(key=lambda row: part(row["query"] + row["positive"], 2**60))
            write(train / f"{name}.jsonl", map(_pair, rows[:_PAIRS]))
        for kind in ("retrieval", "sts"):
            shutil.copytree(whole / "dev" / kind, held / kind)
        for name in LABELS:
            place = Path("classification") / name
            shutil.copytree(whole / "dev" / place, held / place)

    return _build(f"english, {_PAIRS} pairs a task", out, [whole], make)


def short(whole: Path, out: Path) -> Path:
    """160 pairs of each of two tasks of ``whole`` (:func:`english`) and small held-out sets, for a
    model whose steps take many seconds: 48 queries on 96 passages a task, 48 pairs of STS-B."""
    params = {"version": _VERSION, "name": "short"}
    with stage(out, name="systems-data", params=params, inputs=[whole]) as work:
        if work.done:
            return out
        for name in SHORT:
            rows = read_jsonl(whole / "train" / f"{name}.jsonl")
            write(work.dir / "train" / f"{name}.jsonl", rows[:160])
        for split, asked in (("dev", 12), ("test", 48)):
            for name in SHORT:
                place = Path(split) / "retrieval" / name
                _fewer(whole / place, work.dir / place, asked)
            rows = read_jsonl(whole / split / "sts" / "stsb.jsonl")
            write(work.dir / split / "sts" / "stsb.jsonl", rows[:asked])
        work.publish()
    return out


def _fewer(held: Path, out: Path, asked: int) -> None:
    """The first queries of a set, on twice as many passages."""
    queries = read_jsonl(held / "queries.jsonl")[:asked]
    known = {row["_id"] for row in queries}
    judged = [row for row in read_jsonl(held / "qrels.jsonl") if row["query_id"] in known]
    right = {row["corpus_id"] for row in judged}
    corpus = read_jsonl(held / "corpus.jsonl")
    others = [row["_id"] for row in corpus if row["_id"] not in right]
    kept = right | set(others[: max(0, 2 * asked - len(right))])
    write(out / "queries.jsonl", queries)
    write(out / "qrels.jsonl", judged)
    write(out / "corpus.jsonl", (row for row in corpus if row["_id"] in kept))


def chinese(real: Path, out: Path) -> Path:
    """Questions on paragraphs (CMRC, DRCD), natural language inference, headlines, STS-B."""
    pairs = real / "pairs"
    files = {
        "cmrc": pairs / "finetune" / "cmrc.zh.jsonl.zst",
        "drcd": pairs / "finetune" / "drcd_dev.zh-TW.jsonl.zst",
        "snli": pairs / "finetune" / "nli_snli.zh.jsonl.zst",
        "ocnli": pairs / "finetune" / "nli_ocnli.zh.jsonl.zst",
        "debian": pairs / "prefinetune" / "debian_desc.zh.jsonl.zst",
        "stsb": real / "sts" / "stsb-zh.train.jsonl.zst",
        "stsb-dev": real / "sts" / "stsb-zh.dev.jsonl.zst",
        "lcqmc": real / "pairclass" / "lcqmc-zh.dev.jsonl.zst",
        "tnews": real / "classification" / "tnews-zh.train.jsonl.zst",
    }

    def make(train: Path, held: Path) -> None:
        for name in ("cmrc", "drcd"):
            rows = read_jsonl(files[name])
            _retrieval(name, rows, train, held, share=8, distractors=True)
        for name in ("snli", "ocnli", "debian"):
            write(train / f"{name}.jsonl", map(_pair, read_jsonl(files[name])))
        shutil.copyfile(files["stsb"], train / "stsb.jsonl.zst")
        write(held / "sts" / "stsb.jsonl", read_jsonl(files["stsb-dev"]))
        same = sorted(read_jsonl(files["lcqmc"]), key=lambda r: part(r["sentence1"], 2**60))[:1500]
        write(held / "sts" / "lcqmc.jsonl", ({**r, "score": float(r["label"])} for r in same))
        rows = read_jsonl(files["tnews"])
        kept = [row for row in rows if part(row["text"], 6)]
        write(train / "tnews.jsonl", kept)
        place = held / "classification" / "tnews"
        write(place / "test.jsonl", (row for row in rows if not part(row["text"], 6)))
        write(place / "train.jsonl", per_label(kept))

    return _build("chinese", out, list(files.values()), make)


def three(real: Path, out: Path) -> Path:
    """Package descriptions in German, French and Japanese with their English translations, and
    Japanese questions (JaQuAD)."""
    pairs = real / "pairs"
    files = {f"desc-{x}": pairs / "prefinetune" / f"debian_desc.{x}.jsonl.zst" for x in THREE}
    files["jaquad"] = pairs / "finetune" / "jaquad_train.ja.jsonl.zst"
    files["bitext"] = pairs / "finetune" / "bitext_ddtp.jsonl.zst"

    def make(train: Path, held: Path) -> None:
        for name, path in files.items():
            rows = read_jsonl(path)
            if name == "jaquad":
                rows = [row for row in rows if part(row["positive"], 64) < 16]
            if name != "bitext":
                _retrieval(name, rows, train, held, share=16)
                continue
            wanted = [f"{x}-en" for x in THREE]
            rows = [row for row in rows if row["lang"] in wanted and part(row["positive"], 64) < 32]
            _retrieval(name, rows, train, held, share=16, each="lang")

    return _build("three", out, list(files.values()), make)


def _build(name: str, out: Path, inputs: list[Path], make: Callable[[Path, Path], None]) -> Path:
    params = {"version": _VERSION, "name": name}
    with stage(out, name="systems-data", params=params, inputs=inputs) as work:
        if not work.done:
            held = work.dir / "held"
            (work.dir / "train").mkdir(exist_ok=True)
            make(work.dir / "train", held)
            for split, first in (("dev", True), ("test", False)):
                halve(held, work.dir / split, first=first)
            shutil.rmtree(held)
            work.publish()
    return out


def _retrieval(
    name: str,
    rows: list[Row],
    train: Path,
    held: Path,
    *,
    share: int,
    distractors: bool = False,
    each: str = "",
) -> None:
    """Write a task's training rows and its held-out sets, one per value of ``each``.

    The corpus of a set has the passages that are held out, and with ``distractors`` those of the
    training rows too.
    """
    out = [row for row in rows if part(row["positive"], share) == 0]
    write(train / f"{name}.jsonl", (_pair(r) for r in rows if part(r["positive"], share)))
    for value in sorted({row[each] for row in out}) if each else [""]:
        chosen = [row for row in out if not each or row[each] == value]
        texts = dict.fromkeys(row["positive"] for row in chosen)
        if distractors:
            texts |= dict.fromkeys(row["positive"] for row in rows)
        corpus = {text: str(i) for i, text in enumerate(list(texts)[:_CORPUS])}
        answers: dict[str, set[str]] = {}
        for row in chosen:
            if row["positive"] in corpus:
                answers.setdefault(row["query"], set()).add(corpus[row["positive"]])
        asked = sorted(answers, key=lambda query: part(query, 2**60))[:_QUERIES]
        place = held / "retrieval" / (f"{name}-{value}" if each else name)
        write(place / "corpus.jsonl", ({"_id": i, "text": t} for t, i in corpus.items()))
        write(place / "queries.jsonl", ({"_id": f"q{i}", "text": q} for i, q in enumerate(asked)))
        judged = ((f"q{i}", a) for i, q in enumerate(asked) for a in sorted(answers[q]))
        graded = ({"query_id": q, "corpus_id": a, "score": 1} for q, a in judged)
        write(place / "qrels.jsonl", graded)


def halve(held: Path, out: Path, *, first: bool) -> None:
    """Write the first quarter of the held-out sets, with fewer passages, or the rest."""

    def some(rows: Iterable[Row]) -> list[Row]:
        listed = list(rows)
        cut = len(listed) // 4
        return listed[:cut] if first else listed[cut:]

    for folder in sorted((held / "retrieval").glob("*")):
        place = out / "retrieval" / folder.name
        asked = some(read_jsonl(folder / "queries.jsonl"))
        known = {row["_id"] for row in asked}
        judged = [r for r in read_jsonl(folder / "qrels.jsonl") if r["query_id"] in known]
        right = {row["corpus_id"] for row in judged}
        corpus = read_jsonl(folder / "corpus.jsonl")
        if first:
            others = [row for row in corpus if row["_id"] not in right]
            rest = others[: max(0, _DEV_CORPUS - len(right))]
            corpus = [row for row in corpus if row["_id"] in right] + rest
        write(place / "corpus.jsonl", corpus)
        write(place / "queries.jsonl", asked)
        write(place / "qrels.jsonl", judged)
    for file in sorted((held / "sts").glob("*")):
        rows = sorted(read_jsonl(file), key=lambda row: part(row["sentence1"], 2**60))
        write(out / "sts" / file.name, some(rows))
    for folder in sorted((held / "classification").glob("*")):
        place = out / "classification" / folder.name
        write(place / "train.jsonl", read_jsonl(folder / "train.jsonl"))
        write(place / "test.jsonl", some(read_jsonl(folder / "test.jsonl")))


def _pair(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in row if key not in ("task", "source", "lang")}
