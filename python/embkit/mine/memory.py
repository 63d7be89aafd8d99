"""How mining shares out its memory, and the least that it can do with."""

from __future__ import annotations

from dataclasses import dataclass

from embkit.errors import UsageError
from embkit.search import Searcher

PER_PASSAGE, PER_QUERY = 64, 64  # bytes of tables: rows, clusters, positives, and their sorts
PER_SKETCH = 96  # of a text in the near-duplicate rule, with its offset and its hash
_OTHER = 20 << 20  # whatever is not counted: Python's objects, pieces of tables, the allocator
_DEFAULT = 512 << 20  # for blocks and search, when there is no cap
_LEAST = 512  # queries of a block: fewer would pay for the search's start each time


@dataclass(frozen=True)
class Budget:
    """Bytes for a block of queries with its candidates, and for the search of it."""

    block: int
    search: int


def share(memory: int, tables: int, each: int, searcher: Searcher) -> Budget:
    """What is left of the memory after the tables, shared between block and search.

    Args:
        memory: the cap; 0 for none. tables: bytes that are there from the first block to the last.
        each: bytes of one query in a block.

    Raises:
        UsageError: it is less than the least.
    """
    if not memory:
        return Budget(_DEFAULT // 2, _DEFAULT // 2)
    fixed = _OTHER + tables + searcher.bytes_kept()
    search, block = searcher.bytes_least(), _LEAST * each
    left = memory - fixed
    if left < search + block:
        other = ', or engine = "exact"' if searcher.engine == "ivf" else ""
        raise UsageError(
            f"Mining takes {-(-(fixed + search + block) // 10**6)} MB at the least here, "
            f"not {memory / 1e6:.0f} MB.",
            fix=f"give more memory{other}",
        )
    search = max(search, left // 2)
    return Budget(left - search, search)
