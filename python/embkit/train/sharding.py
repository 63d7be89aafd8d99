"""Where weights and their gradients are: copies on every rank, or shards of FSDP2.

Gradients are sums over ranks (each rank's loss is a share of one sum), taken once a step: the last
chunk's backward completes them, and buckets are on their way while it still runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from embkit.errors import UsageError
from embkit.train.parallel import Ranks, answered

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train

_BUCKET = 25 << 20  # bytes of gradients that travel together


class Replicas:
    """Weights that every rank has whole: gradients are added in buckets.

    Args:
        parameters: those that are trained, in the order of the forward. ranks: that have them.
        bucket_bytes: of gradients in one all-reduce.
    """

    sharded = False

    def __init__(
        self, parameters: list[nn.Parameter], ranks: Ranks, *, bucket_bytes: int = _BUCKET
    ) -> None:
        self.ranks = ranks
        self._buckets: list[list[nn.Parameter]] = []
        self._of: dict[nn.Parameter, int] = {}
        self._armed, self._sent = False, 0
        self._missing: list[int] = []
        self._flying: list[tuple[Any, torch.Tensor, list[nn.Parameter]]] = []
        if ranks.world == 1:
            return
        size, kind = bucket_bytes, None
        for parameter in reversed(parameters):  # as the backward finishes them
            if size >= bucket_bytes or kind != (parameter.dtype, parameter.device):
                self._buckets.append([])
                size, kind = 0, (parameter.dtype, parameter.device)
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
            self._of[parameter] = len(self._buckets) - 1
            parameter.register_post_accumulate_grad_hook(self._ready)

    def arm(self) -> None:
        """The backward that comes next completes the gradients."""
        self._armed, self._sent = True, 0
        self._missing = [len(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Wait until every gradient is its sum over ranks.

        Raises:
            EmbkitError: another rank did not answer.
        """
        if self._armed:
            self._send(len(self._buckets))
        self._armed = False
        with answered():
            for work, flat, bucket in self._flying:
                work.wait()
                parts = flat.split([p.numel() for p in bucket])
                for parameter, part in zip(bucket, parts, strict=True):
                    if parameter.grad is not None:  # a part that no rank uses stays without
                        parameter.grad.copy_(part.view_as(parameter))
        self._flying = []

    def _ready(self, parameter: torch.Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._of[parameter]] -= 1  # type: ignore[index]
        full = self._sent
        while full < len(self._buckets) and self._missing[full] == 0:
            full += 1
        self._send(full)

    def _send(self, end: int) -> None:
        """Send buckets up to ``end``, in one order on every rank."""
        for bucket in self._buckets[self._sent : end]:
            flat = torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1)
                    for p in bucket
                ]
            )
            with answered():
                work = dist.all_reduce(flat, group=self.ranks.group, async_op=True)
            self._flying.append((work, flat, bucket))
        self._sent = max(self._sent, end)


class Shards:
    """Weights that FSDP2 has cut: it gathers them by layer and scatters the sums of gradients."""

    sharded = True

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        encoder.set_requires_gradient_sync(False)

    def arm(self) -> None:
        """The backward that comes next completes the gradients."""
        self.encoder.set_requires_gradient_sync(True)

    def finish(self) -> None:
        """FSDP2 has waited already."""
        self.encoder.set_requires_gradient_sync(False)


def spread(encoder: Encoder, config: Train, ranks: Ranks) -> Replicas | Shards:
    """Put an encoder's weights where the configuration says. Every rank calls this.

    Args:
        encoder: with the same weights on every rank. config: sharding, shard_ranks, cpu_offload,
            precision.

    Raises:
        UsageError: shards without ranks, or sets of ranks that do not divide them.
    """
    if config.sharding == "replicate":
        return Replicas([p for p in encoder.parameters() if p.requires_grad], ranks)
    if ranks.world == 1:
        raise UsageError(
            f"sharding = {config.sharding!r} cuts the weights among ranks, and this run has one.",
            where="sharding",
            fix='start several processes with torchrun, or set sharding = "replicate"',
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
    )

    shape: tuple[int, ...] = (ranks.world,)
    if config.sharding == "hybrid":
        shape = (ranks.world // max(config.shard_ranks, 1), config.shard_ranks)
        if shape[0] * shape[1] != ranks.world:
            raise UsageError(
                f"Sets of {config.shard_ranks} ranks do not divide {ranks.world} ranks.",
                where="shard_ranks",
                fix="give a divisor of the number of ranks, such as the GPUs of one machine",
            )
    names = ("copy", "shard")[-len(shape) :]
    mesh = init_device_mesh(encoder.device.type, shape, mesh_dim_names=names)
    options: dict[str, Any] = {"mesh": mesh}
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)
    if kind is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=kind, reduce_dtype=torch.float32)
    if config.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=encoder.device.type == "cuda")
    for block in blocks(encoder):
        fully_shard(block, **options)
    fully_shard(encoder, **options)
    for module in encoder.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, as everywhere here
            module.set_force_sum_reduction_for_comms(True)  # plain ones: gloo has no others
    return Shards(encoder)


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformer: members of its longest list of modules."""
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))  # type: ignore[arg-type]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece; of a sharded one every rank must ask."""
    full = getattr(tensor, "full_tensor", None)
    found: torch.Tensor = tensor if full is None else full()
    return found


def like(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A full tensor, the same on every rank, placed as a parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return full.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    there: Any = parameter
    mesh = there.device_mesh
    cut = distribute_tensor(full.to(mesh.device_type), mesh, there.placements, src_data_rank=None)
    return cut.to(parameter.device)


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name, in one piece; every rank must ask."""
    return {name: whole(value.detach()) for name, value in module.state_dict().items()}


def load_state(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load weights that :func:`whole_state` gave, sharded or not, on any number of ranks."""
    own = module.state_dict()
    module.load_state_dict(
        {name: like(t, own[name]) if name in own else t for name, t in tensors.items()}
    )
