"""GradCache: the gradient of a batch whose graph does not fit, with work linear in its chunks.

    forward   every micro-batch; graphs are kept only where memory allows
    loss      once, over all embeddings, with its gradient by embedding
    backward  chunk by chunk, from the last to the first; without a graph, forward once more

Random numbers of a chunk are drawn from a seed of its own, so that its second forward drops what
the first has dropped. Gradients are added in one order, whether a graph was kept or not: how many
are kept is a matter of memory and speed and shows in no bit. Keeping all is the plain step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from embkit.train.batches import MicroBatch

_OVERHEAD = 8  # numbers a layer saves per token besides its widths: norms, statistics, masks


class Chunks:
    """The micro-batches of one batch, forward and then backward.

    Args:
        forward: from a micro-batch to raw embeddings [b, D].
        micro: at least one. seed: of this batch's dropout, see :func:`seed_of`.
        keep: micro-batches whose graph is kept between the two passes, the last ones.
        around: context of every forward, such as autocast.
        empty: micro-batches that run and count nothing, before the backward of the others: so that
            ranks with sharded weights, which meet in every forward and backward, do as many.
    """

    def __init__(
        self,
        forward: Callable[[MicroBatch], torch.Tensor],
        micro: Sequence[MicroBatch],
        *,
        seed: int,
        keep: int,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        empty: int = 0,
    ) -> None:
        self._forward, self._seed, self._around = forward, seed, around
        self._count = len(micro)
        self._micro = [*micro, *[micro[-1].cut()] * empty]
        self._first = max(len(self._micro) - keep, 0)  # of those that are kept
        self._kept: list[torch.Tensor] = []

    def forward(self) -> torch.Tensor:
        """Raw embeddings [R, D] of all rows, without a graph."""
        parts = []
        for i in range(len(self._micro)):
            with torch.set_grad_enabled(i >= self._first):
                e_BD = self._run(i)
            if i >= self._first:
                self._kept.append(e_BD)
            if i < self._count:
                parts.append(e_BD.detach())
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def backward(
        self, gradient: torch.Tensor, *, before_last: Callable[[], object] | None = None
    ) -> None:
        """Add the gradient of the weights to what is there.

        Args:
            gradient: of the embeddings [R, D] that :meth:`forward` gave.
            before_last: called when one chunk is left, whose backward completes the sum.
        """
        end = len(gradient)
        for i in reversed(range(len(self._micro))):
            if i == 0 and before_last is not None:
                before_last()
            with torch.enable_grad():
                e_BD = self._kept.pop() if i >= self._first else self._run(i)
            if i >= self._count:
                torch.autograd.backward(e_BD, torch.zeros_like(e_BD))
                continue
            start = end - len(e_BD)
            torch.autograd.backward(e_BD, gradient[start:end].to(e_BD.dtype))
            end = start

    def _run(self, i: int) -> torch.Tensor:
        reseed(seed_of(self._seed, i))
        # A context a chunk: autocast would reuse weights that it cast without a graph.
        with self._around():
            return self._forward(self._micro[i])


def reseed(seed: int) -> None:
    """What torch.manual_seed does, without looking for devices that nobody uses (0.2 ms)."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seed_of(*numbers: int) -> int:
    """A seed below 2^63 from whole numbers, such as a run's seed, step and rank."""
    text = " ".join(map(str, numbers)).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


def graph_bytes(config: Any) -> int:
    """Estimated bytes that the graph of one token needs, from a transformers configuration.

    Per layer about eleven vectors of the hidden width (inputs of the norms and of the linear
    layers, queries, keys, values, context, dropout masks) and three of the intermediate width.
    Attention scores are not counted: the fused kernels do not keep them. Four bytes a number,
    whatever the precision: an estimate for a choice that shows in no bit.
    """
    hidden = int(getattr(config, "hidden_size", 0) or 768)
    layers = int(getattr(config, "num_hidden_layers", 0) or 12)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    return 4 * layers * (11 * hidden + 3 * inner + _OVERHEAD)


def kept_graphs(sizes: Sequence[int], token_bytes: int, budget: float) -> int:
    """How many of the last micro-batches keep their graphs.

    Args:
        sizes: padded tokens of each micro-batch. token_bytes: of a token's graph.
        budget: bytes.
    """
    if len(sizes) == 1:
        return 1  # it is alone: forgetting it would only cost a forward
    kept, left = 0, budget / token_bytes
    for size in reversed(sizes):
        left -= size
        if left < 0:
            break
        kept += 1
    return kept
