"""Identity keys as the kernels compare them: int32, one list for a row, one key for a column.

A candidate is dropped when it has a passage key of the row, or its query's key. Own positives go by
index in the contract; here the index becomes a key too: a passage without an id gets one that
nothing else has (-3 - its place), and a row's keys are those of its positives. So one compare of
int32 drops positives and duplicates alike, which is what the tile's registers allow.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._common import add_rows_
from ..problem import NO_COLUMN, NO_ROW, Problem, as_columns, as_rows, join

_UNIQUE = -3
"""Keys of things without an id count down from here, past `NO_ROW` and `NO_COLUMN`."""

_SMALL = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.bool)


@dataclass(frozen=True)
class BankKeys:
    """Keys of one bank: of rows ([B], or [nnz] with start [B + 1]) and of columns, and queries'."""

    row: Tensor
    column: Tensor
    row_start: Tensor | None = None
    column_start: Tensor | None = None
    row_query: Tensor | None = None
    column_query: Tensor | None = None


class Keys:
    """Keys of all banks of a problem, made without a host sync."""

    def __init__(self, problem: Problem, batch: int, columns: int, row: Tensor | None) -> None:
        """row [nnz]: the row of each positive when they are jagged."""
        index, offsets = problem.positive_index, problem.positive_offsets
        self.batch, self.of_positive = batch, row
        query, passage_query, hard_query = dense(
            problem.query_ids, problem.passage_query_ids, problem.hard_query_ids
        )
        passage, hard = dense(problem.passage_ids, problem.hard_ids)
        own_place = torch.arange(batch, device=index.device, dtype=torch.int32)
        if row is not None:
            own_place = own_place.index_select(0, row)
        start = None if offsets is None else offsets.to(torch.int32)

        unique = _UNIQUE - torch.arange(columns, device=index.device, dtype=torch.int32)
        column = unique if passage is None else torch.where(passage >= 0, passage, unique)
        self.own = column.index_select(0, index)
        self.hard, self.hard_query = as_columns(hard), as_columns(hard_query)
        self.query = as_rows(query)
        both = query is not None and passage_query is not None
        self.passages = BankKeys(
            self.own,
            column,
            start,
            row_query=self.query if both else None,
            column_query=as_columns(passage_query) if both else None,
        )
        # Two queries that share a positive without an id are still each other's negatives.
        self_key = _UNIQUE - own_place
        if passage is not None:
            self_key = torch.where(self.own >= 0, self.own, self_key)
        self.queries = BankKeys(self_key, self_key, start, start, self.query, as_columns(query))

    def shared_hard(self, count: int) -> BankKeys:
        """Hard negatives [M] that stand against every row."""
        hard = self.own.new_full((count,), NO_COLUMN) if self.hard is None else self.hard
        start = self.passages.row_start
        query = None if self.hard_query is None else self.query
        return BankKeys(self.own, hard, start, row_query=query, column_query=self.hard_query)

    def drops_private_hard(self) -> Tensor | None:
        """[B, H], True where a row's own hard negative has a key of the row."""
        query = None
        if self.query is not None and self.hard_query is not None:
            query = self.query[:, None] == self.hard_query
        return join(query, self._drops_own_passage())

    def _drops_own_passage(self) -> Tensor | None:
        if self.hard is None:
            return None
        if self.of_positive is None:
            return self.own[:, None] == self.hard
        same = self.own[:, None] == self.hard.index_select(0, self.of_positive)
        count = torch.zeros(self.hard.shape, device=same.device)
        return add_rows_(count, self.of_positive, same.to(count.dtype)) > 0


def dense(*ids: Tensor | None) -> list[Tensor | None]:
    """int32 keys that are equal exactly where the ids are, across all tensors; negative: -1.

    Wide ids become their place among the sorted ids of all tensors: a sort and a search, no host
    sync, no collisions.
    """
    given = [x for x in ids if x is not None]
    if all(x.dtype in _SMALL for x in given):
        return [None if x is None else x.to(torch.int32).clamp_min(NO_ROW) for x in ids]
    wide = [x.to(torch.int64) for x in given]
    order = torch.cat([x.reshape(-1) for x in wide]).sort().values
    keys = iter(
        torch.searchsorted(order, x, out_int32=True).masked_fill(x < 0, NO_ROW) for x in wide
    )
    return [None if x is None else next(keys) for x in ids]
