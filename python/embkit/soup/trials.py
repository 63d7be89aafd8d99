"""Candidates of a soup, merged and judged on dev sets; none twice, also after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from embkit.soup.merge import merge

_FILE = "trials.jsonl"


class Trials:
    """Scores of merges of some models.

    Args:
        models: their directories.
        base: what ``alpha`` mixes them with.
        on: split folder that judges.
        folder: for the merged candidate and the scores so far.
    """

    def __init__(
        self, models: Sequence[Path], base: Path | None, on: Path | str, folder: Path
    ) -> None:
        self.models, self.base, self.on, self.folder = models, base, on, folder
        self._known: dict[str, float] = {}
        file = folder / _FILE
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line that a kill cut short
                    key, score = json.loads(line)
                    self._known[key] = float(score)

    def score(
        self,
        members: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        how: str = "mean",
        alpha: float = 1.0,
    ) -> float:
        """The mean over the kinds of tasks, at full width, of a merge of ``members`` in this order.

        Raises:
            UsageError: models that do not fit together.
        """
        key = json.dumps([list(members), list(weights or ()), how, alpha])
        if key not in self._known:
            found = self._judge(members, weights, how, alpha)
            self._known[key] = found
            with (self.folder / _FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, found]) + "\n")
        return self._known[key]

    def close(self) -> None:
        """Remove what is not to be published."""
        shutil.rmtree(self.folder / "trial", ignore_errors=True)
        (self.folder / _FILE).unlink(missing_ok=True)

    def _judge(
        self, members: Sequence[int], weights: Sequence[float] | None, how: str, alpha: float
    ) -> float:
        from embkit.evaluate import judge
        from embkit.model import Encoder

        model = self.models[members[0]]
        mixed = self.base is not None and alpha != 1
        if len(members) > 1 or mixed:
            model = merge(
                [self.models[i] for i in members], self.folder / "trial", weights=weights,
                how=how, base=self.base if mixed else None, alpha=alpha,
            )  # fmt: skip
        return judge(Encoder.from_pretrained(model), self.on)
