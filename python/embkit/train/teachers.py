"""What losses are fed beside a batch: a teacher's vectors and scores, what is learned for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from embkit.data.batches import mined_files
from embkit.data.teacher import Scores, Teacher
from embkit.train.gradcache import seed_of

if TYPE_CHECKING:
    from embkit.losses import Outcome, Sides
    from embkit.recipe import Train
    from embkit.train.batches import Batch

_TEMPERATURE, _PROJECTION = "log_temperature", "teacher_projection"
_TINY = 1e-20


class Teachers:
    """A teacher's vectors and scores of the rows of a batch.

    A task's scores are those of its examples or, of mined negatives, the reranker's; where it has
    neither, the cosines of the teacher's vectors.

    Args:
        config: teacher, and the losses of the tasks. store: of the run. parts: names of the tasks
            of each part of a step. mined: directory of the negatives, where they are mined.
        refreshed: whether they are mined again during training, so that scores lack some.

    Attributes:
        width: of the vectors, None without any.
        scored: tasks that have scores of their own.

    Raises:
        UsageError, CorruptError: vectors of another store, or damaged.
    """

    def __init__(
        self,
        config: Train,
        store: Any,
        parts: Sequence[Sequence[str]] = (),
        *,
        mined: Path | None = None,
        refreshed: bool = False,
    ) -> None:
        self._vectors = Teacher(config.teacher, store) if config.teacher else None
        self.width = None if self._vectors is None else self._vectors.width
        self._store = store
        wanted = {
            name
            for i, names in enumerate(parts)
            for name in names
            if config.loss_of(name, i).distill_scores and not (refreshed and self._vectors)
        }
        files = mined_files(mined, store) if wanted else {}
        found = {
            name: Scores.of_reranked(store, name, files[name].parent)
            if name in files
            else Scores.of_examples(store, name)
            for name in sorted(wanted)
            if store.task(name)["kind"] == "retrieval"
        }
        self._scores = {name: scores for name, scores in found.items() if scores.any}
        self.scored = frozenset(self._scores)

    def vectors(self, batch: Batch, device: torch.device) -> torch.Tensor | None:
        """[R, width] of the rows that were embedded, where the batch's loss asks for them."""
        if self._vectors is None or not (batch.loss.distill or batch.loss.guided):
            return None
        found = torch.from_numpy(self._vectors.rows(batch.filled.rows))
        return found.to(device, non_blocking=True)

    def sides(self, batch: Batch) -> Sides:
        """With the teacher's scores, where the batch's loss asks for them."""
        filled = batch.filled
        if not batch.loss.distill_scores or filled.kind != "retrieval":
            return batch.sides
        query, positive, hard = (filled[name] for name in ("query", "positive", "hard"))
        scores = self._scores.get(filled.task)
        if scores is not None:
            # By text: a row may be that of a text without its prompt.
            text = self._store.text_id(filled.rows)
            own, theirs = (scores.of(text[query], text[positive]),
                           scores.of(text[query][:, None], text[hard]))  # fmt: skip
        elif self._vectors is not None:
            unit = self._vectors.rows(filled.rows)
            unit /= np.linalg.norm(unit, axis=1, keepdims=True).clip(min=_TINY)
            own = np.einsum("bw,bw->b", unit[query], unit[positive])
            theirs = np.einsum("bw,bhw->bh", unit[query], unit[hard])
        else:
            return batch.sides
        return replace(
            batch.sides, score=torch.from_numpy(own), hard_score=torch.from_numpy(theirs)
        )


def learn(encoder: nn.Module, config: Train, teacher_width: int | None = None) -> None:
    """Give an encoder what is trained beside it, where a loss asks for it.

    ``log_temperature`` [1]: at the learning rate of the run AdamW moves it by about that much a
    step, so a temperature changes slowly and stays above 0. ``teacher_projection`` [D, W], from the
    embeddings to a teacher that is wider than they: jina-embeddings-v5 projects so, because the
    teacher's own vectors projected to the embeddings would collapse. Its first numbers are drawn
    from the run's seed.

    Args:
        teacher_width: of the teacher's vectors, where there is one.
    """
    device = next(encoder.parameters()).device
    if config.learns_temperature:
        start = torch.tensor([math.log(config.temperature)], device=device)
        encoder.register_parameter(_TEMPERATURE, nn.Parameter(start))
    dims: Sequence[int] = encoder.dims  # type: ignore[assignment]
    if config.distils and teacher_width is not None and teacher_width > max(dims):
        drawn = torch.Generator().manual_seed(seed_of(config.seed, teacher_width))
        first = torch.randn(max(dims), teacher_width, generator=drawn) / max(dims) ** 0.5
        encoder.register_parameter(_PROJECTION, nn.Parameter(first.to(device)))


def forget(encoder: nn.Module) -> None:
    """Take that away again: it is no part of a model."""
    for name in (_TEMPERATURE, _PROJECTION):
        encoder._parameters.pop(name, None)


def temperature_of(encoder: nn.Module, batch: Batch | None = None) -> torch.Tensor | None:
    """The learned temperature (), None where there is none or the batch's loss has its own."""
    found = encoder._parameters.get(_TEMPERATURE)
    if found is None or (batch is not None and not batch.loss.learn_temperature):
        return None
    return found.detach().exp().reshape(())


def projection_of(encoder: nn.Module, batch: Batch) -> torch.Tensor | None:
    """The projection [D, W] to a wider teacher; None without one, or where it has no use."""
    found = encoder._parameters.get(_PROJECTION)
    return None if found is None or not batch.loss.distill else found.detach()


def add_learned_gradients(encoder: nn.Module, out: Outcome, factor: float) -> None:
    """Accumulate the gradients of what is trained beside the encoder; of 0 where a batch's loss
    has no use for it, so that every rank has one."""
    for name, slope in ((_TEMPERATURE, out.d_temperature), (_PROJECTION, out.d_projection)):
        found = encoder._parameters.get(name)
        if found is None:
            continue
        gradient = torch.zeros_like(found)
        if slope is not None:
            gradient = slope * factor
            if name == _TEMPERATURE:  # its logarithm is trained
                gradient = gradient * found.detach().exp()
        torch.autograd.backward(found, gradient.to(found.dtype))
