"""What of an encoder is trained: frozen parts, LoRA adapters, and memory for recomputation.

None of it changes what an untrained encoder computes. It travels in the export's embkit.json, so a
later stage trains the same parts; adapters are merged into the weights there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from embkit.errors import UsageError, nearest
from embkit.model.convert import blocks
from embkit.model.projection import seeded

if TYPE_CHECKING:
    from embkit import recipe

_PARTS = ("backbone", "embeddings", "projection", "layers:K")
_ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How an encoder is trained.

    Attributes:
        freeze: parts that stay as they are: ``"backbone"``, ``"embeddings"``, ``"layers:K"`` (the
            bottom K blocks), ``"projection"``, or a pattern over parameter names (``"*.bias"``).
        lora: rank of the adapters on the linear layers of the blocks, 0 for none; the rest of the
            backbone is frozen then.
        lora_alpha: their scale times the rank; None is twice the rank.
        lora_dropout: of their input.
        lora_targets: ends of the names of the layers that get one; empty for all in the blocks.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping it.
        seed: of the adapters' first weights.
    """

    freeze: tuple[str, ...] = ()
    lora: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False
    seed: int = 0

    def changes(self) -> dict[str, Any]:
        """What differs from training everything, as JSON types; the seed where adapters need it."""
        plain = Tuning(seed=self.seed) if not self.lora else Tuning(seed=self.seed + 1)
        table = dataclasses.asdict(self)
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in table.items()
            if value != getattr(plain, key)
        }

    @classmethod
    def from_recipe(cls, model: recipe.Model) -> Tuning:
        """The settings of a recipe's model section."""
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: getattr(model, name) for name in names})

    @classmethod
    def of(cls, table: dict[str, Any]) -> Tuning:
        """From :meth:`changes`."""
        known = {f.name for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in table.items() if k in known
        }
        return cls(**given)


def apply(encoder: Any, tuning: Tuning) -> None:
    """Put adapters in, freeze what is to stay, and switch recomputation on.

    Raises:
        UsageError: peft is missing, a part or pattern that names nothing, nothing left to train,
            or a model that cannot recompute.
    """
    backbone = encoder.backbone
    if tuning.lora:
        _inject(backbone, tuning)
    for part in tuning.freeze:
        for parameter in parameters_of(encoder, part):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in encoder.parameters()):
        raise UsageError(
            "Every parameter is frozen; nothing is left to train.",
            where="freeze",
            fix="leave a part out of freeze, or add a projection",
        )
    if tuning.gradient_checkpointing:
        if not getattr(backbone, "supports_gradient_checkpointing", False):
            raise UsageError(
                f"{type(backbone).__name__} cannot recompute its blocks.",
                where="gradient_checkpointing",
                fix="set it to false",
            )
        backbone.gradient_checkpointing_enable({"use_reentrant": False})


def merge(encoder: Any) -> None:
    """Add the adapters to the weights below them and take them out; everything trains again."""
    backbone = encoder.backbone
    for path, layer in list(_adapted(backbone)):
        layer.merge()
        parent, _, name = path.rpartition(".")
        setattr(backbone.get_submodule(parent), name, layer.get_base_layer())
    if hasattr(backbone, "peft_config"):
        del backbone.peft_config
    for parameter in backbone.parameters():
        parameter.requires_grad_(True)


def merged_state(backbone: Any) -> dict[str, torch.Tensor]:
    """The backbone's state as :func:`merge` would leave it, under the names without adapters."""
    state = backbone.state_dict()
    for path, layer in _adapted(backbone):
        total = layer.get_base_layer().weight.detach() + layer.get_delta_weight(_ADAPTER).detach()
        state[f"{path}.base_layer.weight"] = total
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def _adapted(backbone: Any) -> Iterator[tuple[str, Any]]:
    for path, module in backbone.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield path, module


def _inject(backbone: Any, tuning: Tuning) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UsageError(
            "LoRA needs the package peft.", where="lora", fix="pip install 'embkit[lora]'"
        ) from error
    inside = {id(m) for m in blocks(backbone).modules() if isinstance(m, nn.Linear)}
    names = [name for name, module in backbone.named_modules() if id(module) in inside]
    if tuning.lora_targets:
        ends = tuple(f".{target}" for target in tuning.lora_targets)
        chosen = [name for name in names if f".{name}".endswith(ends)]
        for target, end in zip(tuning.lora_targets, ends, strict=True):
            if not any(f".{name}".endswith(end) for name in names):
                known = {name.rsplit(".", 1)[-1] for name in names}
                raise UsageError(
                    f"No linear layer of the blocks is called {target!r}; {nearest(target, known)}",
                    where="lora_targets",
                )
        names = chosen
    config = LoraConfig(
        r=tuning.lora,
        lora_alpha=2 * tuning.lora if tuning.lora_alpha is None else tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=names,
        bias="none",
    )
    with seeded(tuning.seed):
        inject_adapter_in_model(config, backbone, adapter_name=_ADAPTER)


def parameters_of(encoder: Any, part: str) -> list[nn.Parameter]:
    """Parameters of a part of an encoder, named as in :attr:`Tuning.freeze`.

    Raises:
        UsageError: a part or pattern that names nothing.
    """
    backbone = encoder.backbone
    modules: list[nn.Module] = []
    if part == "backbone":
        modules = [backbone]
    elif part == "projection" and encoder.projection is not None:
        modules = [encoder.projection]
    elif part == "embeddings":
        own = getattr(backbone, "embeddings", None)
        modules = [own if isinstance(own, nn.Module) else backbone.get_input_embeddings()]
    elif part.startswith("layers:") and part[7:].isdigit():
        count, found = int(part[7:]), blocks(backbone)
        if not 1 <= count <= len(found):
            raise UsageError(
                f"freeze has {part!r}, and the model has {len(found)} blocks.", where="freeze"
            )
        modules = list(found[:count])
    chosen = [p for module in modules for p in module.parameters()]
    if not modules:
        chosen = [p for name, p in encoder.named_parameters() if fnmatch(name, part)]
    if not chosen:
        raise UsageError(
            f"freeze has {part!r}, which is no part and matches no parameter.",
            where="freeze",
            fix=f"one of {', '.join(_PARTS)}, or a pattern such as 'backbone.*.bias'",
        )
    return chosen
