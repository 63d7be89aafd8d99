"""What a loss needs of the model, the tasks and the data, asked before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from embkit.errors import UsageError, nearest
from embkit.recipe import Train


def losses_fit(
    config: Train,
    dims: Sequence[int],
    store: Any,
    parts: Sequence[Sequence[str]],
    *,
    teacher_width: int | None = None,
    scored: Collection[str] = (),
    refreshed: bool = False,
    ranks: int = 1,
) -> None:
    """Refuse losses that the model, the tasks or the data have not what it takes for.

    Args:
        dims: widths of the model. store: an ``embkit.data.Store``. parts: names of the tasks of
            each part of a step. teacher_width: of the teacher's vectors. scored: tasks that have a
            teacher's scores. refreshed: whether hard negatives are mined again during training.
            ranks: processes that share the run.

    Raises:
        UsageError: a task or a width that is not there, negatives that a task cannot have, a
            teacher that is too wide or has scored nothing.
    """
    for name in config.losses:
        if name not in store.task_names:
            raise UsageError(
                f"losses.{name}: the store has no task of that name.",
                fix=nearest(name, store.task_names),
            )
    wider = teacher_width is not None and teacher_width > max(dims)
    if wider and config.distils and config.sharding != "replicate":
        raise UsageError(
            f"The teacher's vectors have width {teacher_width}, the embeddings {max(dims)}: the "
            "projection between them needs whole weights on each rank.",
            where="sharding",
            fix='set sharding = "replicate", or take a narrower teacher',
        )
    for i, names in enumerate(parts):
        for name in names:
            _fits(config, i, name, dims, store)
            if teacher_width is None:
                _has_scores(config, i, name, store, scored, refreshed)
            if ranks > 1 and config.gather == "ring":
                _rings(config, i, name)


def _rings(config: Train, part: int, name: str) -> None:
    loss = config.loss_of(name, part)
    terms = loss.terms()
    wrong = {
        "doc_doc": terms["doc_doc"],
        "symmetric": terms["symmetric"],
        'hard = "shared"': loss.hard == "shared",
        "spread_out": loss.spread_out > 0,
        "guide": loss.guided,
        "in_batch = false": terms["same_tower"] and not terms["in_batch"],
    }
    for what, there in wrong.items():
        if there:
            raise UsageError(
                f"The loss of task {name!r} needs the rows of all ranks at once ({what}), and "
                "gather = 'ring' brings them one rank's at a time.",
                where="gather",
                fix='set gather = "all", or another loss',
            )


def _fits(config: Train, part: int, name: str, dims: Sequence[int], store: Any) -> None:
    loss, kind = config.loss_of(name, part), store.task(name)["kind"]
    terms: Mapping[str, Any] = loss.terms()
    strange = sorted(set(loss.dim_weights) - {str(d) for d in dims})
    if strange:
        raise UsageError(
            f"loss.dim_weights has a width {strange[0]}, the model has {list(dims)}.",
            where=f"task {name}",
            fix="weigh widths of the model",
        )
    others = terms["in_batch"] or terms["same_tower"] or terms["doc_doc"]
    if kind == "classification" and not others:
        raise UsageError(
            f"Task {name!r} is a classification, whose negatives are other rows', and its loss "
            "takes none of them.",
            where=f"losses.{name}",
            fix=f'set losses.{name} = {{ form = "gemini-v2" }}, or turn its records into queries '
            "with positives and negatives",
        )
    hard = config.parts[part].hard_negatives if config.parts else config.hard_negatives
    for asked, what in (
        (not others, "leaves hard negatives only"),
        (loss.hard == "shared", "shares hard negatives"),
        (loss.distill_scores > 0, "compares scores of hard negatives"),
    ):
        if kind == "retrieval" and asked and hard == 0:
            raise UsageError(
                f"The loss of task {name!r} {what}, and hard_negatives is 0.",
                where=f"losses.{name}",
                fix="set hard_negatives, e.g. 4",
            )


def _has_scores(
    config: Train, part: int, name: str, store: Any, scored: Collection[str], refreshed: bool
) -> None:
    """Without a teacher's vectors, whose cosines any pair has."""
    if not config.loss_of(name, part).distill_scores or store.task(name)["kind"] != "retrieval":
        return
    if name not in scored:
        raise UsageError(
            f"Task {name!r} has no teacher's scores of positives and hard negatives: its examples "
            "have none, or it was mined without a reranker (a miner scores the negatives alone).",
            where=f"losses.{name}",
            fix="give records pos_scores and neg_scores, mine with a reranker, set teacher (any "
            "model's vectors), or set distill_scores = 0 for this task",
        )
    if refreshed:
        raise UsageError(
            f"Task {name!r} distils scores, and refresh_every mines negatives that have none.",
            where="refresh_every",
            fix="set teacher (any model's vectors), refresh_every = 0, or distill_scores = 0",
        )
