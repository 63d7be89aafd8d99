"""The section of a recipe that decides a training stage, with its watch and its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embkit.recipe.limits import in_limits
from embkit.recipe.loss import Loss
from embkit.recipe.mine import Dynamic
from embkit.recipe.schema import build, one_of, plain, require


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
            one_of("watch.report_to", name, ("wandb", "trackio", "mlflow"))
        one_of("watch.best", self.best, ("off", "keep", "export"))
        require(
            self.evaluate_every >= 0 and (self.spike is None or self.spike > 0),
            f"watch.evaluate_every = {self.evaluate_every}, spike = {self.spike}: one is out of "
            "range.",
            'evaluate_every is 0 (never) or more, spike above 0 or "off"',
        )
        require(
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
        loss: settings of the part's loss, over the stage's.
        ranks: processes that work on this part alone, at the same time as the others'; 0 for
            parts that take turns on all.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    batch_size: int = 256
    weight: float = 1.0
    hard_negatives: int = 0
    in_batch: bool = True
    loss: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 0

    def __post_init__(self) -> None:
        in_limits(self)
        require(
            self.batch_size > 0 and self.weight > 0 and min(self.hard_negatives, self.ranks) >= 0,
            f"parts: batch_size = {self.batch_size}, weight = {self.weight}, hard_negatives = "
            f"{self.hard_negatives}, ranks = {self.ranks}: one is out of range.",
            "batch_size and weight are above 0, the others at least 0",
        )
        require(
            self.in_batch or self.hard_negatives > 0,
            "parts: in_batch = false leaves hard negatives only, and hard_negatives is 0.",
            "set hard_negatives, e.g. 8",
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """One training stage.

    Attributes:
        steps: optimizer steps.
        batch_size: rows of a global batch. batch_sizes: of single tasks instead, by name.
        temperature: of InfoNCE; cosines are divided by it.
        lr: peak learning rate of AdamW. warmup_ratio: share of the steps that warm up linearly;
            warmup_steps: their number instead, unless 0.
        schedule: after the warm-up: cosine or linear, down to lr * min_lr_ratio; constant; or wsd,
            constant until the last decay_ratio of the steps, and linear there.
        projection_lr_scale: factor of the rate for the projection, whose first numbers are often
            random. layer_lr_decay: factor of the rate from each block to the one below it, and to
            the token embeddings; 1 is none (docs/step.md).
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
        loss: which candidates a query has, and what is added (docs/losses.md). losses: settings
            of single tasks over it, by the task's name.
        teacher: a file or folder of vectors, one per row of the store, to distil from or to be
            guided by; empty for none.
        token_budget: tokens of a micro-batch, padding included; 0 finds what fits on the GPU
            (docs/step.md). layout: "padded", or "packed" without padding (docs/models.md); "auto"
            packs on a GPU in half precision.
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
        device: of the training: "cpu", "cuda", or "auto", a GPU where there is one.
        gather: how ranks meet the passages of all: "all" of them at once, or "ring", one rank's at
            a time, where all do not fit (docs/step.md).
        rank_timeout: seconds after which a rank that does not answer is an error.
    """

    steps: int = 1000
    batch_size: int = 256
    batch_sizes: Mapping[str, int] = field(default_factory=dict)
    temperature: float = 0.02
    lr: float = 5e-4
    warmup_ratio: float = 0.1
    warmup_steps: int = 0
    decay_ratio: float = 0.2
    schedule: str = "cosine"
    min_lr_ratio: float = 0.0
    projection_lr_scale: float = 1.0
    layer_lr_decay: float = 1.0
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
    loss: Loss = field(default_factory=Loss)
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    teacher: str = ""
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
    device: str = "auto"
    gather: str = "all"
    rank_timeout: float = 600.0

    def __post_init__(self) -> None:
        in_limits(self)
        require(
            isinstance(self.tasks, Mapping),
            f"tasks = {self.tasks!r} has no weights.",
            "give a table, such as { retrieval = 3.0, sts = 1.0 }",
        )
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas) and self.eps > 0,
            f"betas = {tuple(self.betas)}, eps = {self.eps}: one is out of range.",
            "betas are two numbers from 0 to below 1, eps is above 0",
        )
        one_of("schedule", self.schedule, ("cosine", "linear", "constant", "wsd"))
        one_of("layout", self.layout, ("auto", "padded", "packed"))
        one_of("adamw", self.adamw, ("fused", "foreach"))
        one_of("precision", self.precision, ("fp32", "bf16", "fp16"))
        one_of("sharding", self.sharding, ("replicate", "shard", "hybrid"))
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        one_of("gather", self.gather, ("all", "ring"))
        one_of("exhausted", self.exhausted, ("repeat", "drop", "stop"))
        one_of("hard_rule", self.hard_rule, ("sample", "top"))
        require(
            0 <= self.prompt_dropout <= 1,
            f"prompt_dropout = {self.prompt_dropout} is no share.",
            "give a number from 0 to 1, e.g. 0.1",
        )
        for name in (
            "steps",
            "batch_size",
            "epochs",
            "accumulate",
            "checkpoint_every",
            "data_threads",
            "rank_timeout",
            "shard_ranks",
        ):
            value = getattr(self, name)
            require(value > 0, f"{name} = {value} is not positive.", "give a whole number from 1")
        require(
            self.refresh_every == 0 or 3 <= self.refresh_lag <= self.refresh_every,
            f"refresh_every = {self.refresh_every}, refresh_lag = {self.refresh_lag}: one is out "
            "of range.",
            "refresh_every is 0 (never) or at least refresh_lag, refresh_lag at least 3",
        )
        counts = [part.hard_negatives for part in self.parts] or [self.hard_negatives]
        require(
            not self.dynamic.on or max(counts) > 0,
            "dynamic replaces hard negatives, and hard_negatives is 0.",
            "set hard_negatives, e.g. 2",
        )
        for name in (
            "temperature",
            "lr",
            "mixture_temperature",
            "projection_lr_scale",
            "cosent_scale",
        ):
            value = getattr(self, name)
            require(value > 0, f"{name} = {value} is not positive.", "give a number above 0")
        for name in ("ema", "decay_ratio", "graph_memory", "warmup_steps", "token_budget"):
            value = getattr(self, name)
            require(
                value >= 0,
                f"{name} = {value} is negative.",
                "give a number of at least 0",
            )
        require(
            0 < self.layer_lr_decay <= 1,
            f"layer_lr_decay = {self.layer_lr_decay} is out of range.",
            "give a factor above 0 and at most 1, e.g. 0.9",
        )
        require(self.ema < 1, f"ema = {self.ema} never moves.", "give less than 1, e.g. 0.999")
        self._check_parts()
        self._check_losses()

    def loss_of(self, task: str, part: int = 0) -> Loss:
        """The loss of a task: the stage's, with the part's settings and then the task's over it."""
        over: dict[str, Any] = {}
        if self.parts:
            own = self.parts[part]
            over = {**({} if own.in_batch else {"in_batch": False}), **own.loss}
        over = {**over, **self.losses.get(task, {})}
        return build(Loss, {**plain(self.loss), **over}, f"losses.{task}") if over else self.loss

    @property
    def learns_temperature(self) -> bool:
        """Whether a loss trains the temperature."""
        return any(loss.learn_temperature for loss in self._all_losses())

    @property
    def distils(self) -> bool:
        """Whether a loss matches a teacher's vectors."""
        return any(loss.distill > 0 for loss in self._all_losses())

    def _all_losses(self) -> list[Loss]:
        """The stage's and those of tasks with settings of their own, in every part."""
        parts = range(max(len(self.parts), 1))
        return [self.loss_of(task, i) for task in ("", *self.losses) for i in parts]

    def _check_losses(self) -> None:
        asked = self.distils or any(loss.guided for loss in self._all_losses())
        require(
            asked == bool(self.teacher),
            ("A loss distils from" if self.distils else "A loss is guided by")
            + " a teacher, and there is none."
            if asked
            else f"teacher = {self.teacher!r}, and no loss has a factor for it.",
            "give teacher and loss.distill or loss.guide, or neither",
        )
        require(
            not self.learns_temperature or self.sharding == "replicate",
            "A learned temperature needs whole weights on each rank.",
            'set sharding = "replicate", or loss.learn_temperature = false',
        )

    def _check_parts(self) -> None:
        require(
            not (self.parts and self.accumulate > 1),
            "parts and accumulate both say what a step is made of.",
            "leave accumulate out, or repeat a part",
        )
        require(
            not (self.accumulate > 1 and (self.dynamic.on or self.refresh_every)),
            "accumulate, and hard negatives that change (dynamic, refresh_every).",
            "leave one out: a larger batch_size needs no more memory (graph_memory)",
        )
        require(
            not (self.parts and self.batch_sizes),
            "parts have a batch_size each, and batch_sizes are of single tasks.",
            "leave batch_sizes out, or parts",
        )
        require(
            all(size > 0 for size in self.batch_sizes.values()),
            f"batch_sizes = {dict(self.batch_sizes)}: one is not positive.",
            "give whole numbers from 1",
        )
        shares = [part.ranks for part in self.parts]
        require(
            not any(shares) or all(shares),
            f"parts have ranks = {shares}: some take turns and some do not.",
            "give every part its ranks, or none",
        )
        require(
            not any(shares) or self.sharding == "replicate",
            "Parts on ranks of their own need whole weights on each.",
            'set sharding = "replicate", or let the parts take turns',
        )
