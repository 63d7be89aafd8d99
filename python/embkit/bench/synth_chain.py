"""The row `synth.gecko`: Gecko's whole chain with a real model over real passages.

Queries are written for passages, an embedder is trained on (query, seed passage), the model
relabels its neighbours and judges the outcome. Then the same start is fine-tuned on the seeds and
on what the chain made of them, and both are scored on dev/. Every part is a stage or a kept file in
the cache: the row goes on where it was stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust
from embkit.bench import Case
from embkit.bench.llm import real_model
from embkit.bench.recipes_data import part
from embkit.bench.recipes_peer import cpu
from embkit.bench.recipes_rows import SEEDS, case_of, found, world_of
from embkit.bench.synth_real import folder, real_data
from embkit.bench.synth_sample import WORDS
from embkit.data import read, tokenize
from embkit.data.readers import read_jsonl
from embkit.synth import Judge, Relabel, Write, judge, relabel, write_queries

_VERSION = 2
ARMS = ("seed", "relabelled", "relabelled+negative", "judged+negative")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done.

    Attributes:
        passages, candidates: of the chain. shard: queries that are relabelled at a time: the more,
            the more of them share a passage. seeds, steps, batch: of each training. sets: files of
            train/ that the passages come from.
    """

    passages: int = 500
    candidates: int = 20
    shard: int = 250
    seeds: tuple[int, ...] = SEEDS
    steps: int = 40
    batch: int = 128
    sets: tuple[str, ...] = ("medquad.jsonl", "debian_desc.jsonl", "foldoc.jsonl")


QUICK = Size(passages=20, candidates=5, shard=20, seeds=(0,), steps=2, batch=8)


def real_passages(data: Path, size: Size) -> list[str]:
    """Passages of the sets alike, in the order of their hash."""
    texts: list[str] = []
    for at, name in enumerate(size.sets):
        rows = read_jsonl(data / "train" / name)
        distinct = {" ".join(str(row["positive"]).split()[:WORDS]) for row in rows}
        fit = [text for text in distinct if len(text.split()) > 7]
        share = (size.passages + at) // len(size.sets)
        texts += sorted(fit, key=lambda text: part(text, 2**60))[:share]
    return texts


class Chain:
    """The chain's outputs in a folder, each made when it is asked for."""

    def __init__(self, home: Path, world: Any, llm: Any, size: Size) -> None:
        self.home, self.world, self.llm, self.size = home, world, llm, size

    @cached_property
    def passages(self) -> list[str]:
        """What queries are written for."""
        return real_passages(self.world.data, self.size)

    def queries(self) -> Any:
        """Queries by the model, by Gecko's prompt for small ones, greedy: see docs/synth.md."""
        how = Write(prompt="gecko-lines", temperature=0.0, shard=50, max_rejected=0.5)
        return write_queries(self.passages, llm=self.llm, out=self.home / "queries", how=how)

    def relabelled(self, negative: bool) -> Any:
        """New positives by the fused ranks, with hard negatives or without."""
        how = Relabel(candidates=self.size.candidates, shard=self.size.shard, relevance="yes-no")
        embedder, _ = self.trained("seed", 0)
        out = self.home / "relabelled"
        whole = relabel(self.queries(), model=embedder, llm=self.llm, out=out, how=how)
        if negative:
            return whole
        rows = [
            {"query": whole.texts.get(int(table.query[i])), "positive": whole.texts.get(int(p))}
            for table in whole.tasks().values()
            for i in range(len(table))
            for p in table.positive[table.positive_offsets[i] : table.positive_offsets[i + 1]]
        ]
        path = self.home / "positives.jsonl"
        _rust.publish_file(str(path), "".join(json.dumps(r) + "\n" for r in rows).encode())
        return read(path, task="synthetic").save(self.home / "positives")

    def judged(self) -> Any:
        """What is left by the judge."""
        how = Judge(prompts=("yes-no",), min_positive=0.5, max_negative=2.0)
        return judge(self.relabelled(True), llm=self.llm, out=self.home / "judged", how=how)

    def records(self, arm: str) -> Any:
        """The training data of an arm."""
        if arm == "seed":
            return self.queries()
        return self.judged() if arm.startswith("judged") else self.relabelled("+" in arm)

    def trained(self, arm: str, seed: int) -> tuple[Path, dict[str, Any]]:
        """A model that was fine-tuned on an arm's data, and its scores on dev/."""
        from embkit.model import Encoder
        from embkit.recipe import Train
        from embkit.train import finetune

        world, records = self.world, self.records(arm)
        store = self.home / f"store-{arm}"
        tokenize(
            records, out=store, tokenizer=world.store("plain") / "tokenizer",
            max_length_query=world.plan.query, max_length_passage=world.plan.passage,
        )  # fmt: skip
        out = self.home / "runs" / f"{arm}-{seed}"
        settings = {**world.plan.finetune, "steps": self.size.steps, "batch_size": self.size.batch}
        settings |= {"seed": seed, "tasks": {"synthetic": 1.0}, "hard_negatives": int("+" in arm)}
        begun = cpu()
        finetune(
            Encoder.from_pretrained(world.start("pre")), store, out=out, config=Train(**settings)
        )
        spent = round(cpu() - begun, 2)
        kept = out.with_name(out.name + ".json")
        if not kept.is_file():
            from embkit.bench.recipes_cells import Cell

            scored = {"cpu": spent, **world.score(Cell(), out / "model")}
            _rust.publish_file(str(kept), json.dumps(scored).encode())
        return out / "model", dict(json.loads(kept.read_text()))

    def case(self) -> Case:
        """The row: nDCG@10 on dev/ of relabelled data with negatives beside the seeds."""
        results = {
            arm: found(
                [self.trained(arm, seed)[1] for seed in self.size.seeds], kinds=("retrieval",)
            )
            for arm in ARMS
        }
        queries, after = self.queries().report, self.relabelled(True).report
        (relabelled,) = after["tasks"].values()
        (graded,) = self.judged().report["tasks"].values()
        facts = {
            "passages": len(self.passages), "queries": queries["kept"],
            "dropped": queries["dropped"], "candidates": self.size.candidates,
            "steps": self.size.steps, "llm": self.llm.name,
            "share_best_is_not_seed": relabelled["share_best_is_not_seed"],
            "seed_mrr": relabelled["seed_mrr"], "judge": {k: graded[k] for k in (
                "before", "after", "weak_positives", "strong_negatives")},
            "start": round(self._start(), 3),
            "arms": {arm: [round(float(np.mean(r.seeds)), 3), round(float(np.std(r.seeds)), 3)]
                     for arm, r in results.items()},
        }  # fmt: skip
        return case_of(
            "synth.gecko", results["relabelled+negative"], results["seed"], "seed passages", facts,
            goal="> seed passages",
        )  # fmt: skip

    def _start(self) -> float:
        """The score before any of it."""
        from embkit.bench.recipes_cells import Cell

        kept = self.home / "start.json"
        if not kept.is_file():
            scores = self.world.score(Cell(), self.world.start("pre"))["scores"]
            _rust.publish_file(str(kept), json.dumps(scores).encode())
        scores = json.loads(kept.read_text())
        return float(scores[str(max(map(int, scores)))]["retrieval"])


def gecko_chain(quick: bool) -> Case:
    """The row."""
    real_data()  # says what is missing before a model is read
    world, _ = world_of(False)
    # As a continuation: behind the template of chats so small a model keeps to no form.
    llm = real_model(token_budget=4096, chat=False)
    size = QUICK if quick else Size()
    digest = _rust.blake3(json.dumps([_VERSION, repr(size), llm.params()]).encode())[:16]
    return Chain(folder() / f"gecko-{digest}", world, llm, size).case()


CASES = (gecko_chain,)
