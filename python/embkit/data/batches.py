"""Batches of a token store: one call from a step's number to filled buffers. Needs no torch.

The plan (which task, which examples), the draws (positives, hard negatives), the identity keys, the
cuts into micro-batches and the gathering of tokens are Rust's, without the GIL. Here buffers are
owned: a ring of them, refilled by threads that work ahead while a step is trained.

    batches = Batches(store, batch_size=256, layout="packed")
    for batch in batches.stream(0, 1000):
        for micro in batch.micro:
            batch["tokens"][micro.tokens], batch.cu_seqlens(micro)  # ready for torch.from_numpy
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from embkit import _rust
from embkit.data.loader import Store, as_store
from embkit.data.mixture import weights_for
from embkit.data.tables import Array, Examples
from embkit.errors import UsageError, nearest

LAYOUTS = ("padded", "packed")
_MATRICES = ("hard", "hard_key", "hard_mask")
_GROWTH = 1.25  # of a buffer that was too small


class Micro(NamedTuple):
    """Rows that go through the encoder together.

    Attributes:
        rows: their slice of the batch's rows.
        tokens: their slice of ``tokens`` (and ``mask`` or ``position_ids``).
        longest: tokens of the longest row; the width of a padded micro-batch.
        bounds: their slice of ``cu_seqlens`` (packed layout).
    """

    rows: slice
    tokens: slice
    longest: int
    bounds: slice


@dataclass(kw_only=True)
class Batch:
    """One step's input on one rank: b examples, H hard negatives each, R distinct rows.

    Its arrays are views on one buffer, valid until :meth:`release` or, in a stream, until the next
    batch is taken.

    Attributes:
        step: counted from 0. task: its name. kind: its kind.
        index: number of the task. ordinal: the task's batches before. epoch: its passes before.
        examples: u64 [b], numbers of the task's usable examples.
        rows: u64 [R], distinct store rows in the order of the micro-batches.
        micro: the micro-batches. micro_count: how many every rank runs (the most of any).
        tokens: real tokens. padded: tokens in the buffer.
        buffer: u8 [bytes], everything; one copy moves the step to a device.
        fields: name to (dtype, shape, first byte), see :meth:`view`.
        starts: u64 [B], where in their lists the hard negatives of the global batch begin; None
            when ``hard_rule`` chooses them.
        busy: set by a reader that is not done with the buffer when it takes the next batch, such
            as a torch.cuda.Event after an asynchronous copy; ``busy.synchronize()`` is awaited.
    """

    step: int
    task: str
    kind: str
    index: int
    ordinal: int
    epoch: int
    examples: Array
    rows: Array
    micro: list[Micro]
    micro_count: int
    tokens: int
    padded: int
    buffer: Array
    fields: dict[str, tuple[str, tuple[int, ...], int]]
    starts: Array | None = None
    busy: Any = None
    _arrays: dict[str, Array] = field(default_factory=dict)
    _give_back: Callable[[Batch], None] | None = None

    def __getitem__(self, name: str) -> Array:
        """An array by name, without a copy.

        ``tokens`` [P] with ``mask`` [P] (padded) or ``position_ids`` [P] and ``cu_seqlens`` int32
        [R + M] (packed); ``role`` u8, ``prompt_len`` int64 [R]; ``query``, ``positive`` int64 [b]
        and ``hard`` int64 [b, H]: places among the rows; ``position`` int64 [b]: places in the
        global batch; ``query_key``, ``positive_key`` [b], ``hard_key`` [b, H] int32: identities,
        dense over the global batch; ``hard_mask`` bool [b, H]; ``score``, ``weight`` float32 [b].
        """
        if name not in self._arrays:
            self._arrays[name] = self.view(self.buffer, name, np.dtype)
        return self._arrays[name]

    def view(self, buffer: Any, name: str, dtype: Callable[[str], Any]) -> Any:
        """An array of this batch in a copy of its buffer, e.g. a CUDA tensor.

        Args:
            buffer: uint8 [bytes], numpy or torch.
            name: of the array.
            dtype: from a type's name to what ``buffer.view`` takes: ``partial(getattr, torch)``.
        """
        kind, shape, start = self.fields[name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return buffer[start : start + size].view(dtype(kind)).reshape(shape)

    def cu_seqlens(self, micro: Micro) -> Array:
        """Bounds int32 [rows + 1] of the rows of a packed micro-batch, from 0."""
        return self["cu_seqlens"][micro.bounds]

    def rectangle(self, micro: Micro) -> tuple[Array, Array]:
        """Ids and mask [rows, longest] of a padded micro-batch."""
        shape = (-1, micro.longest)
        return self["tokens"][micro.tokens].reshape(shape), self["mask"][micro.tokens].reshape(
            shape
        )

    def release(self) -> None:
        """Give the buffer back to the stream that it came from; the arrays are gone then."""
        if self._give_back is not None:
            give_back, self._give_back = self._give_back, None
            self._arrays.clear()
            give_back(self)


class Batches:
    """The batches of a run over a store: a function of the settings and the step.

    The same (seed, step) gives the same global batch for any number of ranks, threads and earlier
    steps; each rank gets its own examples of it, dealt so that ranks have nearly the same tokens.

    Args:
        store: a Store or its directory.
        batch_size: examples of a global batch, all of one task. batch_sizes: of single tasks
            instead, by name.
        seed: of the order and of every draw.
        weights: share of the steps by task; None takes every task by its size, see
            :func:`embkit.data.mixture.weights_for`. Tasks of weight 0 are not opened.
        temperature, cap: of the weights by size.
        hard_negatives: per retrieval example; where there are fewer, ``hard_mask`` is False.
        hard_rule: ``"sample"`` without replacement anew each epoch, or ``"top"`` of the list.
        negatives: a directory of mined negatives, which replace the tables' own by task.
        token_budget: tokens of a micro-batch, padding included.
        layout: ``"padded"`` or ``"packed"``. dtype: of tokens: ``"int64"`` or ``"int32"``.
        pad_id: fills padded rows.
        no_duplicates: keep examples that share a near-duplicate cluster out of each other's global
            batch.
        prompt_dropout: share of the queries, and of the examples' passages (those of one example
            together), that are taken without their prompt, drawn anew each epoch. The store must
            have been tokenised with ``prompt_dropout=True``.
        exhausted, epochs: see :class:`embkit._rust.Plan`.
        rank, world_size: this process among those that share each global batch.
        allocate: gives a uint8 array of so many bytes; numpy.empty by default, pinned memory for
            CUDA.

    Raises:
        UsageError: a wrong setting, an unknown task, a task smaller than a batch.
        CorruptError: a table that is damaged, or names rows that the store does not have.
    """

    def __init__(
        self,
        store: Store | Path | str,
        *,
        batch_size: int,
        batch_sizes: Mapping[str, int] | None = None,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        cap: int = 0,
        hard_negatives: int = 0,
        hard_rule: str = "sample",
        negatives: Path | str | None = None,
        token_budget: int = 16384,
        layout: str = "packed",
        dtype: str = "int64",
        pad_id: int = 0,
        no_duplicates: bool = False,
        prompt_dropout: float = 0.0,
        exhausted: str = "repeat",
        epochs: int = 1,
        rank: int = 0,
        world_size: int = 1,
        allocate: Callable[[int], Array] | None = None,
    ) -> None:
        if layout not in LAYOUTS or dtype not in ("int64", "int32"):
            raise UsageError(
                f"layout {layout!r} with dtype {dtype!r}.",
                fix="layout padded or packed, dtype int64 or int32",
            )
        self.store = as_store(store)
        self.wide = dtype == "int64"
        self.rank, self.world_size = rank, world_size
        self.allocate = allocate or (lambda size: np.empty(size, np.uint8))
        sizes = self.store.task_sizes
        chosen = weights_for(sizes, weights or {}, temperature=temperature, cap=cap)
        self.names = [name for name in sizes if chosen[name] > 0]
        self.weights = {n: chosen[n] for n in self.names}
        self._settings: dict[str, Any] = {
            "seed": seed,
            "batch_size": batch_size,
            "token_budget": token_budget,
            "hard": hard_negatives,
            "hard_rule": hard_rule,
            "padded": layout == "padded",
            "pad_id": pad_id,
            "no_duplicates": no_duplicates,
            "exhausted": exhausted,
            "epochs": epochs,
        }
        if batch_sizes:
            for name in batch_sizes:
                if name not in sizes:
                    raise UsageError(
                        f"batch_sizes names task {name!r}, which the store does not have.",
                        where="batch_sizes",
                        fix=nearest(name, sizes),
                    )
            self._settings["batch_sizes"] = list(batch_sizes.items())
        if prompt_dropout and not self.store.has_plain_rows:
            raise UsageError(
                "The store has no rows without prompts, which prompt_dropout takes.",
                where=self.store.path,
                fix="tokenize again with prompt_dropout=True (a subset has no such rows either)",
            )
        if prompt_dropout:
            self._settings["prompt_dropout"] = prompt_dropout
        self.loader = self._open(negatives)
        self.plan = self.loader.plan

    @property
    def examples(self) -> dict[str, int]:
        """Usable examples of each task in the mixture."""
        return {n: t[0] for n, t in zip(self.names, self.loader.tasks, strict=True)}

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Unusable examples by task and reason; tasks without any are left out."""
        tasks = zip(self.names, self.loader.tasks, strict=True)
        return {n: {reason: count} for n, (_, count, reason) in tasks if count}

    def use(self, negatives: Path | str | None) -> None:
        """Take the hard negatives of another directory from now on; the plan stays.

        Raises:
            UsageError, CorruptError: as when the batches were opened.
        """
        self.loader = self._open(negatives)

    def batch(self, step: int, *, starts: Array | None = None) -> Batch:
        """The batch of a step, counted from 0, in a buffer of its own.

        Args:
            starts: u64 [B], for each example of the global batch where its hard negatives begin in
                its list, in place of ``hard_rule``; a list that ends sooner gives its last ones.
        """
        return self._fill(self.loader, step, self.allocate(0), starts)

    def stream(
        self,
        start: int,
        stop: int,
        *,
        stride: int = 1,
        threads: int = 1,
        before: Callable[[int], Array | None] | None = None,
    ) -> Iterator[Batch]:
        """The batches of steps ``start`` to ``stop`` in order, assembled ahead.

        A batch is valid until the next one is taken. Closing the iterator stops the threads.

        Args:
            start, stop: steps, counted from 0. stride: from one to the next.
            threads: at least 1; at most ``threads + 1`` batches wait.
            before: called with each step in order, in the caller's thread, when its batch is about
                to be assembled: after batch ``step - threads - 2`` was used, and no later than
                batch ``step`` is taken. It gives the ``starts`` of that step, and may call
                :meth:`use`.
        """
        free: deque[Array] = deque(self.allocate(0) for _ in range(threads + 2))
        waiting: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="embkit-data")
        steps = iter(range(start, stop, stride))

        def submit() -> None:
            for step in steps:
                starts = before(step) if before is not None else None
                waiting.append(pool.submit(self._fill, self.loader, step, free.popleft(), starts))
                break

        try:
            for _ in range(threads + 1):
                submit()
            while waiting:
                batch = waiting.popleft().result()
                submit()
                batch._give_back = lambda done: free.append(done.buffer)
                yield batch
                if batch.busy is not None:
                    batch.busy.synchronize()
                batch.release()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _open(self, negatives: Path | str | None) -> _rust.Loader:
        mined, folder = mined_files(negatives, self.store), self.store.path
        tasks = [
            (n, self.store.task(n)["kind"], folder / Examples.file(n), mined.get(n), weight)
            for n, weight in self.weights.items()
        ]
        return _rust.Loader(self.store.rows_store, tasks, **self._settings)

    def _fill(self, loader: _rust.Loader, step: int, buffer: Array, starts: Array | None) -> Batch:
        made = loader.batch(step, self.rank, self.world_size, starts)
        layout, size = made.layout(self.wide)
        if buffer.nbytes < size:
            buffer = self.allocate(int(size * _GROWTH))
        made.fill(buffer, self.wide)
        index, ordinal, epoch, _ = made.part
        matrix = (len(made.examples), made.hard_count)
        fields: dict[str, tuple[str, tuple[int, ...], int]] = {
            name: (kind, matrix if name in _MATRICES else (count,), start)
            for name, (kind, count, start) in layout.items()
        }
        micro = []
        for number, (row, rows, longest, token, tokens) in enumerate(made.micro):
            bounds = slice(row + number, row + number + rows + 1)
            micro.append(
                Micro(slice(row, row + rows), slice(token, token + tokens), longest, bounds)
            )
        return Batch(
            step=step,
            task=self.names[index],
            kind=made.kind,
            index=index,
            ordinal=ordinal,
            epoch=epoch,
            examples=made.examples,
            rows=made.rows,
            micro=micro,
            micro_count=made.micro_count,
            tokens=made.tokens,
            padded=layout["tokens"][1],
            buffer=buffer,
            fields=fields,
            starts=starts,
        )


def mined_files(negatives: Path | str | None, store: Store) -> dict[str, Path]:
    """The tables of a directory of mined negatives by task.

    Raises:
        UsageError: a directory of another kind, or mined on another store. CorruptError: damaged.
    """
    if negatives is None:
        return {}
    from embkit import container
    from embkit.stage import check_files

    folder = Path(negatives)
    manifest = container.read_manifest(folder, kind="embkit.negatives")
    check_files(folder, manifest)
    found = {
        path.stem.removeprefix("negatives-"): path
        for path in sorted(folder.glob("negatives-*.safetensors"))
    }
    mined_on = manifest.get("store")
    if mined_on is not None and mined_on != store.manifest.get("digest"):
        raise UsageError(
            "The negatives were mined on another store.", where=folder, fix="mine again on this one"
        )
    unknown = sorted(set(found) - set(store.task_names))
    if unknown:
        raise UsageError(
            f"The negatives are for task {unknown[0]!r}, which the store does not have.",
            where=folder,
            fix="mine again on this store",
        )
    return found
