"""The head between pooling and embedding: one linear layer, or two with nothing between them.

Models of others may have a bias and an activation in it (LaBSE a tanh); embkit makes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

IDENTITY = "torch.nn.modules.linear.Identity"
# Name in a Dense module's config -> what it is.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"torch.nn.modules.activation.{kind.__name__}": kind
    for kind in (nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


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
    """The linear layers of a projection in order; none for None."""
    return [layer for layer, _ in dense_layers(projection)]


def dense_layers(projection: nn.Module | None) -> list[tuple[nn.Linear, str]]:
    """The linear layers in order, each with the name of the activation behind it."""
    if projection is None:
        return []
    parts = [projection] if isinstance(projection, nn.Linear) else list(projection.children())
    out: list[tuple[nn.Linear, str]] = []
    names = {kind: name for name, kind in ACTIVATIONS.items()}
    for part in parts:
        if isinstance(part, nn.Linear):
            out.append((part, IDENTITY))
        elif type(part) in names and out and out[-1][1] == IDENTITY:
            out[-1] = (out[-1][0], names[type(part)])
        else:
            raise TypeError(
                "a projection is one nn.Linear, or a Sequential of them and activations"
            )
    if not out:
        raise TypeError("a projection has a linear layer")
    return out


def join(layers: list[nn.Module]) -> nn.Module | None:
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
