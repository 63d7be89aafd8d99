"""The section of a recipe that decides a loss: candidates, masks, and what is added."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from embkit.recipe.schema import one_of, require

# In what a form differs from the first, which is the plain one. Each is the published formula, but
# for the identity mask, which is `mask` for all of them.
FORMS: dict[str, dict[str, Any]] = {
    "gemini-v2": {},
    "gemini-v1": {"include_positive": False},
    "gecko": {"same_tower": True},
    "conan": {"in_batch": False},
    "qwen3": {"same_tower": True, "doc_doc": True, "margin": 0.1},
    "embedding-gemma": {"include_positive": False, "hardness": 5.0},
}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """InfoNCE in the form of a paper, or with its terms chosen one by one (docs/losses.md).

    A setting that is left out is the form's. ``embkit explain`` prints who is a negative of whom.

    Attributes:
        form: gemini-v2, gemini-v1, gecko, conan, qwen3 or embedding-gemma.
        in_batch: other rows' positives are negatives.
        same_tower: other queries are. doc_doc: the cosines of the row's positive with other
            positives join the sum, too.
        include_positive: the positive is in its own denominator.
        hardness: alpha of the weight exp(alpha s) of a hard negative with cosine s.
        margin: drop negatives whose cosine exceeds the positive's by more, at each width;
            negative ones ask for a distance. margin_rule: "absolute"; "relative", a share of the
            positive's cosine (-0.05 keeps up to 95 % of it); or "off".
        guide: drop candidates that the stage's ``teacher`` finds nearer than the positive by more
            than guide_margin (GISTEmbed): "absolute", "relative" (a share of the teacher's cosine
            of the positive) or "off".
        hard: "own" hard negatives only, or those of all rows, "shared".
        mask: which other rows' positives are no negatives: "keys", of an equal query or equal to
            the positive; "positives", the latter; or "off". Equal is the near-duplicate cluster,
            or the class.
        symmetric: mean with the opposite direction, positives against queries.
        temperature, cosent_scale: in the place of the stage's. learn_temperature: it is trained,
            starting from the stage's.
        dim_weights: factor of the loss at a width, by width; 1 where none is given.
        dims_schedule: "joint", or "progressive": widths join one after another, the smallest
            first, each after an equal share of the steps.
        spread_out: factor of the mean squared cosine of different queries, and of positives.
        distill: factor of the distance of queries, positives and hard negatives from the vectors
            of the stage's ``teacher``. distance: "cosine" (1 - cosine) or "l2" (squared).
        distill_scores: factor of the divergence of the softmax over positive and own hard
            negatives from a teacher's, whose scores are in the examples. teacher_temperature: of
            those scores.
    """

    form: str = "gemini-v2"
    in_batch: bool | None = None
    same_tower: bool | None = None
    doc_doc: bool | None = None
    include_positive: bool | None = None
    hardness: float | None = None
    margin: float | None = None
    margin_rule: str = "absolute"
    guide: str = "off"
    guide_margin: float = 0.0
    hard: str = "own"
    mask: str = "keys"
    symmetric: bool = False
    temperature: float | None = None
    learn_temperature: bool = False
    cosent_scale: float | None = None
    dim_weights: Mapping[str, float] = field(default_factory=dict)
    dims_schedule: str = "joint"
    spread_out: float = 0.0
    distill: float = 0.0
    distance: str = "cosine"
    distill_scores: float = 0.0
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        one_of("loss.form", self.form, tuple(FORMS))
        one_of("loss.hard", self.hard, ("own", "shared"))
        one_of("loss.mask", self.mask, ("keys", "positives", "off"))
        one_of("loss.dims_schedule", self.dims_schedule, ("joint", "progressive"))
        one_of("loss.distance", self.distance, ("cosine", "l2"))
        one_of("loss.margin_rule", self.margin_rule, ("absolute", "relative", "off"))
        one_of("loss.guide", self.guide, ("absolute", "relative", "off"))
        require(
            math.isfinite(self.guide_margin) and (self.guided or not self.guide_margin),
            f"loss.guide_margin = {self.guide_margin}, and loss.guide = {self.guide!r}.",
            'give a number, with loss.guide = "absolute" or "relative"',
        )
        for name in ("temperature", "cosent_scale", "teacher_temperature"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf,
                f"loss.{name} = {value} is not positive.",
                "give a number above 0",
            )
        for name in ("hardness", "spread_out", "distill", "distill_scores"):
            value = getattr(self, name)
            require(
                value is None or 0 <= value < math.inf,
                f"loss.{name} = {value} is out of range.",
                "give a number of at least 0",
            )
        for width, value in self.dim_weights.items():
            require(
                width.isdigit() and 0 <= value < math.inf,
                f"loss.dim_weights: {width} = {value} is no weight of a width.",
                'write { "256" = 0.5 }, weights of at least 0',
            )
        require(
            not (self.learn_temperature and self.temperature is not None),
            f"loss.temperature = {self.temperature} is of one task, a learned one is of the run.",
            "leave loss.temperature out; the learned one starts from the stage's",
        )
        self._check_terms()

    @property
    def guided(self) -> bool:
        """Whether a teacher decides what is a negative."""
        return self.guide != "off"

    def _check_terms(self) -> None:
        """What the form and the settings over it leave must be a loss."""
        terms = self.terms()
        require(
            terms["margin"] is not None or self.margin_rule != "relative",
            'loss.margin_rule = "relative", and there is no margin.',
            "set loss.margin, e.g. 0.1",
        )
        require(
            terms["in_batch"] or not self.symmetric,
            "loss.symmetric compares positives with queries in the batch, and in_batch is false.",
            "leave symmetric out, or let other rows be negatives",
        )

    def terms(self) -> dict[str, Any]:
        """Options of :func:`embkit.kernels.infonce`: the form's, and what is set over them."""
        own: dict[str, Any] = {
            "in_batch": True,
            "same_tower": False,
            "doc_doc": False,
            "include_positive": True,
            "hardness": 0.0,
            "margin": None,
            **FORMS[self.form],
        }
        own = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in own.items()}
        return {
            "in_batch": own["in_batch"],
            "same_tower": own["same_tower"],
            "doc_doc": own["doc_doc"],
            "include_positive": own["include_positive"],
            "hardness_alpha": own["hardness"],
            "margin": None if self.margin_rule == "off" else own["margin"],
            "margin_relative": self.margin_rule == "relative",
            "symmetric": self.symmetric,
        }
