"""The section of a recipe that decides the encoder."""

from __future__ import annotations

from dataclasses import dataclass

from embkit.recipe.schema import one_of, require


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder.

    Attributes:
        path: a model directory or id to start from, or None to build a small BERT from these sizes.
        hidden: width of the states. layers, heads, intermediate: as in BERT.
        dims: MRL widths; the largest is the width of the embedding.
        pooling: mean, cls or last. include_prompt: whether the prompt's tokens count in the mean.
        projection: of a new BERT: put a random linear layer (no bias) between pooling and
            embedding. new_head: the same for a loaded model, in place of its own if it has one.
            projection_hidden: make it two layers with this width between them; 0 is one.
        dropout: of states and attention.
        seed: seed of the initialisation, shared by every run.
        bidirectional: let the tokens of a causal model see later ones (docs/models.md).
            soft_mask_steps: steps of the first training over which they come to, as in
            Conan-embedding-v2; 0 is at once.
        keep_layers: keep the bottom blocks of a loaded model; 0 keeps all.
        freeze: parts that are not trained: backbone, embeddings, "layers:K" (the bottom K blocks),
            projection, or a pattern over parameter names.
        lora: rank of LoRA adapters on the blocks' linear layers (the rest of the backbone is frozen
            then); 0 is none. lora_alpha: their scale times the rank, by default twice the rank.
            lora_dropout: of their input. lora_targets: ends of layer names; empty for all.
        gradient_checkpointing: recompute blocks in the backward pass, for less memory.
    """

    path: str | None = None
    hidden: int = 256
    layers: int = 2
    heads: int = 4
    intermediate: int = 1024
    dims: tuple[int, ...] = (256, 128, 64)
    pooling: str = "mean"
    include_prompt: bool = True
    projection: bool = True
    new_head: bool = False
    projection_hidden: int = 0
    dropout: float = 0.0
    seed: int = 0
    bidirectional: bool = False
    soft_mask_steps: int = 0
    keep_layers: int = 0
    freeze: tuple[str, ...] = ()
    lora: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        one_of("model.pooling", self.pooling, ("mean", "cls", "last"))
        for name in ("projection_hidden", "soft_mask_steps", "keep_layers", "lora"):
            value = getattr(self, name)
            require(value >= 0, f"model.{name} = {value} is negative.", "give 0 or more")
        require(
            0 <= self.lora_dropout < 1,
            f"model.lora_dropout = {self.lora_dropout} is no share.",
            "give a number from 0 to below 1",
        )
        require(
            self.include_prompt or self.pooling == "mean",
            f"model.include_prompt = false, and the pooling is {self.pooling}.",
            'only pooling = "mean" can leave the prompt out',
        )
        require(
            not self.soft_mask_steps or self.bidirectional,
            f"model.soft_mask_steps = {self.soft_mask_steps}, and the model stays as it is.",
            "set bidirectional = true, or leave soft_mask_steps out",
        )
        for name in ("bidirectional", "keep_layers", "new_head"):
            require(
                self.path is not None or not getattr(self, name),
                f"model.{name} changes a loaded model, and there is no model.path.",
                f"set path, or leave {name} out",
            )
        require(
            bool(self.dims) and all(d > 0 for d in self.dims),
            f"model.dims = {list(self.dims)} has no positive width.",
            "give the MRL widths, e.g. [256, 128, 64]",
        )
        require(
            self.hidden % self.heads == 0,
            f"model.hidden = {self.hidden} is no multiple of model.heads = {self.heads}.",
            "choose heads that divide hidden",
        )
