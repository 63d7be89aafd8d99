"""Ranks: processes that train one model together, each on its share of every global batch.

A loss over ranks is the loss of one process. Each rank has the rows of its own queries and meets
the passages of all: one all-gather takes embeddings and keys around, one reduce-scatter brings the
gradients of gathered passages back to their owners, exact and summed. What every rank adds to the
loss is its own rows' share, so gradients of the weights are sums over ranks, not means.

A rank that dies or stops is an error on all others within the timeout of the process group.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from embkit.errors import EmbkitError, UsageError

_HALF = (torch.bfloat16, torch.float16)
_BEAT = 5.0  # seconds between two signs of life


class Ranks:
    """The processes of a run, or the one there is.

    Args:
        group: a process group that this process is in; None for a process alone.
        timeout: seconds after which a rank that does not answer is an error, for groups that are
            made of this one.

    Attributes:
        rank, world: this process's number, and how many there are.
    """

    def __init__(self, group: Any = None, *, timeout: float = 600.0) -> None:
        self.group, self.timeout = group, timeout
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)
        self._waiting: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once: log, checkpoints, the model."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.group is not None:
            with answered():
                dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.group is None:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device())).item() > 0)

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Arrays of equal shape and any type from every rank, one after another on axis 0."""
        if self.group is None:
            return values
        return gather_bytes(values, self)

    def once(self, work: Callable[[], Any]) -> Any:
        """What the first rank's ``work`` returns (JSON types), on every rank.

        Raises:
            EmbkitError: on the other ranks, when it raised on the first.
        """
        if self.group is None:
            return work()
        told: dict[str, Any] = {}
        try:
            if self.first:
                told = {"value": work()}
        except BaseException as error:
            self._tell({"error": f"{type(error).__name__}: {error}"})
            raise
        told = self._tell(told)
        self._check_told(told)
        return told["value"]

    def alone(self, work: Callable[[], Any]) -> Any:
        """What the first rank's ``work`` returns, on that rank; None on the others, which wait.

        It may take hours: the first rank says all the while that it is there, so that one that
        dies or stops is an error within the timeout.

        Raises:
            EmbkitError: on the other ranks, when it raised on the first or the first is gone.
        """
        if self.group is None:
            return work()
        if self._waiting is None:  # of the CPU: a GPU's collectives would spin
            everyone = dist.get_process_group_ranks(self.group)
            limit = timedelta(seconds=self.timeout)
            with answered():
                self._waiting = dist.new_group(everyone, timeout=limit, backend="gloo")
        if not self.first:
            told = self._tell({}, self._waiting)
            while "going" in told:
                told = self._tell({}, self._waiting)
            self._check_told(told)
            return None
        over = threading.Event()

        def beat() -> None:
            with suppress(EmbkitError):  # the last word below meets the same error
                while not over.wait(min(self.timeout / 4, _BEAT)):
                    self._tell({"going": True}, self._waiting)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        told = {}
        try:
            return work()
        except BaseException as error:
            told["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            over.set()
            thread.join()
            self._tell(told, self._waiting)

    def device(self) -> torch.device:
        """Where tensors of collectives must be."""
        if self.group is not None and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def part(self, counts: Sequence[int]) -> tuple[int, Ranks]:
        """Split the ranks into sets of the given sizes; the number of this rank's set, and the set.

        Every rank calls this, in the same order as the others. A process alone is set 0.

        Raises:
            UsageError: the sizes do not add up to the number of ranks.
        """
        if self.group is None:
            return 0, self
        if sum(counts) != self.world or min(counts) < 1:
            raise UsageError(
                f"Sets of {list(counts)} ranks are {sum(counts)} ranks; this run has {self.world}.",
                where="parts",
                fix="start as many processes, or leave ranks out: then parts take turns",
            )
        own, start, everyone = (0, self), 0, dist.get_process_group_ranks(self.group)
        for number, count in enumerate(counts):
            with answered():
                group = dist.new_group(
                    everyone[start : start + count], timeout=timedelta(seconds=self.timeout)
                )
            if start <= self.rank < start + count:
                own = (number, Ranks(group, timeout=self.timeout))
            start += count
        return own

    @staticmethod
    def _check_told(told: dict[str, Any]) -> None:
        if "error" in told:
            raise EmbkitError(
                f"The first rank stopped: {told['error']}", fix="see the output of rank 0"
            )

    def _tell(self, value: dict[str, Any], waiting: Any = None) -> dict[str, Any]:
        """The first rank's value on all, as JSON: objects would travel as pickles.

        Args:
            waiting: the group of :meth:`alone`; None takes the ranks' own.
        """
        text = json.dumps(value).encode()
        group = waiting or self.group
        device = torch.device("cpu") if waiting else self.device()
        size = torch.tensor([len(text)], dtype=torch.int64, device=device)
        source = dist.get_global_rank(self.group, 0)
        with answered():
            dist.broadcast(size, source, group=group)
            data = torch.zeros(int(size), dtype=torch.uint8, device=device)
            if self.first:
                data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            dist.broadcast(data, source, group=group)
        found: dict[str, Any] = json.loads(bytes(data.cpu().numpy()))
        return found


class Share:
    """A global batch among ranks.

    Args:
        ranks: that share it. batch_size: its rows; each rank has ``ceil`` or ``floor`` of its part.
        ring: passages go around block by block; otherwise every rank gathers those of all.

    Attributes:
        world: ranks. rows: places of each in what is gathered. start: of this rank's first.
    """

    def __init__(self, ranks: Ranks, batch_size: int, *, ring: bool = False) -> None:
        self.ranks, self.world, self.batch_size = ranks, ranks.world, batch_size
        self.ring = ring
        self.rows = -(-batch_size // ranks.world)
        self.start = ranks.rank * self.rows

    def gather(self, x: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """Rows of every rank in one all-gather; the gradient comes back in one reduce-scatter.

        Args:
            x: own rows [b, D], differentiable. columns: more of each row, [b], any types.

        Returns:
            ``x`` and the columns of all ranks, ``rows`` places each, float32 for half types; then
            bool, False for the places that are empty. Empty places hold zeros, in integers -1.
        """
        wide = x.float() if x.dtype in _HALF else x
        return list(_Gather.apply(wide, self, *columns))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        return self.ranks.sum(values)

    def pass_on(self, tensor: torch.Tensor, *, back: bool = False) -> Callable[[], torch.Tensor]:
        """Send a tensor to the rank before, or back to the one after, while the like comes in from
        the other neighbour; what is returned waits for both, and gives what came."""
        tensor = tensor.contiguous()
        came, group, step = torch.empty_like(tensor), self.ranks.group, 1 if back else -1
        peers = [(self.ranks.rank + way) % self.world for way in (step, -step)]
        swap = [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=peers[0]),
            dist.P2POp(dist.irecv, came, group=group, group_peer=peers[1]),
        ]
        with answered():
            works = dist.batch_isend_irecv(swap)

        def arrived() -> torch.Tensor:
            with answered():
                for work in works:
                    work.wait()
            return came

        return arrived

    def gather_own(self, x: torch.Tensor, *columns: torch.Tensor) -> list[torch.Tensor]:
        """As :meth:`gather` for a loss that every rank computes whole: only own rows have a
        gradient, and nothing is sent back."""
        all_x, *rest = self.gather(x.detach(), *columns)
        end = self.start + len(x)
        return [torch.cat([all_x[: self.start], x.to(all_x.dtype), all_x[end:]]), *rest]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, share: Share, *columns: torch.Tensor) -> Any:
        ctx.share, ctx.count = share, len(x)
        there = torch.ones(len(x), dtype=torch.bool, device=x.device)
        fields = [x, *columns, there]
        out = _unpack(gather_bytes(_pack(fields, share.rows), share.ranks), fields)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        share = ctx.share
        own = grad.new_empty(share.rows, *grad.shape[1:])
        with answered():
            dist.reduce_scatter_tensor(own, grad.contiguous(), group=share.ranks.group)
        return (own[: ctx.count], None, *[None] * (len(ctx.needs_input_grad) - 2))


def _pack(fields: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Bytes uint8 [rows, n] of fields [b, ...] side by side; zeros, or -1, where b < rows."""
    parts = []
    for field in fields:
        empty = -1 if field.dtype in (torch.int32, torch.int64) else 0
        full = field.new_full((rows, *field.shape[1:]), empty)
        full[: len(field)] = field
        parts.append(full.reshape(rows, -1).view(torch.uint8))
    return torch.cat(parts, 1)


def _unpack(data: torch.Tensor, fields: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    sizes = [f[:1].numel() * f.element_size() for f in fields]
    parts = data.split(sizes, dim=1)
    return [
        part.contiguous().view(f.dtype).reshape(-1, *f.shape[1:])
        for part, f in zip(parts, fields, strict=True)
    ]


def gather_bytes(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Arrays of equal shape from every rank on axis 0, moved as bytes."""
    data = values.contiguous().reshape(len(values), -1).view(torch.uint8)
    out = data.new_empty(ranks.world * len(data), data.shape[1])
    with answered():
        dist.all_gather_into_tensor(out, data, group=ranks.group)
    return out.view(values.dtype).reshape(-1, *values.shape[1:])


@contextmanager
def answered() -> Iterator[None]:
    """Say in a user's words that a collective failed.

    Raises:
        EmbkitError: another rank died, stopped, or its network is gone.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError and gloo's errors are of this class
        raise EmbkitError(
            f"Another rank did not answer: {str(error).splitlines()[0]}",
            where=f"rank {dist.get_rank()} of {dist.get_world_size()}",
            fix="look at the other ranks' output; the same command goes on from the checkpoint",
        ) from error


def training_device(given: torch.device, wanted: str = "auto") -> torch.device:
    """Where a model trains.

    Deterministic products on a GPU need a fixed workspace, which is asked for here.

    Args:
        given: where it is. wanted: "cpu", "cuda", or "auto": a model on the CPU goes to the GPU,
            where there is one; to that of LOCAL_RANK where a launcher says it.

    Raises:
        UsageError: "cuda" is wanted, and there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise UsageError(
            "torch finds no GPU.", where="device", fix='set device = "auto", or "cpu" to be sure'
        )
    if wanted == "cpu":
        given = torch.device("cpu")
    elif given.type == "cpu" and there:
        given = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if given.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return given


@contextmanager
def open_ranks(device: torch.device, *, timeout: float) -> Iterator[Ranks]:
    """The ranks that a launcher such as torchrun started, or this process alone.

    Args:
        device: of the model: CUDA takes NCCL and the GPU of LOCAL_RANK, the CPU takes gloo.
        timeout: seconds after which a rank that does not answer is an error.

    Raises:
        UsageError: the launcher's environment is incomplete.
    """
    if dist.is_initialized():  # by the caller, who also ends it
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        yield Ranks(group, timeout=timeout)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks()
        return
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is set and {missing[0]} is not.",
            where="environment",
            fix="start with torchrun, or unset WORLD_SIZE",
        )
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if device.type == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(local)
        options["device_id"] = local
    with answered_at_start():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    try:
        yield Ranks(dist.group.WORLD, timeout=timeout)
    finally:
        dist.destroy_process_group()


@contextmanager
def answered_at_start() -> Iterator[None]:
    """As :func:`answered`, before there is a group."""
    try:
        yield
    except RuntimeError as error:
        raise EmbkitError(
            f"The ranks did not meet: {str(error).splitlines()[0]}",
            where=f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}",
            fix="check that every rank started and reaches MASTER_ADDR:MASTER_PORT",
        ) from error
