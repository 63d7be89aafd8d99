"""Gecko's chain over real passages, and what must hold of its outputs whoever answers."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embkit import container
from embkit.data.records import Records
from embkit.synth import Judge, Relabel, Write, fuse, judge, relabel, write_queries
from embkit.synth.prompts import load


def real_passages(count: int, words: int) -> list[str]:
    """Beginnings of real texts of the demo."""
    from embkit.demo import DATA
    from embkit.synth.passages import read_passages

    texts = read_passages(DATA / "train" / "retrieval.jsonl.zst")[0]
    long = [text for text in texts if len(text.split()) > words]
    return [" ".join(text.split()[:words]) for text in random.Random(0).sample(long, count)]


def word_encoder(texts: Sequence[str]) -> Any:
    """Random weights, a token for each word: texts with common words are near."""
    from embkit.model import Encoder
    from embkit.recipe import Model

    words = sorted({word for text in texts for word in text.lower().split()})
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    sizes: dict[str, Any] = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 48}
    lengths = {"query": 32, "passage": 32}
    return Encoder.from_config(Model(**sizes, dims=(32,)), tokenizer, max_length=lengths).eval()


def chain(
    passages: Sequence[str], encoder: Any, llm: Any, out: Path, *, write: Write,
    relabelling: Relabel, grade: Any,
) -> None:  # fmt: skip
    """Queries, new positives and hard negatives, and a judge of both."""
    queries = write_queries(list(passages), llm=llm, out=out / "queries", how=write)
    found = relabel(queries, model=encoder, llm=llm, out=out / "relabelled", how=relabelling)
    how = Judge(prompts=(grade,), shard=64, min_positive=0.5, max_negative=2.5)
    judge(found, llm=llm, out=out / "judged", how=how)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """What became of each passage."""
    return [json.loads(line) for line in (out / "queries" / "rows.jsonl").read_text().splitlines()]


Shards = dict[int, list[dict[str, Any]]]


def shards(out: Path, stage: str) -> Shards:
    """Rows of the shards that a stage of the chain has at the moment, by the shard's number."""
    found = {}
    for path in sorted(out.glob(f".partial-{stage}-*/shards/shard-*.jsonl")):
        lines = path.read_text().splitlines()[1:]
        found[int(path.name.split("-")[1])] = [json.loads(line) for line in lines]
    return found


def has_shard(out: Path, stage: str) -> bool:
    """Whether it has one; asked some times a second, for a child that computes needs the core."""
    time.sleep(0.05)
    return bool(shards(out, stage))


def check_done(out: Path, done: dict[str, Shards], size: int) -> None:
    """Rows that were there at a kill, in shards of ``size``, are there now bit for bit."""
    rows = rows_of(out)
    for number, found in done["queries"].items():
        assert found == rows[number * size : number * size + len(found)]
    scores = container.load(out / "relabelled" / "relabel-synthetic.safetensors")
    ends = scores["offsets"].astype(int)
    for number, found in done["relabelled"].items():
        for i, row in enumerate(found, number * size):
            here = slice(ends[i], ends[i + 1])
            for name, short in (("likelihood", "ql"), ("relevance", "rc")):
                assert np.array_equal(scores[name][here], np.array(row[short], np.float32))


def check_chain(out: Path, passages: Sequence[str], llm: Any, write: Write, n: int) -> None:
    """Nothing is lost or doubled, and each choice is the one that the kept scores lead to."""
    report = json.loads((out / "queries" / "report.json").read_text())
    rows = rows_of(out)
    assert [row["passage"] for row in rows] == list(range(len(passages)))
    assert report["kept"] + sum(report["dropped"].values()) == len(passages) == report["items"]
    kept = [row for row in rows if not row["reason"]]
    assert len(kept) == report["kept"]
    digest = load(write.prompt).digest
    assert {(row["model"], row["prompt"]) for row in rows} == {(llm.name, digest)}
    assert len({row["seed"] for row in rows}) == len(rows)

    before, after = Records.open(out / "queries"), Records.open(out / "relabelled")
    old, new = before.tasks()["synthetic"], after.tasks()["synthetic"]
    assert [before.texts.get(int(q)) for q in old.query] == [row["query"] for row in kept]
    assert [after.texts.get(int(q)) for q in new.query] == [row["query"] for row in kept]
    seeds = [passages[row["passage"]] for row in kept]
    assert [before.texts.get(int(p)) for p in old.positive] == seeds
    scores = container.load(out / "relabelled" / "relabel-synthetic.safetensors")
    text_of = {int(t): before.texts.get(i) for i, t in enumerate(before.texts.text_id)}
    ends = scores["offsets"].astype(int)
    for i, seed in enumerate(seeds):
        here = slice(ends[i], ends[i + 1])
        candidates = [text_of[int(t)] for t in scores["text_id"][here]]
        assert seed in candidates and len(set(candidates)) == n
        fused = fuse(scores["likelihood"][here], scores["relevance"][here])
        np.testing.assert_allclose(scores["fused"][here], fused, rtol=1e-6)
        order = np.argsort(-scores["fused"][here], kind="stable")
        (best,), (worst,) = _texts(after, new, "positive", i), _texts(after, new, "negative", i)
        assert (best, worst) == (candidates[order[0]], candidates[order[-1]])
    found = json.loads((out / "relabelled" / "report.json").read_text())["tasks"]["synthetic"]
    assert found["judged"] == len(kept) and not found["rejected_candidates"]
    graded = json.loads((out / "judged" / "report.json").read_text())["tasks"]["synthetic"]
    assert graded["before"] == len(kept) >= graded["after"]
    assert (out / "judged" / "judged-synthetic.safetensors").is_file()


def _texts(records: Records, table: Any, side: str, i: int) -> list[str]:
    offsets = getattr(table, f"{side}_offsets")
    rows = getattr(table, side)[int(offsets[i]) : int(offsets[i + 1])]
    return [records.texts.get(int(row)) for row in rows]
