"""Search over weights that add up to 1: a grid, Dirichlet draws, Bayesian optimisation.

The mixture of tasks (:mod:`embkit.mix`) and the weights of a soup (:mod:`embkit.soup`) are searched
with it. Weights have four digits; equal seeds and scores give equal candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, float]
METHODS = ("grid", "dirichlet", "bayes")
_POINTS = 2048  # weights among which "bayes" chooses


class Budget(Protocol):
    """How to search; :class:`embkit.recipe.Mix` is one.

    Attributes:
        method: of ``METHODS``. candidates: how many are tried.
        factors: by which the grid changes weights. initial: draws before the model of "bayes".
        concentration: of the Dirichlet distribution. seed: of the draws.
    """

    @property
    def method(self) -> str: ...
    @property
    def candidates(self) -> int: ...
    @property
    def factors(self) -> tuple[float, ...]: ...
    @property
    def initial(self) -> int: ...
    @property
    def concentration(self) -> float: ...
    @property
    def seed(self) -> int: ...


def candidates(
    first: Weights, budget: Budget, tried: Sequence[Mapping[str, Any]], *, least: float
) -> Iterator[Weights]:
    """Weights to try, none twice.

    Args:
        first: what the search starts from. least: of each weight, before they are scaled.
        tried: ``{"weights", "dev"}`` of what was scored, which grows while this is iterated.
    """
    if budget.method == "grid":
        source = grid(first, budget.factors, least=least)
    elif budget.method == "dirichlet":
        draws = drawn(list(first), budget.seed, budget.concentration, least=least)
        source = itertools.chain([first], draws)
    else:
        source = _bayes(first, budget, tried, least)
    seen: list[Weights] = []
    for weights in source:
        if weights in seen:
            continue
        seen.append(weights)
        yield weights
        if len(seen) == budget.candidates:
            return


def grid(first: Weights, factors: Sequence[float], *, least: float) -> Iterator[Weights]:
    """Weights, then with one of them times each factor, then with two ..."""
    for changes in range(len(first) + 1):
        for names in itertools.combinations(first, changes):
            for by in itertools.product(factors, repeat=changes):
                change = dict(zip(names, by, strict=True))
                changed = {name: w * change.get(name, 1.0) for name, w in first.items()}
                yield normalised(changed, least=least)


def drawn(
    names: Sequence[str], seed: int, concentration: float = 1.0, *, least: float
) -> Iterator[Weights]:
    """Draws of a Dirichlet distribution, without end."""
    rng = np.random.default_rng([seed, 0])
    while True:
        weights = rng.dirichlet(np.full(len(names), concentration))
        yield normalised(dict(zip(names, weights.tolist(), strict=True)), least=least)


def _bayes(
    first: Weights, budget: Budget, tried: Sequence[Mapping[str, Any]], least: float
) -> Iterator[Weights]:
    """The first and some draws, then where the expected improvement is largest."""
    names = list(first)
    yield first
    draws = drawn(names, budget.seed, budget.concentration, least=least)
    yield from itertools.islice(draws, budget.initial)
    rng = np.random.default_rng([budget.seed, 1])
    while True:
        known = np.array([[t["weights"][name] for name in names] for t in tried])
        scores = np.array([t["dev"] for t in tried])
        points = rng.dirichlet(np.full(len(names), budget.concentration), _POINTS)
        # Half of them near the best: the share of the best that a draw keeps is drawn too.
        pull = rng.random((_POINTS // 2, 1))
        points[::2] = pull * known[scores.argmax()] + (1 - pull) * points[::2]
        gain = expected_improvement(known, scores, points)
        for i in np.argsort(-gain, kind="stable"):
            weights = dict(zip(names, points[i].tolist(), strict=True))
            chosen = normalised(weights, least=least)
            if all(chosen != t["weights"] for t in tried):
                break
        yield chosen


def expected_improvement(
    known: NDArray[np.float64], scores: NDArray[np.float64], points: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What a Gaussian process expects a point to gain over the best known score.

    Args:
        known: weights [n, names] with their ``scores`` [n]. points: weights [m, names].

    Returns:
        [m], in spreads of the scores.
    """
    import warnings

    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    scale = scores.std() or 1.0
    kernel = Matern(0.3, (0.05, 3.0), nu=2.5) + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel)
    with warnings.catch_warnings():  # a length at its bound is no fault with so few points
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(known, (scores - scores.mean()) / scale)
    mean, spread = process.predict(points, return_std=True)
    spread = np.maximum(spread, 1e-9)
    # The process's own value at the best point, not the score: that has noise.
    above = mean - process.predict(known).max()
    gain: NDArray[np.float64] = above * norm.cdf(above / spread) + spread * norm.pdf(above / spread)
    return gain


def normalised(weights: Mapping[str, float], *, least: float) -> Weights:
    """Weights that add up to 1, with four digits; none below ``least`` before they are scaled."""
    total = sum(weights.values())
    raised = {name: max(w / total, least) for name, w in weights.items()}
    total = sum(raised.values())
    return {name: round(w / total, 4) for name, w in raised.items()}
