"""Nearest neighbours of many queries through torch: blocked products and top-k, exact by rescoring.

Blocks of queries meet blocks of the corpus in bfloat16 (or float32 without TF32). Each query keeps
more candidates than it needs, scores them again in float32 and compares the worst score that it
needs with the best one that it can have missed: the rounding of both sides is measured, so the
bound is a proof. Queries without that proof are scanned again in float32 and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from embkit.errors import UsageError

Vectors = NDArray[Any] | Sequence[NDArray[Any]]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CPU_MEMORY = 512 << 20
_PAIRS = 1 << 11  # query-candidate pairs scored again at once on the CPU: they stay in its caches
_GATHER = 8192  # queries whose neighbours the ranks exchange at once


def search(
    queries: Vectors,
    corpus: Vectors,
    k: int,
    *,
    device: torch.device | str | None = None,
    dtype: str = "bfloat16",
    memory: int = 0,
    group: Any = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32], dict[str, Any]]:
    """The k corpus rows with the largest inner product, as float32 brute force finds them.

    Args:
        queries: float32 or float16 [nq, d], or several such arrays that follow one another; they
            may be mapped files, and are read in blocks.
        corpus: likewise [n, d].
        k: neighbours per query, at most n.
        device: where to multiply; the first CUDA device when there is one.
        dtype: of the screening product: ``"bfloat16"`` or ``"float32"``. No effect on the result.
        memory: bytes on the device beside the result; 0 is half of what a CUDA device has free, or
            512 MiB.
        group: a ``torch.distributed`` group whose ranks all call this with the same arguments: each
            searches its part of the corpus, and every rank gets the whole result.
        progress: called with the number of queries done.

    Returns:
        Rows U32 [nq, k], scores F32 [nq, k], best first and ties by lower row, and a report:
        ``engine``, ``device``, ``dtype``, ``recall`` (1.0), ``kept`` candidates per query, queries
        ``rescanned``.

    Raises:
        UsageError: shapes that do not fit, k out of range, NaN or infinite values.
    """
    q, c = _Parts(queries, "queries"), _Parts(corpus, "corpus")
    if dtype not in DTYPES:
        raise UsageError(f"Unknown dtype {dtype!r}.", fix=f"one of {', '.join(DTYPES)}")
    if q.width != c.width:
        raise UsageError(f"Queries have {q.width} numbers and corpus rows {c.width}.")
    if not 1 <= k <= c.rows:
        raise UsageError(f"k = {k} is not between 1 and the {c.rows} corpus rows.")
    rank, world = (
        (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    )
    first, last = c.rows * rank // world, c.rows * (rank + 1) // world
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    row = np.full((q.rows, k), np.iinfo(np.uint32).max, np.uint32)
    score = np.full((q.rows, k), -np.inf, np.float32)
    rescanned = kept = 0
    refused: UsageError | None = None
    if last > first:
        here = min(k, last - first)
        try:
            with _full_precision():
                engine = _Engine(c, first, last, here, where, DTYPES[dtype], memory)
                for start in range(0, q.rows, engine.tile[0]):
                    stop = min(start + engine.tile[0], q.rows)
                    found = engine.block(q, start, stop)
                    row[start:stop, :here], score[start:stop, :here] = found
                    if progress is not None:
                        progress(stop)
            rescanned, kept = engine.rescanned, engine.keep
        except UsageError as error:
            refused = error
    if world > 1:
        most = torch.tensor([refused is not None, kept], device=_meeting(where, group))
        dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
        if most[0] and refused is None:
            refused = UsageError("Another rank has refused its part of the corpus.")
    if refused is not None:
        raise refused
    if world > 1:
        total = torch.tensor(rescanned, device=_meeting(where, group))
        dist.all_reduce(total, group=group)
        row, score = _merge(row, score, k, _meeting(where, group), group)
        rescanned, kept = int(total), int(most[1])
    report = {
        "engine": "torch", "device": str(where), "dtype": dtype, "recall": 1.0,
        "kept": kept, "rescanned": rescanned,
    }  # fmt: skip
    return row, score, report


class _Parts:
    """Rows of several arrays as one; read as float32 copies."""

    def __init__(self, vectors: Vectors, name: str) -> None:
        self.parts = [vectors] if isinstance(vectors, np.ndarray) else list(vectors)
        self.name = name
        widths = {p.shape[1] if p.ndim == 2 else -1 for p in self.parts}
        if len(widths) != 1 or -1 in widths:
            raise UsageError(f"The {name} are not arrays [*, d] of one width.")
        if any(p.dtype not in (np.float32, np.float16) for p in self.parts):
            raise UsageError(f"The {name} are not float32 or float16.")
        self.width = widths.pop()
        self.starts = np.cumsum([0, *(len(p) for p in self.parts)])
        self.rows = int(self.starts[-1])

    def span(self, start: int, stop: int, out: NDArray[np.float32]) -> None:
        """Copy consecutive rows."""
        for part, first in zip(self.parts, self.starts.tolist(), strict=False):
            a, b = max(start, first), min(stop, first + len(part))
            if a < b:
                out[a - start : b - start] = part[a - first : b - first]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Copy any rows."""
        if len(self.parts) == 1:
            return self.parts[0][rows].astype(np.float32, copy=False)
        out = np.empty((len(rows), self.width), np.float32)
        at = np.searchsorted(self.starts, rows, "right") - 1
        for i in np.unique(at).tolist():
            out[at == i] = self.parts[i][rows[at == i] - self.starts[i]]
        return out


@dataclass
class _Queries:
    """A block of queries on the device, and how far rounding can move their scores."""

    full: torch.Tensor  # F32 [B, d]
    screened: torch.Tensor  # of the screening type
    norm: torch.Tensor  # F32 [B]
    moved: torch.Tensor  # F32 [B], norm of what rounding took away


class _Engine:
    """The search in one part of the corpus."""

    def __init__(
        self,
        corpus: _Parts,
        first: int,
        last: int,
        k: int,
        device: torch.device,
        dtype: torch.dtype,
        memory: int,
    ) -> None:
        self.corpus, self.first, self.last, self.k = corpus, first, last, k
        self.device, self.dtype = device, dtype
        cuda = device.type == "cuda"
        # On the CPU the product itself comes in bfloat16: half a unit in its last place.
        self.product = 2.0**-8 if dtype == torch.bfloat16 and not cuda else 0.0
        n, d = last - first, corpus.width
        spare = k if dtype == torch.bfloat16 else 16
        self.keep = min(k + max(spare, 16), n)
        if not memory:
            memory = torch.cuda.mem_get_info(device)[0] // 2 if cuda else _CPU_MEMORY
        # A corpus that fits stays on the device: rounded for screening, and on a GPU whole as well,
        # because candidates are scored again there.
        held = n * d * (dtype.itemsize + (4 if cuda else 0))
        self.holds = held <= memory // 2
        self.tile = _tile(memory - held * self.holds, d, self.keep, cuda, n)
        self.held: list[torch.Tensor] = []
        self.whole = torch.empty((n, d), device=device) if cuda and self.holds else None
        self.pinned = [torch.empty((self.tile[1], d), pin_memory=True) for _ in range(2 * cuda)]
        self.free: list[Any] = [None, None]
        self.norm = self.moved = torch.zeros((), device=device)
        self.rescanned = 0

    def block(
        self, queries: _Parts, start: int, stop: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Neighbours of the queries [start, stop)."""
        q = self._queries(queries, start, stop)
        value, at = self._screen(q)
        eps = self._eps(q)
        edge = self._high(value[:, -1], eps)  # no row that was left out has a larger score
        # Only these can be among the k best, whichever way their scores were rounded.
        wanted = self._high(value, eps[:, None]) >= self._low(value[:, self.k - 1], eps)[:, None]
        query, slot = wanted.nonzero(as_tuple=True)
        exact = torch.full(value.shape, -torch.inf, device=self.device)
        exact[query, slot] = self._score(q, query, at[query, slot])
        at, order = at.sort(dim=1)
        exact, best = exact.gather(1, order).sort(dim=1, descending=True, stable=True)
        row = at.gather(1, best)[:, : self.k]
        exact = exact[:, : self.k]
        if self.keep < self.last - self.first:
            open_ = (edge >= exact[:, -1]).nonzero()[:, 0]
        else:
            open_ = torch.empty(0, dtype=torch.int64)
        rows = (row.cpu().numpy() + self.first).astype(np.uint32)
        scores = exact.cpu().numpy()
        self.rescanned += len(open_)
        for some in open_.split(256) if len(open_) else ():
            here = some.cpu().numpy()
            rows[here], scores[here] = self._rescan(q, some, exact[some, -1])
        return rows, scores

    def _screen(self, q: _Queries) -> tuple[torch.Tensor, torch.Tensor]:
        """The best screened scores F32 [B, keep], in order, and their rows from `first`."""
        value: torch.Tensor | None = None
        at = torch.empty(0)
        for start, block in self._blocks():
            if self.device.type == "cuda" and self.dtype == torch.bfloat16:
                product = torch.mm(q.screened, block.T, out_dtype=torch.float32)
            else:
                product = q.screened @ block.T
            best, place = product.topk(min(self.keep, len(block)), dim=1, sorted=False)
            best, place = best.float(), place + start
            if value is not None:
                best, place = torch.cat([value, best], 1), torch.cat([at, place], 1)
                best, order = best.topk(min(self.keep, best.shape[1]), dim=1, sorted=False)
                place = place.gather(1, order)
            value, at = best, place
        assert value is not None
        value, order = value.sort(dim=1, descending=True)
        return value, at.gather(1, order)

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of the corpus in the screening type; measures their rounding."""
        if self.held:
            for i, block in enumerate(self.held):
                yield i * self.tile[1], block
            return
        for start, full in self._stream():
            block = full.to(self.dtype)
            self.norm = torch.maximum(self.norm, full.norm(dim=1).amax())
            self.moved = torch.maximum(self.moved, (full - block.float()).norm(dim=1).amax())
            if self.holds:
                self.held.append(block)
            yield start, block
        if not torch.isfinite(self.norm):
            raise UsageError("A corpus row has a value that is NaN or infinite.")

    def _stream(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of the corpus in float32; on CUDA through pinned memory, read while it works."""
        n, size = self.last - self.first, self.tile[1]
        for turn, start in enumerate(range(0, n, size)):
            count = min(size, n - start)
            span = (self.first + start, self.first + start + count)
            if not self.pinned:
                host = torch.empty((count, self.corpus.width))
                self.corpus.span(*span, host.numpy())
                yield start, host
                continue
            i = turn % 2
            if self.free[i] is not None:
                self.free[i].synchronize()
            self.corpus.span(*span, self.pinned[i][:count].numpy())
            full = self.pinned[i][:count].to(self.device, non_blocking=True)
            self.free[i] = torch.cuda.Event()
            self.free[i].record()
            if self.whole is not None:
                self.whole[start : start + count] = full
            yield start, full

    def _queries(self, queries: _Parts, start: int, stop: int) -> _Queries:
        host = torch.empty((stop - start, queries.width))
        queries.span(start, stop, host.numpy())
        bad = (~host.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise UsageError(f"Query {start + int(bad[0])} has a value that is NaN or infinite.")
        full = host.to(self.device)
        screened = full.to(self.dtype)
        moved = (full - screened.float()).norm(dim=1)
        return _Queries(full, screened, full.norm(dim=1), moved)

    def _eps(self, q: _Queries) -> torch.Tensor:
        """How far the product of rounded vectors can lie from the float32 score, F32 [B]."""
        rounding = q.moved * self.norm + (q.norm + q.moved) * self.moved
        return (rounding + self._sums(q.norm)) * 1.001

    def _high(self, value: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """The largest float32 score behind a screened one; larger for larger ones."""
        return value + value.abs() * self.product + eps

    def _low(self, value: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return value - value.abs() * self.product - eps

    def _sums(self, norm: torch.Tensor) -> torch.Tensor:
        """How far two float32 sums over the width can lie apart, in whatever order they run."""
        return 2 * (self.corpus.width + 8) * 2.0**-24 * norm * self.norm

    def _score(self, q: _Queries, query: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Inner products F32 of pairs, each summed in the same order wherever the pair stands."""
        size = _PAIRS if self.whole is None else 1 << 20
        found = [torch.empty(0, device=self.device)]
        for a, b in zip(query.split(size), row.split(size), strict=True):
            if self.whole is not None:
                vectors = self.whole[b]
            else:
                taken = self.corpus.take(b.cpu().numpy() + self.first)
                vectors = torch.from_numpy(taken).to(self.device)
            found.append((vectors * q.full[a]).sum(dim=1))
        return torch.cat(found)

    def _rescan(
        self, q: _Queries, some: torch.Tensor, worst: torch.Tensor
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """All rows that may reach the `worst` score known so far; any number of them may tie."""
        full = q.full[some]
        limit = (worst - self._sums(q.norm[some]) * 1.001)[:, None]
        owner, place = np.empty(0, np.int64), np.empty(0, np.int64)
        score = np.empty(0, np.float32)
        for start, block in self._whole_blocks():
            query, at = ((full @ block.T) >= limit).nonzero(as_tuple=True)
            exact = self._score(q, some[query], at + start)
            owner = np.concatenate([owner, query.cpu().numpy()])
            place = np.concatenate([place, at.cpu().numpy() + start])
            score = np.concatenate([score, exact.cpu().numpy()])
            order = np.lexsort((place, -score, owner))
            owner, place, score = owner[order], place[order], score[order]
            rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
            owner, place, score = (x[rank < self.k] for x in (owner, place, score))
        shape = (len(some), self.k)
        return (place + self.first).astype(np.uint32).reshape(shape), score.reshape(shape)

    def _whole_blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        if self.whole is None:
            yield from self._stream()
            return
        for i, block in enumerate(self.whole.split(self.tile[1])):
            yield i * self.tile[1], block


def _tile(memory: int, d: int, keep: int, cuda: bool, n: int) -> tuple[int, int]:
    """Queries and corpus rows of a block: as many as fit, halved until they do."""
    b, c = (16384, 65536) if cuda else (1024, 16384)
    c = min(c, max(n, 1))
    while b * c * 8 + b * (d * 8 + keep * 64) + c * d * 14 > memory and b * c > 64 * 64:
        if b * 16 > c:
            b = max(b // 2, 1)
        else:
            c = max(c // 2, 1)
    return b, c


def _meeting(device: torch.device, group: Any) -> torch.device:
    """Where the ranks exchange tensors."""
    return device if dist.get_backend(group) == "nccl" else torch.device("cpu")


def _merge(
    row: NDArray[np.uint32], score: NDArray[np.float32], k: int, device: torch.device, group: Any
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """The best of all ranks, on every rank; parts are in row order, so a stable sort keeps ties."""
    world = dist.get_world_size(group)
    for start in range(0, len(row), _GATHER):
        part = slice(start, start + _GATHER)
        mine = torch.from_numpy(row[part].astype(np.int64)).to(device)
        best = torch.from_numpy(score[part]).to(device)
        rows = [torch.empty_like(mine) for _ in range(world)]
        scores = [torch.empty_like(best) for _ in range(world)]
        dist.all_gather(rows, mine, group=group)
        dist.all_gather(scores, best, group=group)
        value, order = torch.cat(scores, 1).sort(dim=1, descending=True, stable=True)
        row[part] = torch.cat(rows, 1).gather(1, order)[:, :k].cpu().numpy().astype(np.uint32)
        score[part] = value[:, :k].cpu().numpy()
    return row, score


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, no bfloat16 sums, no gradients; the caller's settings come back."""
    matmul = torch.backends.cuda.matmul
    precision = torch.get_float32_matmul_precision()
    reduced = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        matmul.allow_bf16_reduced_precision_reduction = reduced
