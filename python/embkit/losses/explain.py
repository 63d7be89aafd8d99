"""Who is a negative of whom, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from embkit.losses.candidates import Candidates
from embkit.recipe import Loss, Train

_KINDS = ("retrieval", "classification", "sts")
# What a conversion makes of a row: its positive, and its hard negatives where it makes any.
_MADE = {
    "classes": ("another text of its class", "texts of other classes"),
    "label-names": ("the name of its class", "names of other classes"),
    "pairs": ("a partner of label 1", "partners of label 0"),
    "scored-pairs": ("a partner of a high score", ""),
    "bitext": ("its translation; each side of a pair is a query once", ""),
    "nli": ("a text that it entails", "texts that contradict it"),
    "reranking": ("a relevant document", "the other judged documents"),
    "title-body": ("the body under its title", ""),
}


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a task.

    Attributes:
        kind: of its examples. rule: of the conversion that makes them.
        mined: whether its hard negatives are mined; else they come with its examples.
    """

    kind: str
    rule: str = "off"
    mined: bool = True


def explain(
    config: Train,
    tasks: Mapping[str, Known] | None = None,
    *,
    complete: bool = False,
    ranks: int = 1,
) -> str:
    """Which candidates enter whose denominator, for each task, with the numbers of a configuration.

    Args:
        config: of a stage.
        tasks: those that are known. Others are explained by kind.
        complete: there are no others.
        ranks: processes that train together.

    >>> print(explain(Train(batch_size=4)).splitlines()[0])
    retrieval: InfoNCE as gemini-v2, temperature 0.02, 4 rows of one task.
    """
    known = dict(tasks or {})
    if not config.parts:
        return "\n".join(_batch(config, 0, known, complete, ranks))
    lines: list[str] = []
    for i, part in enumerate(config.parts):
        names = ", ".join(part.tasks) or "all tasks"
        lines.append(f"part {i}, weight {part.weight:g}: {names}.")
        own = part.ranks if part.ranks and ranks > 1 else ranks
        lines += ["  " + line for line in _batch(config, i, known, complete, own)]
    return "\n".join(lines)


def _batch(
    config: Train, part: int, known: Mapping[str, Known], complete: bool, ranks: int
) -> Iterator[str]:
    """Tasks of which only the kind can be told, then those that are known."""
    mixture = config.parts[part].tasks if config.parts else config.tasks
    wanted = [name for name, weight in mixture.items() if weight > 0]
    # A task with a loss of its own, and of no known kind, is most likely one of retrieval.
    named = {**dict.fromkeys(config.losses, Known(kind="retrieval")), **known}
    if not wanted and complete:
        named = dict(known)
    strange = [name for name in wanted if name not in named]
    one = _Teller(config, part, ranks)
    if strange or not (wanted or complete):
        for kind in _KINDS:
            yield from one.tell("", Known(kind=kind))
    for name, about in named.items():
        if not wanted or name in wanted:
            yield from one.tell(name, about)


@dataclass(frozen=True)
class _Teller:
    """Tells of the batches of one part of a step."""

    config: Train
    part: int
    ranks: int

    def tell(self, name: str, about: Known) -> Iterator[str]:
        """The lines of a task; without a name, of any task of the kind."""
        config, kind = self.config, about.kind
        loss, (rows, hard) = config.loss_of(name, self.part), self._sizes(name, kind)
        made = "" if about.rule == "off" else f", made by {about.rule}"
        title = f"{name} ({kind}{made})" if name and (made or name != kind) else kind
        if kind == "sts":
            scale = config.cosent_scale if loss.cosent_scale is None else loss.cosent_scale
            yield f"{title}: CoSENT, scale {scale:g}, {rows} pairs of one task."
            yield from _lines(
                "each pair is ranked against every pair of another gold score; no other negatives."
            )
            yield from _shared_by(self.ranks, rows, "pairs", "cosines of all ranks are compared")
            yield from _more(loss, hard=0, contrastive=False)
            return
        start = config.temperature if loss.temperature is None else loss.temperature
        learned = f"learned from {start:g} on" if loss.learn_temperature else f"{start:g}"
        yield f"{title}: InfoNCE as {loss.form}, temperature {learned}, {rows} rows of one task."
        if kind == "classification":
            yield from _lines(
                "positive of a text: another text of its class, drawn anew each epoch."
            )
        elif about.rule in _MADE:
            yield from _lines(f"positive of a query: {_MADE[about.rule][0]}.")
        yield from self._denominator(loss, about, rows, hard)
        yield from _lines(_masked(kind, loss, hard))
        yield from _lines(self._unmasked(loss, about))
        yield from _margin(loss)
        yield from _guided(loss)
        if hard and loss.terms()["hardness_alpha"]:
            yield from _lines(
                f"a hard negative with cosine s weighs exp({loss.terms()['hardness_alpha']:g} s)."
            )
        if loss.symmetric:
            other = f"its query and the {rows - 1} other queries"
            if loss.terms()["doc_doc"]:
                other += f", and the {rows - 1} other rows' positives"
            yield from _lines(
                f"the mean of that and of the opposite direction, in the denominator of a "
                f"positive: {other}."
            )
        met = "a query meets the rows of all ranks" if self._meets(loss) else "none meets another's"
        yield from _shared_by(self.ranks, rows, "rows", met)
        yield from _more(loss, hard=hard, contrastive=True)

    def _sizes(self, name: str, kind: str) -> tuple[int, int]:
        """Rows of the task's global batch, and hard negatives of each."""
        config = self.config
        if config.parts:
            own = config.parts[self.part]
            rows, hard = own.batch_size, own.hard_negatives
        else:
            rows = config.batch_sizes.get(name, config.batch_size)
            hard = config.hard_negatives
        return rows, hard if kind == "retrieval" else 0

    @staticmethod
    def _meets(loss: Loss) -> bool:
        return _others(loss) or loss.hard == "shared"

    def _denominator(self, loss: Loss, about: Known, rows: int, hard: int) -> Iterator[str]:
        found = Candidates.of(loss, rows=rows, hard=hard)
        inside = ["its positive"] if found.positive else []
        outside = [] if found.positive else ["its positive"]
        shared = loss.hard == "shared" and hard > 0
        for there, what in (
            (found.positives, f"the {rows - 1} other rows' positives"),
            (found.queries, f"the {rows - 1} other queries"),
            (shared, f"the {hard} hard negatives of every row, {self._drawn(about)}"),
        ):
            (inside if there else outside).append(what)
        if not shared:
            outside[-1:] = ["other rows' hard negatives"] if hard else []
            if hard:
                own = f"{hard} hard negatives" if hard > 1 else "hard negative"
                inside.append(f"its own {own}, {self._drawn(about)}")
        yield from _lines(f"in the denominator of a query: {_and(inside) or 'nothing'}.")
        if found.documents:
            yield from _lines(
                f"also there: the cosines of its positive with the {rows - 1} other rows' "
                "positives."
            )
        fewer = ", fewer where a row has fewer hard negatives" if hard else ""
        yield from _lines(f"candidates of a query: {found.total}, less what is masked{fewer}.")
        if outside:
            yield from _lines(f"not there: {'; '.join(outside)}.")

    def _drawn(self, about: Known) -> str:
        source = "those mined for it"
        if about.rule == "classes":
            source += " in other classes"
        if not about.mined:
            made = _MADE.get(about.rule, ("", ""))[1]
            source = "those that come with it" + (f" ({made})" if made else "")
        if self.config.dynamic.on:
            return f"a slice of {source}, which moves on by {self.config.dynamic.rule}"
        if self.config.hard_rule == "top":
            return f"the first of {source}"
        return f"drawn anew each epoch from {source}"

    def _unmasked(self, loss: Loss, about: Known) -> str:
        """What a reader may take for masked, and is not."""
        if loss.mask == "off" or not self._meets(loss):
            return ""
        if about.rule == "classes":
            return "not masked: other texts of its class in other rows."
        if about.rule == "bitext" and not self.config.no_duplicates:
            return (
                "not masked: the other side of its pair, where both are in one batch; "
                "no_duplicates = true keeps them apart."
            )
        return ""


def _others(loss: Loss) -> bool:
    terms = loss.terms()
    return bool(terms["in_batch"] or terms["same_tower"] or terms["doc_doc"])


def _masked(kind: str, loss: Loss, hard: int) -> str:
    """Which candidates keys take out, by the rules of the kernel."""
    if loss.mask == "off":
        return "never masked: equal texts and classes are negatives like others."
    if kind == "classification":
        return "masked: texts of its own class." if _others(loss) else ""
    rules = []
    if _others(loss):
        query = "whose query is in its query's near-duplicate cluster, or "
        rules.append(
            f"rows {query if loss.mask == 'keys' else ''}whose positive is in its positive's"
            + ("" if loss.mask == "keys" else " near-duplicate cluster")
        )
    if hard:
        where = "its positive's cluster" if rules else "its positive's near-duplicate cluster"
        rules.append(f"hard negatives in {where}")
    return f"masked: {'; '.join(rules)}." if rules else ""


def _shared_by(ranks: int, rows: int, what: str, met: str) -> Iterator[str]:
    if ranks < 2:
        return
    least, more = divmod(rows, ranks)
    each = f"{least + 1} or {least}" if more else f"{least}"
    yield from _lines(f"on {ranks} ranks: {each} {what} on each; {met}.")


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


def _guided(loss: Loss) -> Iterator[str]:
    if not loss.guided:
        return
    margin = loss.guide_margin
    if loss.guide == "relative":
        limit = f"{100 * (1 + margin):g} % of that of its positive"
    else:
        limit = "that of its positive"
        limit += f" less {-margin:g}" if margin < 0 else f" plus {margin:g}" if margin else ""
    yield from _lines(f"dropped: negatives with a cosine of the teacher's vectors above {limit}.")


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
    """Wrapped; none of an empty text."""
    return textwrap.wrap(text, 88, initial_indent="  ", subsequent_indent="    ")
