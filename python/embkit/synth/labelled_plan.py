"""What is asked for labelled texts and graded pairs: the prompt with the settings over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embkit.errors import UsageError, nearest
from embkit.synth.asking import seed_of
from embkit.synth.prompts import Listing, Prompt, load


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """How labelled texts and graded pairs are written.

    Attributes:
        prompt: name or file of a prompt of kind classification or sts.
        examples: texts or pairs that are asked for; fewer stay.
        shares: of labels, in the place of the prompt's.
        lists: entries in the place of a list that the model makes.
        controls: options in the place of the prompt's own, by variable.
        temperature: of the model. seed: of draws and sampling.
        judge: judge each text again for its label, with the prompt's ``[judge]``.
        min_fit: classification: the least probability of the label, among all, by the judge.
        max_off: sts: how far the judge's grade may be from the pair's score.
        balance: drop what is too much of a label, so that what stays has the shares asked for.
        max_rejected: share of requests that the backend may fail to answer.
        shard: requests of a shard.
    """

    prompt: str | Path | Prompt = "reviews"
    examples: int = 1000
    shares: Mapping[str, float] | None = None
    lists: Mapping[str, Sequence[str]] | None = None
    controls: Mapping[str, Sequence[str]] | None = None
    temperature: float = 0.9
    seed: int = 0
    judge: bool = True
    min_fit: float = 0.5
    max_off: float = 1.0
    balance: bool = True
    max_rejected: float = 0.05
    shard: int = 32

    def __post_init__(self) -> None:
        if self.examples < 2 or self.shard < 1 or self.seed < 0 or self.temperature < 0:
            raise UsageError(
                "examples, shard, seed or temperature is out of range.",
                fix="examples is at least 2, shard at least 1, the others at least 0",
            )
        if not (0 <= self.max_rejected <= 1 and 0 <= self.min_fit <= 1 and self.max_off >= 0):
            raise UsageError("max_rejected, min_fit or max_off is out of range.")


class Plan:
    """What will be asked: the prompt with the settings over it.

    Attributes:
        how, prompt: as given.
        controls: options of each. shares: of each label. given: lists that are not made.
    """

    def __init__(self, how: Labelled) -> None:
        self.how, self.prompt = how, load(how.prompt)
        if self.prompt.kind == "retrieval":
            raise UsageError(
                f"The prompt {self.prompt.name!r} writes queries for passages.",
                fix="give passages, or a prompt of kind classification or sts",
            )
        if how.judge and self.prompt.judge is None:
            raise UsageError(
                f"The prompt {self.prompt.name!r} has no [judge].",
                fix="add one, or switch judging off",
            )
        self.controls = {**self.prompt.controls}
        self.shares = {name: label.share for name, label in self.prompt.labels.items()}
        names = [listing.name for listing in self.prompt.lists]
        for what, given, known in (
            ("control", how.controls, self.controls), ("label", how.shares, self.shares),
            ("list", how.lists, names),
        ):  # fmt: skip
            for name in given or {}:
                if name not in known:
                    raise UsageError(
                        f"The prompt {self.prompt.name!r} has no {what} {name!r}; "
                        + nearest(name, known)
                    )
        self.controls |= {n: tuple(options) for n, options in (how.controls or {}).items()}
        self.shares |= dict(how.shares or {})
        if any(v < 0 for v in self.shares.values()) or sum(v > 0 for v in self.shares.values()) < 2:
            raise UsageError("Less than two labels have a share above 0.", fix="raise a share")
        self.given = {name: tuple(texts) for name, texts in (how.lists or {}).items()}
        for name, texts in self.given.items():
            if not texts:
                raise UsageError(f"The list {name!r} is empty.", fix="one entry a line")

    def params(self) -> dict[str, Any]:
        """What decides the texts beside the model, JSON types."""
        how = self.how
        judged = [how.min_fit, how.max_off] if how.judge else None
        return {
            "prompt": self.prompt.digest, "examples": how.examples, "shares": self.shares,
            "lists": {name: list(texts) for name, texts in self.given.items()},
            "controls": {name: list(found) for name, found in sorted(self.controls.items())},
            "temperature": how.temperature, "seed": how.seed, "judge": judged,
            "balance": how.balance, "max_rejected": how.max_rejected, "shard": how.shard,
        }  # fmt: skip

    @property
    def texts(self) -> int:
        """Texts or pairs of one answer that are used."""
        last = self.prompt.steps[-1]
        return max(1, round(last.items * last.tail))

    @property
    def requests(self) -> int:
        """Answers of the last step that are asked for."""
        return -(-self.how.examples // self.texts)

    @cached_property
    def labels(self) -> list[str]:
        """The label of each request: counts by largest remainder, order drawn."""
        counts = apportion(list(self.shares.values()), self.requests)
        each = [name for name, n in zip(self.shares, counts, strict=True) for _ in range(n)]
        order = np.random.default_rng(seed_of(self.how.seed, 0, "labels")).permutation(len(each))
        return [each[i] for i in order]

    def parent(self, listing: Listing) -> str:
        """The earlier list under whose entries a list is made, or nothing.

        Raises:
            UsageError: it has the variables of two that do not come from each other.
        """
        before = [one for one in self.prompt.lists if one.name in listing.variables]
        above = {self.parent(one) for one in before if one.name not in self.given}
        found = [one.name for one in before if one.name not in above]
        if len(found) > 1:
            raise UsageError(f"The list {listing.name!r} is made under {' and '.join(found)}.")
        return found[0] if found else ""


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers by largest remainder, ties to the earlier.

    >>> apportion([1, 1, 2], 6), apportion([1, 1, 1], 4)
    ([2, 1, 3], [2, 1, 1])
    """
    exact = [share * total / sum(shares) for share in shares]
    out = [int(x) for x in exact]
    by_rest = sorted(range(len(out)), key=lambda i: (out[i] - exact[i], i))
    for i in by_rest[: total - sum(out)]:
        out[i] += 1
    return out
