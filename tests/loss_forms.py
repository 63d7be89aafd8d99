"""The papers' formulas, row by row in float64 autograd, and batches to try them on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from embkit.losses import Sides

Q = torch.tensor([[1, 2, 0, 1], [0, 1, 3, 1], [2, 0, 1, 1]], dtype=torch.float64)
P = torch.tensor([[1, 1, 0, 2], [1, 1, 2, 0], [2, 1, 1, 0]], dtype=torch.float64)
N = torch.tensor([[0, 2, 1, 1], [1, 0, 1, 2], [1, 1, 2, 1]], dtype=torch.float64)
N2 = torch.stack([N, N.flip(0)], 1)


class Batch:
    """Rows with keys: embeddings [3 sides one after another], and what compute takes."""

    def __init__(
        self, q: Tensor, p: Tensor, hard: Tensor | None = None, *, kind: str = "retrieval",
        qid: Any = None, pid: Any = None, hid: Any = None, mask: Any = None, weight: Any = None,
        score: Any = None, hard_score: Any = None,
    ) -> None:  # fmt: skip
        b, width = q.shape
        hard = q.new_zeros(b, 0, width) if hard is None else hard
        h = hard.shape[1]
        self.e = torch.cat([q, p, hard.reshape(-1, width)])
        self.query, self.positive = torch.arange(b), torch.arange(b, 2 * b)
        self.hard = torch.arange(2 * b, 2 * b + b * h).reshape(b, h)
        own = torch.arange(b)

        def int32(x: Any, otherwise: Tensor) -> Tensor:
            return torch.as_tensor(otherwise if x is None else x).to(torch.int32)

        self.sides = Sides(
            kind=kind,
            query_key=int32(qid, own),
            positive_key=int32(pid, own + 1000),
            hard_key=int32(hid, self.hard + 5000),
            hard_mask=torch.ones(b, h, dtype=torch.bool) if mask is None else mask,
            score=torch.zeros(b) if score is None else score,
            weight=torch.ones(b, dtype=q.dtype) if weight is None else weight,
            hard_score=hard_score,
        )

    @property
    def args(self) -> tuple[Any, ...]:
        return self.e, self.query, self.positive, self.hard, self.sides

    def rows(self, keep: Tensor) -> tuple[Any, ...]:
        """Arguments of some rows alone, as one rank has them."""
        s = self.sides
        sides = Sides(
            kind=s.kind, query_key=s.query_key[keep], positive_key=s.positive_key[keep],
            hard_key=s.hard_key[keep], hard_mask=s.hard_mask[keep], score=s.score[keep],
            weight=s.weight[keep],
            hard_score=None if s.hard_score is None else s.hard_score[keep],
        )  # fmt: skip
        return self.e, self.query[keep], self.positive[keep], self.hard[keep], sides


def drawn(seed: int = 0, b: int = 9, h: int = 3, width: int = 8, **more: Any) -> Batch:
    """Random rows among which queries, positives and hard negatives repeat, some absent."""
    g = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 7, shape, generator=g)

    shapes = ((b, width), (b, width), (b, h, width))
    q, p, n = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    mask = torch.rand(b, h, generator=g) < 0.8
    weight = torch.rand(b, generator=g, dtype=torch.float64) + 0.1
    score = torch.rand(b, generator=g)
    hard_score = torch.rand(b, h, generator=g)
    hard_score[0, :1] = score[1] = torch.nan  # the teacher has not scored all
    given = {
        "qid": ids(b) + 100, "pid": ids(b), "hid": ids(b, h), "mask": mask, "weight": weight,
        "score": score, "hard_score": hard_score, **more,
    }  # fmt: skip
    return Batch(q, p, n, **given)


def unit(x: Tensor, dim: int) -> Tensor:
    return torch.nn.functional.normalize(x[..., :dim], dim=-1)


def masked(batch: Batch, rule: str, i: int, j: int) -> bool:
    """Whether row j is none of row i's: the rules of Gemini and of Qwen3."""
    s = batch.sides
    positive = bool(s.positive_key[i] == s.positive_key[j])
    query = bool(s.query_key[i] == s.query_key[j])
    return {"keys": positive or query, "positives": positive, "off": False}[rule]


def own_hard(batch: Batch, i: int) -> list[int]:
    """Columns of a row's own hard negatives that are there and not its positive again."""
    s = batch.sides
    keep = s.hard_mask[i] & (s.hard_key[i] != s.positive_key[i])
    return keep.nonzero()[:, 0].tolist()


def formula(form: str, batch: Batch, e: Tensor, tau: float, dim: int, rule: str = "keys") -> Tensor:
    """The form's loss at one width, weighed by row; each as its paper prints it."""
    q, p = unit(e[batch.query], dim), unit(e[batch.positive], dim)
    n = unit(e[batch.hard], dim)
    rows = []
    for i in range(len(q)):
        positive = q[i] @ p[i]
        hard = [q[i] @ n[i, k] for k in own_hard(batch, i)]
        others = [j for j in range(len(q)) if j != i and not masked(batch, rule, i, j)]
        terms: list[Tensor] = []
        if form in ("gemini-v2", "gecko", "conan", "qwen3"):
            terms.append(positive / tau)
        if form == "gecko":
            terms += [q[i] @ q[j] / tau for j in others]
        if form == "qwen3":
            close = positive.detach() + 0.1
            terms += [s / tau for s in hard if s.detach() <= close]
            for j in others:
                each = (q[i] @ q[j], p[i] @ p[j], q[i] @ p[j])
                terms += [s / tau for s in each if s.detach() <= close]
        elif form == "embedding-gemma":
            terms += [s / tau + 5.0 * s.detach() for s in hard]
        else:
            terms += [s / tau for s in hard]
        if form not in ("conan", "qwen3"):
            terms += [q[i] @ p[j] / tau for j in others]
        if not terms:
            rows.append(positive * 0)
            continue
        rows.append(torch.logsumexp(torch.stack(terms), 0) - positive / tau)
    return (torch.stack(rows) * batch.sides.weight).sum() / batch.sides.weight.sum()


def gradient_of(function: Callable[[Tensor], Tensor], e: Tensor) -> tuple[float, Tensor]:
    leaf = e.detach().clone().requires_grad_()
    loss = function(leaf)
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad
