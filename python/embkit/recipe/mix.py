"""Section of a recipe that decides how the mixture of tasks is searched: mix."""

from __future__ import annotations

from dataclasses import dataclass

from embkit.recipe.schema import one_of, require


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Search of the tasks' weights before fine-tuning (docs/mixtures.md).

    Attributes:
        method: "grid" around a first mixture, "dirichlet" draws, or "bayes", which goes on from
            that mixture and ``initial`` draws where a model of the scores expects the most.
        candidates: mixtures that are tried; 0 is no search.
        steps: of each candidate's training.
        alone: steps of a run on each task alone; the steps it needs to converge are its weight in
            the first mixture (Gemini Embedding). 0 takes the recipe's.
        factors: by which the grid changes weights, first of one task, then of two ...
        initial: draws before the model of "bayes" (EmbeddingGemma: 10).
        concentration: of the Dirichlet distribution; 1 is uniform, more is nearer to equal shares.
        keep: best mixtures that are trained in full, one run each, for the soup.
        seed: of the draws.
    """

    method: str = "bayes"
    candidates: int = 0
    steps: int = 100
    alone: int = 0
    factors: tuple[float, ...] = (2.0, 0.5)
    initial: int = 10
    concentration: float = 1.0
    keep: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("mix.method", self.method, ("grid", "dirichlet", "bayes"))
        require(
            min(self.candidates, self.alone) >= 0 and min(self.steps, self.initial, self.keep) > 0,
            f"mix.candidates = {self.candidates}, steps = {self.steps}, alone = {self.alone}, "
            f"initial = {self.initial}, keep = {self.keep}: one is out of range.",
            "candidates and alone are at least 0, the others at least 1",
        )
        require(
            self.concentration > 0 and all(f > 0 and f != 1 for f in self.factors),
            f"mix.concentration = {self.concentration}, factors = {list(self.factors)}: one is out "
            "of range.",
            "give numbers above 0, and no factor of 1",
        )

    @property
    def on(self) -> bool:
        """Whether anything is searched."""
        return self.candidates > 0
