"""A step's batches as torch tensors on the model's device: one, or several parts of one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from embkit.data.batches import Batch as Filled
from embkit.data.batches import Batches
from embkit.errors import UsageError
from embkit.losses import Sides
from embkit.recipe import Loss
from embkit.train.parallel import Ranks, Share

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that go through the encoder together.

    Attributes:
        ids: int64 [b, L] padded, or [T] packed. prompt_len: int64 [b].
        mask: int64 [b, L] when padded. cu_seqlens: int32 [b + 1] when packed.
        longest: tokens of the longest row.
    """

    ids: torch.Tensor
    prompt_len: torch.Tensor
    longest: int
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    def embed(self, encoder: Any) -> torch.Tensor:
        """Raw embeddings [b, D]."""
        out: torch.Tensor
        if self.cu_seqlens is not None:
            out = encoder(
                self.ids, prompt_len=self.prompt_len, cu_seqlens=self.cu_seqlens,
                longest=self.longest,
            )  # fmt: skip
        else:
            out = encoder(self.ids, self.mask, self.prompt_len)
        return out

    def flat(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its tokens [T] without padding, and their number in each row [b]."""
        if self.cu_seqlens is not None:
            return self.ids, self.cu_seqlens.diff()
        assert self.mask is not None
        return self.ids[self.mask.bool()], self.mask.sum(1)

    def cut(self) -> MicroBatch:
        """Its first token alone: the least that a forward takes."""
        first = self.prompt_len[:1].clamp(max=0)
        if self.cu_seqlens is not None:
            bounds = self.cu_seqlens[:2].clamp(max=1)
            return replace(self, ids=self.ids[:1], cu_seqlens=bounds, prompt_len=first, longest=1)
        assert self.mask is not None
        return replace(
            self, ids=self.ids[:1, :1], mask=self.mask[:1, :1], prompt_len=first, longest=1
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch of a step, valid until the next step's is taken.

    Attributes:
        filled: the buffers and what the plan says of the step.
        sides: keys, masks, scores and weights of the loss.
        micro: the encoder's input; their embeddings, one after another, are [R, D].
        query, positive: int64 [b], places of each side in those embeddings.
        hard: int64 [b, H].
        share: the ranks that have it between them; None for one process.
        weight: of its loss in the step's. loss: of its task.
        step: optimizer step, from 0. place: among the parts of a step.
        others: the other parts that this process works on.
    """

    filled: Filled
    sides: Sides
    micro: list[MicroBatch]
    query: torch.Tensor
    positive: torch.Tensor
    hard: torch.Tensor
    step: int
    share: Share | None = None
    weight: float = 1.0
    loss: Loss = field(default_factory=Loss)
    place: int = 0
    others: tuple[Batch, ...] = ()

    @property
    def in_batch(self) -> bool:
        """Whether other rows' positives are negatives."""
        return bool(self.loss.terms()["in_batch"])

    @property
    def task(self) -> str:
        """Names of the parts' tasks, for a line of the log."""
        return "+".join(part.filled.task for part in (self, *self.others))

    @classmethod
    def of(cls, filled: Filled, device: torch.device, **about: Any) -> Batch:
        """View the buffer as tensors; for a GPU one asynchronous copy moves the whole step."""
        buffer = torch.from_numpy(filled.buffer)
        if device.type != "cpu":
            buffer = buffer.to(device, non_blocking=True)
            filled.busy = torch.cuda.Event()
            filled.busy.record()
        view = partial(filled.view, buffer, dtype=partial(getattr, torch))
        ids, prompt_len = view("tokens"), view("prompt_len")
        bounds = view("cu_seqlens") if "cu_seqlens" in filled.fields else None
        mask = view("mask") if bounds is None else None
        micro = []
        for m in filled.micro:
            parts: dict[str, Any] = {"prompt_len": prompt_len[m.rows], "longest": m.longest}
            if mask is not None:
                parts["ids"] = ids[m.tokens].reshape(-1, m.longest)
                parts["mask"] = mask[m.tokens].reshape(-1, m.longest)
            elif bounds is not None:
                parts["ids"], parts["cu_seqlens"] = ids[m.tokens], bounds[m.bounds]
            micro.append(MicroBatch(**parts))
        names = ("query_key", "positive_key", "hard_key", "hard_mask", "score", "weight")
        sides = Sides(kind=filled.kind, **{name: view(name) for name in names})
        places = {name: view(name) for name in ("query", "positive", "hard")}
        return cls(filled=filled, sides=sides, micro=micro, **places, **about)


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Where one part of every step comes from."""

    batches: Batches
    about: dict[str, Any]
    share: Callable[[str], Share | None]  # of a task's batches
    start: int = 0
    stride: int = 1


class Steps:
    """The batches of a run: one part a step, or several (``parts``, ``accumulate``).

    Args:
        store: of the run. config: its settings. ranks: all of the run.
        **options: more for every :class:`embkit.data.Batches`.

    Attributes:
        several: whether a step has more than one part.
        sizes: rows of each part's global batch, the most where its tasks have different ones.
        examples, skipped: of all parts, as in :class:`embkit.data.Batches`.

    Raises:
        UsageError: a part that no rank works on, or ranks that are too many for a batch.
    """

    def __init__(self, store: Any, config: Train, ranks: Ranks, **options: Any) -> None:
        parts = config.parts
        self.several = bool(parts) or config.accumulate > 1
        self._loss_of = config.loss_of
        own, team = None, ranks
        if parts and parts[0].ranks:
            own, team = ranks.part([part.ranks for part in parts])
            if ranks.world == 1:
                own = None  # one process takes the parts in turn: the same sum
        sizes = [part.batch_size for part in parts] or [config.batch_size]
        least = sizes if parts else [min([*sizes, *config.batch_sizes.values()])]
        for i, size in enumerate(least):
            if own in (None, i) and size < team.world:
                raise UsageError(
                    f"A batch of {size} rows is fewer than {team.world} ranks.",
                    where="batch_size",
                    fix="give every rank at least one row",
                )
        settings: dict[str, Any] = {
            "seed": config.seed,
            "temperature": config.mixture_temperature,
            "cap": config.mixture_cap,
            "hard_rule": config.hard_rule,
            "token_budget": config.token_budget,
            "no_duplicates": config.no_duplicates,
            "prompt_dropout": config.prompt_dropout,
            "exhausted": config.exhausted,
            "epochs": config.epochs,
            "rank": team.rank,
            "world_size": team.world,
            **options,
        }

        shares: dict[int, Share] = {}

        def share(size: int) -> Share | None:
            if ranks.world == 1:
                return None
            if size not in shares:
                shares[size] = Share(team, size, ring=config.gather == "ring")
            return shares[size]

        def sized(size: int) -> Callable[[str], Share | None]:
            return lambda task: share(size)

        self._all: list[_Stream] = []
        if parts:
            for i, part in enumerate(parts):
                made = Batches(
                    store, batch_size=part.batch_size, weights=part.tasks,
                    hard_negatives=part.hard_negatives,
                    **{**settings, **({} if own in (None, i) else {"rank": 0, "world_size": 1})},
                )  # fmt: skip
                about = {
                    "weight": part.weight,
                    "place": i,
                }
                self._all.append(_Stream(batches=made, about=about, share=sized(part.batch_size)))
        else:
            made = Batches(
                store, batch_size=config.batch_size, weights=config.tasks,
                batch_sizes=config.batch_sizes, hard_negatives=config.hard_negatives, **settings,
            )  # fmt: skip

            def of_task(task: str) -> Share | None:
                return share(config.batch_sizes.get(task, config.batch_size))

            count = config.accumulate
            for i in range(count):
                about = {"weight": 1 / count, "place": i}
                self._all.append(
                    _Stream(batches=made, about=about, share=of_task, start=i, stride=count)
                )
            used = {config.batch_sizes.get(name, config.batch_size) for name in made.names}
            sizes = [max(used)]
        self.count = len(self._all)
        self._own = [s for i, s in enumerate(self._all) if own in (None, i)]
        self._stride = self._all[0].stride
        self.sizes = sizes * (self.count // len(sizes))

    @property
    def distinct(self) -> list[Batches]:
        """Those of each part, once each."""
        return [s.batches for s in self._all if s.start == 0]

    @property
    def examples(self) -> dict[str, int]:
        """Usable examples of each task that is trained on."""
        return {n: c for b in self.distinct for n, c in b.examples.items()}

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Unusable examples by task and reason."""
        return {n: c for b in self.distinct for n, c in b.skipped.items()}

    @property
    def steps(self) -> int | None:
        """Steps until a part's mixture ends, None for never."""
        ends = [b.plan.steps for b in self.distinct]
        found = [end // self._stride for end in ends if end is not None]
        return min(found) if found else None

    def tasks(self, step: int) -> list[str]:
        """The task of each part of a step, those of other ranks too."""
        return [
            s.batches.names[s.batches.plan.part(step * s.stride + s.start)[0]] for s in self._all
        ]

    def cursor(self, done: int) -> dict[str, int]:
        """Batches that each task has given in ``done`` steps; with parts, ``"0/task"``."""
        return {name: count for name, count, _ in self._counts(done)}

    def epochs(self, done: int) -> dict[str, int]:
        """Passes over each task that are complete after ``done`` steps."""
        return {name: count // max(epoch, 1) for name, count, epoch in self._counts(done)}

    def _counts(self, done: int) -> Iterator[tuple[str, int, int]]:
        parts = self.distinct
        for i, batches in enumerate(parts):
            counts = batches.plan.count_before(done * self._stride)
            for t, (name, count) in enumerate(zip(batches.names, counts, strict=True)):
                label = name if len(parts) == 1 else f"{i}/{name}"
                yield label, count, batches.plan.batches_per_epoch(t)

    def stream(
        self,
        start: int,
        stop: int,
        *,
        threads: int,
        device: torch.device,
        before: Callable[[int, int], Any] | None = None,
    ) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop`` in order, assembled ahead by threads.

        Args:
            before: as in :meth:`embkit.data.Batches.stream`, with a part's place before the step.
        """
        ahead = [
            s.batches.stream(
                start * s.stride + s.start, stop * s.stride, stride=s.stride, threads=threads,
                before=None if before is None else partial(before, s.about["place"]),
            )
            for s in self._own
        ]  # fmt: skip
        try:
            for filled in zip(*ahead, strict=True):
                parts = [
                    Batch.of(
                        one,
                        device,
                        step=one.step // s.stride,
                        share=s.share(one.task),
                        **s.about,
                        loss=self._loss_of(one.task, s.about["place"]),
                    )
                    for one, s in zip(filled, self._own, strict=True)
                ]
                yield replace(parts[0], others=tuple(parts[1:])) if len(parts) > 1 else parts[0]
        finally:
            for one in ahead:
                one.close()  # type: ignore[attr-defined]


def layout_of(encoder: Encoder, config: Train) -> str:
    """How a run's micro-batches lie in memory: ``"padded"`` or ``"packed"``.

    Raises:
        UsageError: packed is asked for and the model does not take it.
    """
    if config.layout == "auto":
        fast = encoder.device.type == "cuda" and config.precision != "fp32"
        return "packed" if fast and encoder.packs_fast else "padded"
    if config.layout == "packed" and not encoder.can_pack:
        raise UsageError(
            f"{type(encoder.backbone).__name__} takes no packed input here.",
            where="layout",
            fix='set layout = "padded"',
        )
    return config.layout


def allocator(device: torch.device) -> Any:
    """What gives :class:`Batches` its buffers: pinned memory where the model is on a GPU."""
    if device.type != "cuda":
        return None

    def pinned(size: int) -> np.ndarray:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()

    return pinned
