"""The linear head between pooling and embedding: one layer, or two with nothing between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def new_projection(hidden: int, width: int, *, between: int = 0) -> nn.Module:
    """A randomly initialised projection without bias, rows of about unit norm.

    Args:
        hidden: width of the pooled state. width: of the embedding.
        between: 0 for one layer [width, hidden]; else the width between two layers, 3072 between
            768 and 768 in EmbeddingGemma.
    """
    if between:
        return nn.Sequential(_random(hidden, between), _random(between, width))
    return _random(hidden, width)


def prefix(hidden: int, width: int) -> nn.Linear:
    """A projection that keeps the first ``width`` of ``hidden`` numbers."""
    layer = nn.Linear(hidden, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer


def linears(projection: nn.Module | None) -> list[nn.Linear]:
    """The layers of a projection in order; none for None."""
    if projection is None:
        return []
    if isinstance(projection, nn.Linear):
        return [projection]
    layers = [layer for layer in projection.children() if isinstance(layer, nn.Linear)]
    if len(layers) != len(list(projection.children())) or not layers:
        raise TypeError("a projection is one nn.Linear or a Sequential of them")
    return layers


def join(layers: list[nn.Linear]) -> nn.Module | None:
    """One projection from its layers."""
    return None if not layers else layers[0] if len(layers) == 1 else nn.Sequential(*layers)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside, and leave the caller's state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _random(hidden: int, width: int) -> nn.Linear:
    layer = nn.Linear(hidden, width, bias=False)
    nn.init.normal_(layer.weight, std=hidden**-0.5)
    return layer
