"""The InfoNCE problem as data: which candidates stand against which row, and what is masked.

`Problem` carries everything but the three embedding tensors and the temperature. Its fields are
documented once, in `functional.infonce`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_ROW, NO_COLUMN = -1, -2


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Widths (ascending), positives, identity keys and options of one InfoNCE call."""

    dims: tuple[int, ...]
    positive_index: Tensor
    positive_offsets: Tensor | None = None
    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    passage_query_ids: Tensor | None = None
    hard_ids: Tensor | None = None
    hard_query_ids: Tensor | None = None
    passage_mask: Tensor | None = None
    hard_mask: Tensor | None = None
    include_positive: bool = True
    in_batch: bool = True
    same_tower: bool = False
    doc_doc: bool = False
    hardness_alpha: float = 0.0
    margin: float | None = None
    margin_relative: bool = False
    guide_query: Tensor | None = None
    guide_passage: Tensor | None = None
    guide_hard: Tensor | None = None
    guide_margin: float = 0.0
    guide_relative: bool = False


def as_rows(ids: Tensor | None) -> Tensor | None:
    """Keys on the row side of a compare; padding (negative) becomes a value no column has."""
    return None if ids is None else ids.masked_fill(ids < 0, NO_ROW)


def as_columns(ids: Tensor | None) -> Tensor | None:
    """Keys on the column side of a compare; padding becomes a value no row has."""
    return None if ids is None else ids.masked_fill(ids < 0, NO_COLUMN)


def join(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """mask | other, where None masks nothing; reuses `mask`'s memory."""
    if mask is None or other is None:
        return other if mask is None else mask
    return mask.logical_or_(other)


def jagged_rows(offsets: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """Row of each positive [nnz], and positives of each row [B]; no host sync."""
    count = offsets[1:] - offsets[:-1]
    rows = torch.arange(count.shape[0], device=count.device)
    return torch.repeat_interleave(rows, count, output_size=positives), count


class Guide:
    """What a guide's vectors drop: candidates that it finds nearer to a row than its positive."""

    def __init__(self, problem: Problem, positives: Tensor, real: Tensor) -> None:
        """positives [B, P] are the places of each row's, of which real ones count."""
        assert problem.guide_query is not None and problem.guide_passage is not None
        self.query, self.passage = _unit(problem.guide_query), _unit(problem.guide_passage)
        self.hard = None if problem.guide_hard is None else _unit(problem.guide_hard)
        self.own = self.passage.index_select(0, positives[:, 0])
        least = self.query.new_full((positives.shape[0],), torch.inf)
        for m in range(positives.shape[1]):
            theirs = self.passage.index_select(0, positives[:, m])
            score = (self.query * theirs).sum(-1)
            least = torch.minimum(least, torch.where(real[:, m], score, torch.inf))
        unit = least.abs() if problem.guide_relative else torch.ones_like(least)
        # A copy of the positive has its cosine up to the rounding of sums in another order: it is
        # not above it, so the limit leaves room for that.
        self.limit = least + problem.guide_margin * unit + 8 * torch.finfo(least.dtype).eps

    def nearer(self, rows: slice, own: Tensor, theirs: Tensor) -> Tensor:
        """True where a guide's cosine is above the row's limit; theirs [N, W] or own [B, H, W]."""
        if theirs.dim() == 3:
            cosine = torch.bmm(theirs[rows], own[rows, :, None]).squeeze(-1)
        else:
            cosine = own[rows] @ theirs.t()
        return cosine > self.limit[rows, None]


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.float(), dim=-1)


class Masks:
    """Which candidates of a block of rows are dropped, by index and by identity.

    Everything is kept per row or per column; a block [rows, columns] exists only while it is used.
    """

    def __init__(self, problem: Problem, batch: int) -> None:
        """Pad jagged positives to [B, most positives of a row] (one host sync, jagged only)."""
        index = problem.positive_index
        self.row: Tensor | None = None
        if problem.positive_offsets is None:
            padded, real = index[:, None], torch.ones_like(index[:, None], dtype=torch.bool)
        else:
            offsets = problem.positive_offsets.to(torch.int64)
            self.row, count = jagged_rows(offsets, index.shape[0])
            most = max(1, int(count.max()) if batch else 1)
            real = torch.arange(most, device=index.device) < count[:, None]
            place = torch.arange(index.shape[0], device=index.device)
            padded = torch.zeros(batch, most, dtype=torch.int64, device=index.device)
            padded[self.row, place - offsets.index_select(0, self.row)] = index
            # A short row repeats its first positive; a row without any is inert anyway.
            padded = torch.where(real, padded, padded[:, :1])
        self.positives = padded
        self.own = torch.arange(batch, device=index.device)[:, None]
        self.query_row, self.query_column = (
            as_rows(problem.query_ids),
            as_columns(problem.query_ids),
        )
        self.passage_query = as_columns(problem.passage_query_ids)
        self.passage = as_columns(problem.passage_ids)
        self.hard = as_columns(problem.hard_ids)
        self.hard_query = as_columns(problem.hard_query_ids)
        self.key: Tensor | None = None
        if problem.passage_ids is not None:
            key = problem.passage_ids.index_select(0, padded.reshape(-1)).reshape(padded.shape)
            self.key = torch.where(real & (key >= 0), key, NO_ROW)
        self.no_passage = None if problem.passage_mask is None else ~problem.passage_mask
        self.no_hard = None if problem.hard_mask is None else ~problem.hard_mask
        self.guide = None if problem.guide_query is None else Guide(problem, padded, real)

    def _same_passage(self, rows: slice, columns: Tensor | None) -> Tensor | None:
        """True where a column has the key of any positive of the row."""
        mask = None
        if self.key is not None and columns is not None:
            for m in range(self.key.shape[1]):
                mask = join(mask, self.key[rows, m, None] == columns)
        return mask

    def _same_query(self, rows: slice, columns: Tensor | None) -> Tensor | None:
        """True where a column has the key of the row's query."""
        if self.query_row is None or columns is None:
            return None
        return self.query_row[rows, None] == columns

    def passages(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Candidates [N]: own positives by index, then equal query or passage keys, padding."""
        mask, own = self._passages(rows)
        if self.guide is not None:
            mask = join(mask, self.guide.nearer(rows, self.guide.query, self.guide.passage))
        return mask, own

    def documents(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        """The same candidates against the row's positive."""
        mask, own = self._passages(rows)
        if self.guide is not None:
            mask = join(mask, self.guide.nearer(rows, self.guide.own, self.guide.passage))
        return mask, own

    def _passages(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        mask = self._same_query(rows, self.passage_query)
        mask = join(mask, self._same_passage(rows, self.passage))
        if self.no_passage is not None:
            batch = self.positives[rows].shape[0]
            mask = join(mask, self.no_passage.expand(batch, -1).clone())
        return mask, self.positives[rows]

    def queries(self, rows: slice) -> tuple[Tensor | None, Tensor]:
        """Candidates [B] of the same tower: itself by index, then equal query or positive keys."""
        mask = self._same_query(rows, self.query_column)
        if self.key is not None:
            for m in range(self.key.shape[1]):
                mask = join(mask, self._same_passage(rows, as_columns(self.key[:, m])))
        if self.guide is not None:
            mask = join(mask, self.guide.nearer(rows, self.guide.query, self.guide.query))
        return mask, self.own[rows]

    def private_hard(self, rows: slice) -> tuple[Tensor | None, None]:
        """Own hard negatives [B, H]: those with a key of the row, and padding."""
        own, query = (None if x is None else x[rows] for x in (self.hard, self.hard_query))
        mask = join(self._same_query(rows, query), self._same_passage(rows, own))
        mask = join(mask, self._guided_hard(rows))
        return join(mask, None if self.no_hard is None else self.no_hard[rows].clone()), None

    def shared_hard(self, rows: slice) -> tuple[Tensor | None, None]:
        """Hard negatives [M] that stand against every row."""
        mask = self._same_query(rows, self.hard_query)
        mask = join(mask, self._same_passage(rows, self.hard))
        mask = join(mask, self._guided_hard(rows))
        if self.no_hard is not None:
            batch = self.positives[rows].shape[0]
            mask = join(mask, self.no_hard.expand(batch, -1).clone())
        return mask, None

    def _guided_hard(self, rows: slice) -> Tensor | None:
        if self.guide is None or self.guide.hard is None:
            return None
        return self.guide.nearer(rows, self.guide.query, self.guide.hard)
