"""What the similarities of a batch say of the training, for the log; nothing here changes a run.

Every ``log_every`` steps, from the embeddings that the step has anyway. For pairs with negatives,
by width: how often the positive is nearer to its query than every candidate is (accuracy), and the
mean cosines of positives and of negatives; and the share of candidates that keys mask. Candidates
are the other rows' passages, of all ranks, and own hard negatives. For graded pairs (STS): the mean
cosine, and the share of comparisons (pairs of pairs with different scores) in the right order.

Everything is a sum over rows: parts of a task and ranks add up to the numbers of one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from embkit.recipe import Train
    from embkit.train.batches import Batch
    from embkit.train.parallel import Ranks

_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # cosines of a width at a time
_TINY = 1e-20
# Counts of a part, and then sums of each width.
_COUNTS = ("rows", "compared", "candidates", "masked", "pairs", "ordered")
_SUMS = ("right", "positive", "negative", "cosine", "concordant")


class _Sums:
    """Counts and sums of one part on one rank, in float64."""

    def __init__(self, widths: int, device: torch.device) -> None:
        self.count, self.of = (
            {name: torch.zeros(n, dtype=torch.float64, device=device) for name in names}
            for names, n in ((_COUNTS, 1), (_SUMS, widths))
        )

    def flat(self) -> torch.Tensor:
        return torch.cat([*self.count.values(), *self.of.values()])


class Statistics:
    """Gathers the sums of a step's parts.

    Args:
        config: log_every, steps. dims: MRL widths. parts: of a step, on all ranks together.
        ranks: of the run.
    """

    def __init__(self, config: Train, dims: Sequence[int], parts: int, ranks: Ranks) -> None:
        self.config, self.dims, self.parts, self.ranks = config, tuple(dims), parts, ranks
        self._own: dict[int, torch.Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether a step, from 0, is measured: every ``log_every``, and the last."""
        done = step + 1
        return done % self.config.log_every == 0 or done == self.config.steps

    @torch.no_grad()
    def add(self, batch: Batch, embeddings: torch.Tensor) -> None:
        """Take the embeddings [R, D] of one part; every rank that shares it must."""
        if self.due(batch.step):
            e_RD = embeddings.detach().float()
            measure = _graded if batch.sides.kind == "sts" else _contrasted
            self._own[batch.place] = measure(batch, e_RD, self.dims)

    def take(self) -> torch.Tensor | None:
        """Sums of all parts over all ranks, float64 [parts, n]; None where none were due."""
        if not self._own:
            return None
        width = len(_COUNTS) + len(_SUMS) * len(self.dims)
        total = torch.zeros(self.parts, width, dtype=torch.float64, device=self.ranks.device())
        for place, sums in self._own.items():
            total[place] = sums.to(total.device)
        self._own = {}
        return self.ranks.sum(total).cpu()


def report(
    sums: torch.Tensor, tasks: Sequence[str], dims: Sequence[int], config: Train
) -> dict[str, Any]:
    """Means by task, as JSON types; None where there is nothing to take a mean of.

    Args:
        sums: what :meth:`Statistics.take` gave. tasks: of the parts, in their order.
        dims: MRL widths. config: temperature.
    """
    by_task: dict[str, torch.Tensor] = {}
    for task, part in zip(tasks, sums, strict=True):
        by_task[task] = part + by_task[task] if task in by_task else part
    return {task: _means(part.tolist(), dims, config) for task, part in by_task.items()}


def scalars(statistics: dict[str, Any]) -> dict[str, float]:
    """Numbers of :func:`report` by tag, for TensorBoard and trackers."""
    found: dict[str, float | None] = {}
    for task, numbers in statistics.items():
        for name, value in numbers.items():
            if isinstance(value, dict):
                found |= {f"batch/{task}/{name}_at_{dim}": v for dim, v in value.items()}
            else:
                found[f"batch/{task}/{name}"] = value
    return {tag: value for tag, value in found.items() if value is not None}


def _means(numbers: list[float], dims: Sequence[int], config: Train) -> dict[str, Any]:
    count = dict(zip(_COUNTS, numbers, strict=False))
    sums: dict[str, list[float]] = {}
    for i, name in enumerate(_SUMS):
        start = len(_COUNTS) + i * len(dims)
        sums[name] = numbers[start : start + len(dims)]

    def by_width(name: str, total: float) -> dict[str, float | None]:
        return {str(d): _over(s, total) for d, s in zip(dims, sums[name], strict=True)}

    if count["pairs"]:
        return {
            "order": by_width("concordant", count["ordered"]),
            "cosine": by_width("cosine", count["pairs"]),
        }
    return {
        "temperature": config.temperature,
        "masked": _over(count["masked"], count["candidates"]),
        "accuracy": by_width("right", count["compared"]),
        "positive": by_width("positive", count["rows"]),
        "negative": by_width("negative", count["candidates"] - count["masked"]),
    }


def _over(total: float, count: float) -> float | None:
    return total / count if count else None


def _contrasted(batch: Batch, e_RD: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Sums of a batch with positives and negatives, float64 [n]."""
    device, sides, share = e_RD.device, batch.sides, batch.share
    q_BD, p_BD = (e_RD[index.to(device)] for index in (batch.query, batch.positive))
    own_key, own_query = sides.positive_key.to(device), sides.query_key.to(device)
    p_ND, key_N, query_N, start = p_BD, own_key, own_query, 0
    there_N = torch.ones(len(p_ND), dtype=torch.bool, device=device)
    if share is not None and batch.in_batch:
        p_ND, key_N, query_N, there_N = share.gather(p_BD, own_key, own_query)
        start = share.start
    found = _Sums(len(dims), device)
    passages = _norms(p_ND, dims) if batch.in_batch else None
    hard = batch.hard.shape[1] > 0
    step = max(_BLOCK.get(device.type, _BLOCK["cpu"]) // max(len(p_ND), 1), 1)
    for at in range(0, len(q_BD), step):
        rows = slice(at, at + step)
        q, key, query = q_BD[rows], own_key[rows, None], own_query[rows, None]
        norm = _norms(q, dims)
        banks = []  # of candidates: cosines by width, whether there, whether masked
        if passages is not None:
            place = start + torch.arange(at, at + len(q), device=device)[:, None]
            other = there_N & (torch.arange(len(p_ND), device=device) != place)
            masked = other & ((key_N == key) | (query_N == query))
            banks.append((_cosines(q, p_ND, norm, passages, dims), other, masked))
        if hard:
            h = e_RD[batch.hard[rows].to(device)]
            other = sides.hard_mask[rows].to(device)
            masked = other & (sides.hard_key[rows].to(device) == key)
            banks.append((_private(q, h, norm, dims), other, masked))
        live = [other & ~masked for _, other, masked in banks]
        compared = torch.zeros(len(q), dtype=torch.bool, device=device)
        for (_, other, masked), left in zip(banks, live, strict=True):
            found.count["candidates"] += other.sum()
            found.count["masked"] += masked.sum()
            compared |= left.any(1)
        found.count["rows"] += len(q)
        found.count["compared"] += compared.sum()
        positive = _paired(q, p_BD[rows], dims)
        for k in range(len(dims)):
            best = torch.full((len(q),), -torch.inf, device=device)
            for (cosines, _, _), left in zip(banks, live, strict=True):
                best = torch.maximum(best, cosines[k].masked_fill(~left, -torch.inf).amax(1))
                there = torch.where(left, cosines[k], 0)
                found.of["negative"][k] += there.sum(dtype=torch.float64)
            found.of["right"][k] += ((positive[k] > best) & compared).sum()
            found.of["positive"][k] += positive[k].sum(dtype=torch.float64)
    return found.flat()


def _graded(batch: Batch, e_RD: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Sums of a batch of graded pairs, float64 [n]."""
    device, share = e_RD.device, batch.share
    a_BD, b_BD = (e_RD[index.to(device)] for index in (batch.query, batch.positive))
    own_KB, own_B = torch.stack(_paired(a_BD, b_BD, dims)), batch.sides.score.to(device)
    all_KN, all_N = own_KB, own_B
    there_N = torch.ones(len(all_N), dtype=torch.bool, device=device)
    if share is not None:
        gathered, all_N, there_N = share.gather(own_KB.t().contiguous(), own_B)
        all_KN = gathered.t()
    found = _Sums(len(dims), device)
    found.count["pairs"] += len(own_B)
    found.of["cosine"] += own_KB.sum(1, dtype=torch.float64)
    step = max(_BLOCK.get(device.type, _BLOCK["cpu"]) // max(len(all_N), 1), 1)
    for at in range(0, len(own_B), step):
        above = (own_B[at : at + step, None] > all_N) & there_N
        found.count["ordered"] += above.sum()
        for k in range(len(dims)):
            right = own_KB[k, at : at + step, None] > all_KN[k]
            found.of["concordant"][k] += (above & right).sum()
    return found.flat()


def _norms(x: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Norm of each prefix, [..., ] by width."""
    return [torch.linalg.vector_norm(x[..., :d], dim=-1).clamp_min(_TINY) for d in dims]


def _paired(a: torch.Tensor, b: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """Cosines of rows with rows, [B] by width."""
    norms = zip(_norms(a, dims), _norms(b, dims), dims, strict=True)
    return [(a[:, :d] * b[:, :d]).sum(1) / (n * m) for n, m, d in norms]


def _private(
    q: torch.Tensor, h: torch.Tensor, norm: Sequence[torch.Tensor], dims: Sequence[int]
) -> list[torch.Tensor]:
    """Cosines of rows with their own H candidates, [B, H] by width."""
    norms = zip(norm, _norms(h, dims), dims, strict=True)
    return [
        torch.bmm(h[:, :, :d], q[:, :d, None]).squeeze(2) / (n[:, None] * m) for n, m, d in norms
    ]


def _cosines(
    q: torch.Tensor,
    p: torch.Tensor,
    norm: Sequence[torch.Tensor],
    passages: Sequence[torch.Tensor],
    dims: Sequence[int],
) -> list[torch.Tensor]:
    """Cosines of rows with all passages, [B, N] by width; the dot products grow with the width."""
    order = sorted(range(len(dims)), key=lambda k: dims[k])
    found: dict[int, torch.Tensor] = {}
    dot, low = torch.zeros(len(q), len(p), device=q.device), 0
    for k in order:
        dot = torch.addmm(dot, q[:, low : dims[k]], p[:, low : dims[k]].t())
        found[k], low = dot / (norm[k][:, None] * passages[k]), dims[k]
    return [found[k] for k in range(len(dims))]
