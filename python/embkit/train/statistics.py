"""What the similarities of a batch say of the training, for the log; nothing here changes a run.

Every ``log_every`` steps, from the embeddings that the step has anyway. For pairs with negatives,
by width: how often the positive is nearer to its query than every candidate is (accuracy), and the
mean cosines of positives and of negatives; and the share of candidates that keys mask, or of the
others that a margin drops. Candidates are those of the task's loss: of other rows, on all ranks,
the passages, the queries, the passages against the row's own (doc_doc), and hard negatives, own or
those of all rows. For graded pairs (STS): the mean cosine, and the share of comparisons (pairs of
pairs with different scores) in the right order.

Everything is a sum over rows: parts of a task and ranks add up to the numbers of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from embkit.losses.contrastive import keyed

if TYPE_CHECKING:
    from embkit.recipe import Loss, Train
    from embkit.train.batches import Batch
    from embkit.train.parallel import Ranks

_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 24}  # cosines of a width at a time
_TINY = 1e-20
_NOWHERE = 1 << 40  # a first place that no row of a batch has
_TIE = 1e-6  # a candidate as near as this is as near as the positive: a copy of it, say
# Counts of a part, and then sums of each width.
_COUNTS = ("rows", "compared", "candidates", "masked", "pairs", "ordered")
_SUMS = ("right", "positive", "negative", "beyond", "cosine", "concordant")


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
    sums: torch.Tensor,
    tasks: Sequence[str],
    dims: Sequence[int],
    config: Train,
    *,
    learned: float | None = None,
) -> dict[str, Any]:
    """Means by task, as JSON types; None where there is nothing to take a mean of.

    Args:
        sums: what :meth:`Statistics.take` gave. tasks: of the parts, in their order.
        dims: MRL widths. config: temperatures and losses of the tasks.
        learned: the temperature of losses that learn it, now.
    """
    by_task: dict[str, torch.Tensor] = {}
    losses: dict[str, Loss] = {}
    for place, (task, part) in enumerate(zip(tasks, sums, strict=True)):
        by_task[task] = part + by_task[task] if task in by_task else part
        losses.setdefault(task, config.loss_of(task, place))
    return {
        task: _means(part.tolist(), dims, losses[task], _temperature(losses[task], config, learned))
        for task, part in by_task.items()
    }


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


def _temperature(loss: Loss, config: Train, learned: float | None) -> float:
    if loss.learn_temperature and learned is not None:
        return learned
    return config.temperature if loss.temperature is None else loss.temperature


def _means(
    numbers: list[float], dims: Sequence[int], loss: Loss, temperature: float
) -> dict[str, Any]:
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
    left = count["candidates"] - count["masked"]
    margin = loss.terms()["margin"] is not None
    return {
        "temperature": temperature,
        "masked": _over(count["masked"], count["candidates"]),
        "accuracy": by_width("right", count["compared"]),
        "positive": by_width("positive", count["rows"]),
        "negative": by_width("negative", left),
        **({"beyond_margin": by_width("beyond", left)} if margin else {}),
    }


def _over(total: float, count: float) -> float | None:
    return total / count if count else None


def _contrasted(batch: Batch, e_RD: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Sums of a batch with positives and negatives, float64 [n]."""
    device, sides, terms = e_RD.device, keyed(batch.sides, batch.loss.mask), batch.loss.terms()
    q_BD, p_BD = (e_RD[index.to(device)] for index in (batch.query, batch.positive))
    key_B, query_B = sides.positive_key.to(device), sides.query_key.to(device)
    norm, positive_KB = _norms(q_BD, dims), torch.stack(_paired(q_BD, p_BD, dims))
    found, count = _Sums(len(dims), device), len(q_BD)
    unit_KB = positive_KB.abs() if terms["margin_relative"] else torch.ones_like(positive_KB)
    best_KB = torch.full_like(positive_KB, -torch.inf)
    compared_B = torch.zeros(count, dtype=torch.bool, device=device)

    def meet(
        rows: slice, cosines: list[torch.Tensor], there: torch.Tensor, same: torch.Tensor
    ) -> None:
        """Candidates [b, N] of some rows: which there are, and which have the row's key."""
        left = there & ~same
        found.count["candidates"] += there.sum()
        found.count["masked"] += (there & same).sum()
        compared_B[rows] |= left.any(1)
        for k, cosine in enumerate(cosines):
            top = cosine.masked_fill(~left, -torch.inf).amax(1)
            best_KB[k, rows] = torch.maximum(best_KB[k, rows], top)
            found.of["negative"][k] += torch.where(left, cosine, 0).sum(dtype=torch.float64)
            if terms["margin"] is not None:
                limit = positive_KB[k, rows] + terms["margin"] * unit_KB[k, rows]
                found.of["beyond"][k] += (left & (cosine > limit[:, None])).sum()

    def meet_all(
        own_BD: torch.Tensor, x_ND: torch.Tensor, there_N: torch.Tensor, same: Any, start: int
    ) -> None:
        """Rows [N, D] that stand against each of own ones, but for themselves."""
        norms, theirs = _norms(own_BD, dims), _norms(x_ND, dims)
        places = torch.arange(len(x_ND), device=device)
        step = max(_BLOCK.get(device.type, _BLOCK["cpu"]) // len(x_ND), 1)
        for rows in (slice(at, at + step) for at in range(0, count, step)):
            at = torch.arange(count, device=device)[rows, None] + _start(batch) - start
            cosines = _cosines(own_BD[rows], x_ND, [n[rows] for n in norms], theirs, dims)
            meet(rows, cosines, there_N & (places != at), same(rows))

    for p_ND, q_ND, key_N, theirs_N, there_N, start in _others(batch, p_BD, q_BD, key_B, query_B):

        def same(rows: slice, key: Any = key_N, query: Any = theirs_N) -> torch.Tensor:
            return _same(key, key_B[rows]) | _same(query, query_B[rows])

        if terms["in_batch"]:
            meet_all(q_BD, p_ND, there_N, same, start)
        if terms["same_tower"]:
            meet_all(q_BD, q_ND, there_N, same, start)
        if terms["doc_doc"]:
            meet_all(p_BD, p_ND, there_N, same, start)
    if batch.hard.shape[1]:
        h_BHD, key_BH = e_RD[batch.hard.to(device)], sides.hard_key.to(device)
        there_BH = sides.hard_mask.to(device)
        if batch.loss.hard == "shared":
            h_MD, key_M, there_M = _shared(batch, h_BHD, key_BH, there_BH)
            meet_all(q_BD, h_MD, there_M, lambda rows: _same(key_M, key_B[rows]), _NOWHERE)
        else:
            cosines = _private(q_BD, h_BHD, norm, dims)
            meet(slice(0, count), cosines, there_BH, _same(key_BH, key_B))
    found.count["rows"] += count
    found.count["compared"] += compared_B.sum()
    found.of["right"] += ((positive_KB > best_KB + _TIE) & compared_B).sum(1)
    found.of["positive"] += positive_KB.sum(1, dtype=torch.float64)
    return found.flat()


def _same(theirs: torch.Tensor, own_B: torch.Tensor) -> torch.Tensor:
    """Whether keys [N] or [B, N] of candidates are a row's; -1 equals nothing."""
    return (theirs == own_B[:, None]) & (theirs >= 0)


def _start(batch: Batch) -> int:
    """Place of this rank's first row in the global batch."""
    return 0 if batch.share is None else batch.share.start


def _others(
    batch: Batch,
    p_BD: torch.Tensor,
    q_BD: torch.Tensor,
    key_B: torch.Tensor,
    query_B: torch.Tensor,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Blocks of all ranks' passages and queries [N, D]: keys of both, which rows are there, and the
    place of the first. One block, or with ``gather = "ring"`` one of each rank; none where a loss
    has no negatives in the batch. Queries are those of this rank where no loss asks for more."""
    share, terms = batch.share, batch.loss.terms()
    there = torch.ones(len(p_BD), dtype=torch.bool, device=p_BD.device)
    if not (terms["in_batch"] or terms["same_tower"] or terms["doc_doc"]):
        return
    width = p_BD.shape[1]
    both = torch.cat([p_BD, q_BD], 1) if terms["same_tower"] else p_BD
    if share is None:
        yield p_BD, q_BD, key_B, query_B, there, 0
    elif not share.ring:
        both, key_N, query_N, there_N = share.gather(both, key_B, query_B)
        yield both[:, :width], both[:, width:], key_N, query_N, there_N, 0
    else:
        x_ND = both.new_zeros(share.rows, both.shape[1])
        x_ND[: len(both)] = both
        about = key_B.new_full((3, share.rows), -1)
        about[:, : len(both)] = torch.stack([key_B, query_B, there.to(key_B.dtype)])
        for i in range(share.world):
            if i:
                x_ND, about = (share.pass_on(x)() for x in (x_ND, about))
            owner = (share.ranks.rank + i) % share.world
            first = owner * share.rows
            yield x_ND[:, :width], x_ND[:, width:], about[0], about[1], about[2] > 0, first


def _shared(
    batch: Batch, h_BHD: torch.Tensor, key_BH: torch.Tensor, there_BH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hard negatives of all rows, on all ranks: [M, D], their keys and which are there."""
    count, _, width = h_BHD.shape
    if batch.share is None:
        return h_BHD.reshape(-1, width), key_BH.reshape(-1), there_BH.reshape(-1)
    flat, key, there, rows = batch.share.gather(h_BHD.reshape(count, -1), key_BH, there_BH)
    return flat.reshape(-1, width), key.reshape(-1), (there & rows[:, None]).reshape(-1)


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
