"""Who is a negative of whom, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping

from embkit.recipe import Loss, Train

_KINDS = ("retrieval", "classification", "sts")


def explain(config: Train, kinds: Mapping[str, str] | None = None) -> str:
    """Which candidates enter whose denominator, for each task, with the numbers of a configuration.

    Args:
        config: of a stage.
        kinds: of tasks by name, where they are known. Tasks without settings of their own are
            explained by kind.

    >>> print(explain(Train(batch_size=4)).splitlines()[0])
    retrieval: InfoNCE as gemini-v2, temperature 0.02, 4 rows of one task.
    """
    kinds = kinds or {}
    lines: list[str] = []
    if not config.parts:
        lines += _batch(config, 0, (), config.batch_size, config.hard_negatives, kinds)
    for i, part in enumerate(config.parts):
        names = ", ".join(part.tasks) or "all tasks"
        lines.append(f"part {i}, weight {part.weight:g}: {names}.")
        told = _batch(config, i, tuple(part.tasks), part.batch_size, part.hard_negatives, kinds)
        lines += ["  " + line for line in told]
    return "\n".join(lines)


def _batch(
    config: Train, part: int, tasks: tuple[str, ...], rows: int, hard: int, kinds: Mapping[str, str]
) -> Iterator[str]:
    """The kinds of tasks of a batch, then the tasks with settings of their own."""
    own = [name for name in config.losses if not tasks or name in tasks]
    known = {kinds.get(name) for name in tasks if name not in own}
    for kind in _KINDS:
        if not tasks or None in known or kind in known:
            yield from _one(kind, kind, config, config.loss_of("", part), rows, hard)
    for name in own:
        kind = kinds.get(name, "retrieval")
        yield from _one(f"{name} ({kind})", kind, config, config.loss_of(name, part), rows, hard)


def _one(name: str, kind: str, config: Train, loss: Loss, b: int, h: int) -> Iterator[str]:
    if kind == "sts":
        scale = config.cosent_scale if loss.cosent_scale is None else loss.cosent_scale
        yield f"{name}: CoSENT, scale {scale:g}, {b} pairs of one task."
        yield from _lines(
            "each pair is ranked against every pair of another gold score; no other negatives."
        )
        yield from _more(loss, hard=0, contrastive=False)
        return
    h = h if kind == "retrieval" else 0
    start = config.temperature if loss.temperature is None else loss.temperature
    learned = f"learned from {start:g} on" if loss.learn_temperature else f"{start:g}"
    yield f"{name}: InfoNCE as {loss.form}, temperature {learned}, {b} rows of one task."
    if kind == "classification":
        yield from _lines("positive of a text: another text of its class, drawn anew each epoch.")
    terms = loss.terms()
    inside = ["its positive"] if terms["include_positive"] else []
    outside = [] if terms["include_positive"] else ["its positive"]
    shared = loss.hard == "shared" and h > 0
    for there, what in (
        (terms["in_batch"], f"the {b - 1} other rows' positives"),
        (terms["same_tower"], f"the {b - 1} other queries"),
        (shared, f"the {h} hard negatives of every row, {_drawn(config)}"),
    ):
        (inside if there else outside).append(what)
    if not shared:
        outside[-1:] = ["other rows' hard negatives"] if h else []
        if h:
            inside.append(f"its own {h} hard negatives, {_drawn(config)}")
    yield from _lines(f"in the denominator of a query: {_and(inside) or 'nothing'}.")
    if terms["doc_doc"]:
        yield from _lines(
            f"also there: the cosines of its positive with the {b - 1} other rows' positives."
        )
    if outside:
        yield from _lines(f"not there: {'; '.join(outside)}.")
    yield from _lines(_masked(kind, loss))
    yield from _margin(loss)
    if h and terms["hardness_alpha"]:
        yield from _lines(
            f"a hard negative with cosine s weighs exp({terms['hardness_alpha']:g} s)."
        )
    if loss.symmetric:
        other = f"its query and the {b - 1} other queries"
        if terms["doc_doc"]:
            other += f", and the {b - 1} other rows' positives"
        yield from _lines(
            f"the mean of that and of the opposite direction, in the denominator of a positive: "
            f"{other}."
        )
    yield from _more(loss, hard=h, contrastive=True)


def _drawn(config: Train) -> str:
    if config.dynamic.on:
        return f"a slice of those mined for it, which moves on by {config.dynamic.rule}"
    if config.hard_rule == "top":
        return "the first of those mined for it"
    return "drawn anew each epoch from those mined for it"


def _masked(kind: str, loss: Loss) -> str:
    if loss.mask == "off":
        return "never masked: equal texts and classes are negatives like others."
    if kind == "classification":
        return "masked: texts of its own class."
    found = "masked: what is in the near-duplicate cluster of its positive"
    terms = loss.terms()
    others = terms["in_batch"] or terms["same_tower"] or terms["doc_doc"]
    if loss.mask == "keys" and others:
        found += ", and what comes from a row whose query is in its own cluster"
    return f"{found}."


def _margin(loss: Loss) -> Iterator[str]:
    terms = loss.terms()
    margin = terms["margin"]
    if margin is None:
        return
    if terms["margin_relative"]:
        limit = f"{100 * (1 + margin):g} % of its positive's"
    elif margin < 0:
        limit = f"its positive's less {-margin:g}"
    else:
        limit = f"its positive's plus {margin:g}"
    yield from _lines(f"dropped, at each width: negatives with a cosine above {limit}.")


def _more(loss: Loss, *, hard: int, contrastive: bool) -> Iterator[str]:
    """Widths, and what is added."""
    if loss.dim_weights:
        weights = ", ".join(f"{w} x {v:g}" for w, v in loss.dim_weights.items())
        yield from _lines(f"widths: {weights}; the others x 1.")
    if loss.dims_schedule == "progressive":
        yield from _lines("widths join one after another, the smallest first.")
    if contrastive and loss.spread_out:
        yield from _lines(
            f"added: {loss.spread_out:g} x the mean squared cosine of different queries, and of "
            "different positives."
        )
    if loss.distill:
        sides = "queries, positives and hard negatives" if hard else "both sides"
        yield from _lines(
            f"added: {loss.distill:g} x the {loss.distance} distance of {sides} from the teacher's "
            "vectors."
        )
    if hard and loss.distill_scores:
        yield from _lines(
            f"added: {loss.distill_scores:g} x the divergence from the teacher's softmax over "
            f"positive and own hard negatives, its scores over {loss.teacher_temperature:g}."
        )


def _and(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _lines(text: str) -> list[str]:
    return textwrap.wrap(text, 88, initial_indent="  ", subsequent_indent="    ")
