"""Recipes: the dataclasses are the schema, TOML is the interchange.

A recipe says everything that decides a run's numbers. `load` reads TOML over the defaults, `save`
writes the resolved recipe, and that file reproduces the run. Values that only change speed
(threads, progress) are not part of it.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embkit.errors import UsageError, nearest


def _require(ok: bool, what: str, fix: str) -> None:
    if not ok:
        raise UsageError(what, fix=fix)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read.

    Attributes:
        path: a data folder (train/, dev/, test/), or None for the bundled demo data.
        max_rejected: share of faulty rows above which reading stops with exit code 3.
    """

    path: str | None = None
    max_rejected: float = 0.01

    def __post_init__(self) -> None:
        _require(
            0 <= self.max_rejected <= 1,
            f"data.max_rejected = {self.max_rejected} is no share.",
            "give a number from 0 to 1",
        )


@dataclass(frozen=True, kw_only=True)
class Dedup:
    """Near-duplicate removal and decontamination.

    Attributes:
        method: near, or exact (only texts of the same normalised form).
        threshold: Jaccard similarity of shingles from which two texts are near-duplicates.
        action: what becomes of duplicates: merge, drop or mark.
        conflicts: examples that contradict each other: keep or drop.
        priority: names of sources, the best first: of duplicates its text stays.
        punctuation: of method exact: keep, or drop to compare words alone.
        leaked: examples with texts of the evaluation sets: remove or mark.
        words: length in words of the runs that mark a leak into the evaluation sets.
        chars: the same in characters, for scripts without spaces.
        units: of the runs: auto (by the script of each text), words or chars.
        common: a run in more training texts than this is a fixed phrase, and no leak.
        seed: seed of the MinHash permutations.
    """

    method: str = "near"
    threshold: float = 0.8
    action: str = "merge"
    conflicts: str = "keep"
    priority: tuple[str, ...] = ()
    punctuation: str = "keep"
    leaked: str = "remove"
    words: int = 13
    chars: int = 50
    units: str = "auto"
    common: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0 < self.threshold <= 1,
            f"dedup.threshold = {self.threshold} is out of range.",
            "give a Jaccard similarity above 0 and at most 1, e.g. 0.8",
        )
        _require(
            min(self.words, self.chars) >= 1 and self.common >= 0,
            f"dedup.words = {self.words}, chars = {self.chars}, common = {self.common}: one is out "
            "of range.",
            "words and chars are at least 1, common at least 0",
        )
        _one_of("dedup.method", self.method, ("near", "exact"))
        _one_of("dedup.action", self.action, ("merge", "drop", "mark"))
        _one_of("dedup.conflicts", self.conflicts, ("keep", "drop"))
        _one_of("dedup.punctuation", self.punctuation, ("keep", "drop"))
        _one_of("dedup.leaked", self.leaked, ("remove", "mark"))
        _one_of("dedup.units", self.units, ("auto", "words", "chars"))


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Rule and score filters, between deduplication and tokenization.

    Attributes:
        enabled: whether the stage runs.
        preset: bounds of the rules: default, gopher or off.
        rules: bounds that differ from the preset's, by rule (docs/filters.md); "off" is none.
        languages: codes of the languages that stay; empty for all.
        action: drop, or mark (write what would go).
        score_model: a model that compares queries and positives, or None.
        min_score: the least cosine of a pair under that model.
    """

    enabled: bool = False
    preset: str = "default"
    rules: Mapping[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    action: str = "drop"
    score_model: str | None = None
    min_score: float = 0.4

    def __post_init__(self) -> None:
        _one_of("filter.action", self.action, ("drop", "mark"))
        _require(
            -1 <= self.min_score <= 1,
            f"filter.min_score = {self.min_score} is no cosine.",
            "give -1 to 1, e.g. 0.4",
        )


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """How texts become tokens.

    Attributes:
        path: a tokenizer (directory, tokenizer.json or model id), or None to train WordPiece.
        vocab_size: vocabulary of a trained tokenizer.
        max_length_query: tokens a query keeps, special tokens included.
        max_length_passage: tokens a passage keeps, special tokens included.
        prompt_query: put before every query, as serving will.
        prompt_passage: put before every passage.
        task_prompts: prompts of single tasks, in the place of those: a table per task with query
            and passage (retrieval) or text (other kinds).
    """

    path: str | None = None
    vocab_size: int = 16000
    max_length_query: int = 32
    max_length_passage: int = 96
    prompt_query: str = ""
    prompt_passage: str = ""
    task_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder.

    Attributes:
        path: a model directory or id to start from, or None to build a small BERT from these sizes.
        hidden: width of the states. layers, heads, intermediate: as in BERT.
        dims: MRL widths; the largest is the width of the embedding.
        pooling: mean, cls or last. include_prompt: whether the prompt's tokens count in the mean.
        projection: of a new BERT: put a random linear layer (no bias) between pooling and
            embedding. new_head: the same for a loaded model, in place of its own if it has one.
            projection_hidden: make it two layers with this width between them; 0 is one.
        dropout: of states and attention.
        seed: seed of the initialisation, shared by every run.
        bidirectional: let the tokens of a causal model see later ones (docs/models.md).
            soft_mask_steps: steps of the first training over which they come to, as in
            Conan-embedding-v2; 0 is at once.
        keep_layers: keep the bottom blocks of a loaded model; 0 keeps all.
        freeze: parts that are not trained: backbone, embeddings, "layers:K" (the bottom K blocks),
            projection, or a pattern over parameter names.
        lora: rank of LoRA adapters on the blocks' linear layers (the rest of the backbone is frozen
            then); 0 is none. lora_alpha: their scale times the rank, by default twice the rank.
            lora_dropout: of their input. lora_targets: ends of layer names; empty for all.
        gradient_checkpointing: recompute blocks in the backward pass, for less memory.
    """

    path: str | None = None
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    intermediate: int = 1024
    dims: tuple[int, ...] = (256, 128, 64)
    pooling: str = "mean"
    include_prompt: bool = True
    projection: bool = True
    new_head: bool = False
    projection_hidden: int = 0
    dropout: float = 0.0
    seed: int = 0
    bidirectional: bool = False
    soft_mask_steps: int = 0
    keep_layers: int = 0
    freeze: tuple[str, ...] = ()
    lora: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _one_of("model.pooling", self.pooling, ("mean", "cls", "last"))
        for name in ("projection_hidden", "soft_mask_steps", "keep_layers", "lora"):
            value = getattr(self, name)
            _require(value >= 0, f"model.{name} = {value} is negative.", "give 0 or more")
        _require(
            0 <= self.lora_dropout < 1,
            f"model.lora_dropout = {self.lora_dropout} is no share.",
            "give a number from 0 to below 1",
        )
        _require(
            self.include_prompt or self.pooling == "mean",
            f"model.include_prompt = false, and the pooling is {self.pooling}.",
            'only pooling = "mean" can leave the prompt out',
        )
        _require(
            not self.soft_mask_steps or self.bidirectional,
            f"model.soft_mask_steps = {self.soft_mask_steps}, and the model stays as it is.",
            "set bidirectional = true, or leave soft_mask_steps out",
        )
        for name in ("bidirectional", "keep_layers", "new_head"):
            _require(
                self.path is not None or not getattr(self, name),
                f"model.{name} changes a loaded model, and there is no model.path.",
                f"set path, or leave {name} out",
            )
        _require(
            bool(self.dims) and all(d > 0 for d in self.dims),
            f"model.dims = {list(self.dims)} has no positive width.",
            "give the MRL widths, e.g. [256, 128, 64]",
        )
        _require(
            self.hidden % self.heads == 0,
            f"model.hidden = {self.hidden} is no multiple of model.heads = {self.heads}.",
            "choose heads that divide hidden",
        )


_CONAN = {
    "conan-v1": {"every": 100, "ratio": 1.15, "ceiling": 0.8, "floor": -1.0},
    "conan-v2": {"every": 1, "ratio": 1.2, "ceiling": 0.7, "floor": 0.4},
}


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Hard negatives that are replaced when they are no longer hard (docs/training.md).

    Each example trains on a slice of its mined list, ``hard_negatives`` long. With S the mean
    cosine of the slice with the query, now and when it was first seen, a check moves the example
    to the next slice where ``ratio * S_now < S_first`` and ``|S_now| < ceiling`` (v2: ``S_now <
    ceiling``), or where ``S_first < floor``.

    Attributes:
        rule: off, conan-v1 or conan-v2.
        first: place in the list where the first slice begins; 0 when mining has already skipped
            the nearest.
        every: steps between checks. ratio, ceiling, floor: of the rule. None takes the paper's:
            100, 1.15, 0.8 and -1 (never) for v1; 1, 1.2, 0.7 and 0.4 for v2.
        lag: steps from a check to the first batch that has the new slice; batches are assembled
            ahead, by at most ``lag - 2`` threads.
    """

    rule: str = "off"
    first: int = 10
    every: int | None = None
    ratio: float | None = None
    ceiling: float | None = None
    floor: float | None = None
    lag: int = 8

    def __post_init__(self) -> None:
        _one_of("dynamic.rule", self.rule, ("off", *_CONAN))
        _require(
            self.first >= 0 and self.lag >= 3 and (self.every is None or self.every >= 1),
            f"dynamic.first = {self.first}, lag = {self.lag}, every = {self.every}: one is out of "
            "range.",
            "first is at least 0, lag at least 3, every at least 1",
        )

    @property
    def on(self) -> bool:
        """Whether negatives are replaced at all."""
        return self.rule != "off"

    def resolved(self) -> Dynamic:
        """With the paper's numbers where none are given."""
        given = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return Dynamic(**{**_CONAN.get(self.rule, {}), **given})


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is seen and kept of a run; nothing here changes how it trains (docs/training.md).

    Attributes:
        report_to: trackers beside TensorBoard: wandb, trackio, mlflow.
        evaluate_every: steps between evaluations of the model as it trains; 0 is never.
        evaluate_on: folder of evaluation sets; None takes dev/ of the recipe's data.
        best: what the best mean score at full width is for: "off", "keep" that checkpoint beside
            the newest, or "export" its weights in place of the last.
        spike: a loss this many spreads above the median of its task's last ones stops the run,
            with its batch saved; None ("off") is never. The rule: docs/training.md.
        background: write checkpoints behind the training, from a copy of all tensors.
    """

    report_to: tuple[str, ...] = ()
    evaluate_every: int = 0
    evaluate_on: str | None = None
    best: str = "off"
    spike: float | None = 10.0
    background: bool = False

    def __post_init__(self) -> None:
        for name in self.report_to:
            _one_of("watch.report_to", name, ("wandb", "trackio", "mlflow"))
        _one_of("watch.best", self.best, ("off", "keep", "export"))
        _require(
            self.evaluate_every >= 0 and (self.spike is None or self.spike > 0),
            f"watch.evaluate_every = {self.evaluate_every}, spike = {self.spike}: one is out of "
            "range.",
            'evaluate_every is 0 (never) or more, spike above 0 or "off"',
        )
        _require(
            self.best == "off" or self.evaluate_every > 0,
            f"watch.best = {self.best!r}, and nothing is evaluated.",
            "set watch.evaluate_every, e.g. 500",
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several batches that an optimizer step is made of (docs/training.md).

    Attributes:
        tasks: mixture weights of the part's tasks by name; empty means all tasks by their size.
        batch_size: rows of its global batch.
        weight: factor of its loss in the step's.
        hard_negatives: per query of a retrieval batch.
        in_batch: whether other rows' positives are negatives; False leaves the hard negatives
            (Conan-embedding's balance loss).
        ranks: processes that work on this part alone, at the same time as the others'; 0 for
            parts that take turns on all.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 256
    weight: float = 1.0
    hard_negatives: int = 0
    in_batch: bool = True
    ranks: int = 0

    def __post_init__(self) -> None:
        _require(
            self.batch_size > 0 and self.weight > 0 and min(self.hard_negatives, self.ranks) >= 0,
            f"parts: batch_size = {self.batch_size}, weight = {self.weight}, hard_negatives = "
            f"{self.hard_negatives}, ranks = {self.ranks}: one is out of range.",
            "batch_size and weight are above 0, the others at least 0",
        )
        _require(
            self.in_batch or self.hard_negatives > 0,
            "parts: in_batch = false leaves hard negatives only, and hard_negatives is 0.",
            "set hard_negatives, e.g. 8",
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """One training stage.

    Attributes:
        steps: optimizer steps.
        batch_size: rows of a global batch.
        temperature: of InfoNCE; cosines are divided by it.
        lr: peak learning rate of AdamW. warmup_ratio: share of the steps that warm up linearly;
            warmup_steps: their number instead, unless 0.
        schedule: after the warm-up: cosine or linear, down to lr * min_lr_ratio; constant; or wsd,
            constant until the last decay_ratio of the steps, and linear there.
        weight_decay: decoupled, on matrices only. clip_norm: global gradient norm.
        seed: seed of the plan (order, sampling) and of dropout.
        tasks: mixture weight of each task by name; empty means all tasks by their size, as
            min(size, mixture_cap) ** (1 / mixture_temperature); a cap of 0 is none.
        exhausted: what a task does after its last batch: "repeat" starts the next epoch, "drop"
            leaves the mixture after ``epochs`` passes, "stop" ends the mixture for all.
        no_duplicates: keep examples that share a near-duplicate cluster in different batches.
        hard_negatives: negatives per query of a retrieval batch. hard_rule: "sample" of those
            mined, anew each epoch, or "top", the first of them.
        dynamic: when they are replaced during training; its slices then take the place of
            hard_rule.
        refresh_every: steps between refreshes, which mine again with the weights of that step in a
            process beside the training; 0 is never. refresh_lag: steps until the new negatives
            take the place of the old.
        prompt_dropout: share of the queries, and of the examples' passages, that are trained
            without their prompt, drawn anew each epoch (Gemini Embedding 2 does so, at a rate it
            does not give).
        cosent_scale: lambda of CoSENT (1 / its temperature).
        token_budget: tokens of a micro-batch, padding included. layout: "padded", or "packed"
            without padding (docs/models.md); "auto" packs on a GPU in half precision.
        checkpoint_every: steps between checkpoints. keep_checkpoints: how many stay.
        data_threads: threads that assemble batches; does not change the result.
        log_every: steps between progress lines; every step is in log.jsonl.
        watch: trackers, evaluation during training, spikes, checkpoints behind the training.
        betas, eps: of AdamW. adamw: "fused" or "foreach", its form.
        ema: decay of an average of the weights, which becomes the model; 0 is none.
        precision: fp32, bf16 or fp16 of the forward and backward; weights, their updates and
            losses are float32.
        accumulate: batches whose mean loss makes a step. Rows see the passages of their own batch:
            a larger batch_size gives more negatives at the same memory.
        parts: several batches a step, each with its own tasks, size and weight, in the place of
            ``tasks``, ``batch_size`` and ``hard_negatives``.
        graph_memory: GiB of the forward pass (estimated) that are kept for the backward;
            micro-batches beyond run forward again. Does not change the result; 0 keeps nothing.
        compile: torch.compile of the encoder.
        sharding: of weights over ranks: "replicate", "shard" (FSDP2), or "hybrid": shards in each
            set of ``shard_ranks``, copies among the sets. cpu_offload: shards rest in main memory.
        rank_timeout: seconds after which a rank that does not answer is an error.
    """

    steps: int = 1000
    batch_size: int = 256
    temperature: float = 0.02
    lr: float = 5e-4
    warmup_ratio: float = 0.1
    warmup_steps: int = 0
    decay_ratio: float = 0.2
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    seed: int = 0
    tasks: Mapping[str, float] = field(default_factory=dict)
    mixture_temperature: float = 1.0
    mixture_cap: int = 0
    exhausted: str = "repeat"
    epochs: int = 1
    no_duplicates: bool = False
    hard_negatives: int = 0
    hard_rule: str = "sample"
    dynamic: Dynamic = field(default_factory=Dynamic)
    refresh_every: int = 0
    refresh_lag: int = 100
    prompt_dropout: float = 0.0
    cosent_scale: float = 20.0
    token_budget: int = 16384
    layout: str = "auto"
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    data_threads: int = 1
    log_every: int = 10
    watch: Watch = field(default_factory=Watch)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    adamw: str = "fused"
    ema: float = 0.0
    precision: str = "fp32"
    accumulate: int = 1
    parts: tuple[Part, ...] = ()
    graph_memory: float = 8.0
    compile: bool = False
    sharding: str = "replicate"
    shard_ranks: int = 1
    cpu_offload: bool = False
    rank_timeout: float = 600.0

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        _one_of("layout", self.layout, ("auto", "padded", "packed"))
        _one_of("adamw", self.adamw, ("fused", "foreach"))
        _one_of("precision", self.precision, ("fp32", "bf16", "fp16"))
        _one_of("sharding", self.sharding, ("replicate", "shard", "hybrid"))
        _one_of("exhausted", self.exhausted, ("repeat", "drop", "stop"))
        _one_of("hard_rule", self.hard_rule, ("sample", "top"))
        _require(
            0 <= self.prompt_dropout <= 1,
            f"prompt_dropout = {self.prompt_dropout} is no share.",
            "give a number from 0 to 1, e.g. 0.1",
        )
        for name in (
            "steps",
            "batch_size",
            "epochs",
            "token_budget",
            "accumulate",
            "checkpoint_every",
            "data_threads",
            "rank_timeout",
            "shard_ranks",
        ):
            value = getattr(self, name)
            _require(value > 0, f"{name} = {value} is not positive.", "give a whole number from 1")
        _require(
            self.refresh_every == 0 or 3 <= self.refresh_lag <= self.refresh_every,
            f"refresh_every = {self.refresh_every}, refresh_lag = {self.refresh_lag}: one is out "
            "of range.",
            "refresh_every is 0 (never) or at least refresh_lag, refresh_lag at least 3",
        )
        _require(
            not self.dynamic.on or self.hard_negatives > 0,
            "dynamic replaces hard negatives, and hard_negatives is 0.",
            "set hard_negatives, e.g. 2",
        )
        for name in ("temperature", "lr", "mixture_temperature"):
            value = getattr(self, name)
            _require(value > 0, f"{name} = {value} is not positive.", "give a number above 0")
        for name in ("ema", "decay_ratio", "graph_memory", "warmup_steps"):
            value = getattr(self, name)
            _require(
                value >= 0,
                f"{name} = {value} is negative.",
                "give a number of at least 0",
            )
        _require(self.ema < 1, f"ema = {self.ema} never moves.", "give less than 1, e.g. 0.999")
        self._check_parts()

    def _check_parts(self) -> None:
        several = bool(self.parts) or self.accumulate > 1
        _require(
            not (self.parts and self.accumulate > 1),
            "parts and accumulate both say what a step is made of.",
            "leave accumulate out, or repeat a part",
        )
        _require(
            not (several and (self.dynamic.on or self.refresh_every)),
            "Hard negatives that change (dynamic, refresh_every) need one batch a step.",
            "leave parts and accumulate out, or dynamic and refresh_every",
        )
        shares = [part.ranks for part in self.parts]
        _require(
            not any(shares) or all(shares),
            f"parts have ranks = {shares}: some take turns and some do not.",
            "give every part its ranks, or none",
        )
        _require(
            not any(shares) or self.sharding == "replicate",
            "Parts on ranks of their own need whole weights on each.",
            'set sharding = "replicate", or let the parts take turns',
        )


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which neighbours of a query become its hard negatives (docs/mining.md).

    The rules run in this order, each candidate is counted under the first that removes it, and
    ``s+`` is the lowest score of the query's positives. None (``"off"`` in a recipe) switches a
    rule off. Numbers are those of NV-Retriever (arXiv 2407.15831) where a source is not named.

    Attributes:
        k: negatives kept per query. NV-Retriever: 4 for a small model, 1 and 5 in its two stages.
        candidates: how many ranks are looked at. Positives, their near-duplicate clusters, and
            repeats of a cluster have no rank. Ours; sampling 4 of the top 10 is the paper's.
        skip: pass over the first ranks; the paper's "top-k shifted by N" has 10.
        max_score: keep ``s <= max_score`` ("TopK-Abs", 0.7).
        margin: keep ``s <= s+ - margin`` ("TopK-MarginPos", 0.05).
        percent_of_positive: keep ``s <= s+ - |s+| (1 - percent)``, which is ``percent * s+`` for a
            positive ``s+`` ("TopK-PercPos", 0.95, the best of the paper).
        min_score: keep ``s >= min_score``. Ours.
        near_duplicate: word-3-gram Jaccard with a positive or the query from which a candidate is
            its copy. Ours; 6 to 9 % of the negatives of other miners reach 0.7.
        rerank_candidates: how many of those that are left a reranker scores, where there is one;
            k at the least.
        rerank_max_score, rerank_margin, rerank_percent: as above on the reranker's scores.
        sample: ``"top"`` keeps the best k, ``"random"`` draws k of what is left with ``seed``.
        refill: what a query gets that has fewer than k: ``"none"``; ``"relax"``, candidates that
            max_score, margin or percent_of_positive had removed, lowest score first;
            ``"random"``, passages from outside its candidates, drawn with ``seed``.
        seed: of the draws.
        ensemble: with several miners (the paper's intra-sample ensembling): ``"keep"`` each
            miner's negatives as they are, or ``"merge"`` equal ones.
        engine: of the search: auto, exact, ivf or torch.
        recall: least share of the true neighbours that an approximate engine finds; 1 is exact.
    """

    k: int = 4
    candidates: int = 64
    skip: int = 0
    max_score: float | None = None
    margin: float | None = None
    percent_of_positive: float | None = 0.95
    min_score: float | None = None
    near_duplicate: float | None = 0.7
    rerank_candidates: int = 16
    rerank_max_score: float | None = None
    rerank_margin: float | None = None
    rerank_percent: float | None = None
    sample: str = "top"
    refill: str = "none"
    seed: int = 0
    ensemble: str = "keep"
    engine: str = "auto"
    recall: float = 1.0

    def __post_init__(self) -> None:
        _require(
            self.k >= 1 and self.skip >= 0,
            f"mine.k = {self.k}, mine.skip = {self.skip}: one is out of range.",
            "k is at least 1, skip at least 0",
        )
        _require(
            self.candidates >= self.k + self.skip,
            f"mine.candidates = {self.candidates} is less than k + skip = {self.k + self.skip}.",
            "look at more candidates than are kept, 16 times k or more",
        )
        for name in ("percent_of_positive", "rerank_percent", "near_duplicate"):
            value = getattr(self, name)
            _require(
                value is None or 0 < value <= 1,
                f"mine.{name} = {value} is out of range.",
                "give a share above 0 and at most 1, e.g. 0.95",
            )
        for name in ("margin", "rerank_margin"):
            value = getattr(self, name)
            _require(
                value is None or value >= 0,
                f"mine.{name} = {value} is negative.",
                "give a distance of at least 0, e.g. 0.05",
            )
        _require(
            0 < self.recall <= 1 and self.seed >= 0,
            f"mine.recall = {self.recall}, mine.seed = {self.seed}: one is out of range.",
            "recall is above 0 and at most 1, seed at least 0",
        )
        _one_of("mine.sample", self.sample, ("top", "random"))
        _one_of("mine.refill", self.refill, ("none", "relax", "random"))
        _one_of("mine.ensemble", self.ensemble, ("keep", "merge"))
        _one_of("mine.engine", self.engine, ("auto", "exact", "ivf", "torch"))


@dataclass(frozen=True, kw_only=True)
class Soup:
    """How fine-tuned runs are merged: greedy or uniform, judged on the dev sets."""

    select: str = "greedy"

    def __post_init__(self) -> None:
        _one_of("soup.select", self.select, ("greedy", "uniform"))


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Evaluation: bm25 also scores BM25 on the retrieval sets."""

    bm25: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, from raw text to exported model.

    Attributes:
        name: for titles and the model card.
        finetune: the common settings of the fine-tuning runs.
        runs: one table per fine-tuning run, with the settings in which it differs (seed, lr ...).
    """

    name: str = "quickstart"
    data: Data = field(default_factory=Data)
    dedup: Dedup = field(default_factory=Dedup)
    filter: Filter = field(default_factory=Filter)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    model: Model = field(default_factory=Model)
    prefinetune: Train = field(default_factory=Train)
    mine: Rules = field(default_factory=Rules)
    finetune: Train = field(default_factory=Train)
    runs: tuple[Mapping[str, Any], ...] = ({"seed": 0},)
    soup: Soup = field(default_factory=Soup)
    evaluate: Evaluate = field(default_factory=Evaluate)

    def __post_init__(self) -> None:
        _require(bool(self.runs), "The recipe has no [[runs]].", "add at least one, e.g. seed = 0")
        for i in range(len(self.runs)):
            self.run_config(i)

    def run_config(self, i: int) -> Train:
        """The settings of fine-tuning run ``i``: ``finetune`` with ``runs[i]`` over it."""
        return _build(
            Train,
            {**_plain(self.finetune), **self.runs[i]},
            f"runs[{i}]",
        )


def builtin() -> dict[str, Path]:
    """Names and files of the recipes that ship with embkit."""
    folder = Path(__file__).with_name("recipes")
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(source: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a TOML file, or the name of a built-in recipe such as ``"quickstart"``.
        overrides: ``"section.key=value"`` strings, values in TOML syntax (bare words are strings).

    Raises:
        UsageError: unknown key (names the nearest), wrong type, or a value out of range.
        FileNotFoundError: no such file and no such built-in recipe.
    """
    table = read_table(source)
    for item in overrides:
        apply_override(table, item)
    return from_table(table, where=str(source))


def read_table(source: Path | str) -> dict[str, Any]:
    """The TOML table of a recipe file or built-in name, unchecked."""
    path = builtin().get(str(source)) or Path(source)
    if not path.is_file():
        known = ", ".join(builtin())
        raise FileNotFoundError(2, f"No such recipe file; built-in recipes: {known}", str(path))
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The recipe is not valid TOML: {error}", where=path, fix="correct that line"
        ) from error


def from_table(table: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from a TOML table; see :func:`load`."""
    return _build(Recipe, table, where)


def apply_override(table: dict[str, Any], item: str) -> None:
    """Set one ``section.key=value`` in a TOML table."""
    key, eq, text = item.partition("=")
    if not eq or not key.strip():
        raise UsageError(
            f"--set {item!r} is not KEY=VALUE.", fix="write for example --set finetune.lr=2e-5"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    at: Any = table
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise UsageError(f"--set {item!r}: {section} is no section.")
    at[last] = value


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a plain table: every value, defaults included, None left out."""
    return _plain(recipe)


def save(recipe: Recipe, path: Path | str) -> None:
    """Write the resolved recipe as TOML; loading it gives an equal recipe."""
    import tomli_w

    from embkit import _rust

    note = "# Resolved by embkit; `embkit run` with this file repeats the run.\n"
    _rust.publish_file(str(path), (note + tomli_w.dumps(to_table(recipe))).encode())


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for f in dataclasses.fields(value):
            # TOML has no null: what is switched off must not come back as its default.
            if table[f.name] is None and f.default is not None:
                table[f.name] = "off"
        return {name: _plain(item) for name, item in table.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} = {value!r} is not known; {nearest(value, allowed)}")


def _build(cls: Any, table: Any, where: str) -> Any:
    """A dataclass from a table: unknown keys name the nearest, types are checked."""
    if not isinstance(table, Mapping):
        raise UsageError(f"{cls.__name__} must be a table, not {table!r}.", where=where)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            raise UsageError(
                f"Unknown key {key!r} in {cls.__name__.lower()}; {nearest(key, known)}", where=where
            )
    values = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in table.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value == "off" and args[0] is not str:
            return None
        return _convert(args[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is not Ellipsis and len(value) != len(args):
            raise UsageError(f"Expected {len(args)} values, not {len(value)}.", where=where)
        return tuple(_convert(args[0], item, where) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _convert(args[1], item, where) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UsageError(f"Expected {expected}, found {value!r}.", where=where, fix="correct its type")
