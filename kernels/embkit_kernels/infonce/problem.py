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
        return mask, self.own[rows]

    def private_hard(self, rows: slice) -> tuple[Tensor | None, None]:
        """Own hard negatives [B, H]: those with a key of the row, and padding."""
        own, query = (None if x is None else x[rows] for x in (self.hard, self.hard_query))
        mask = join(self._same_query(rows, query), self._same_passage(rows, own))
        return join(mask, None if self.no_hard is None else self.no_hard[rows].clone()), None

    def shared_hard(self, rows: slice) -> tuple[Tensor | None, None]:
        """Hard negatives [M] that stand against every row."""
        mask = self._same_query(rows, self.hard_query)
        mask = join(mask, self._same_passage(rows, self.hard))
        if self.no_hard is not None:
            batch = self.positives[rows].shape[0]
            mask = join(mask, self.no_hard.expand(batch, -1).clone())
        return mask, None
