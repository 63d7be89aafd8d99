"""The encoder: a transformer, pooling, an optional linear projection, and encoding of texts.

Shape suffixes: B rows of a batch, L tokens of the longest row, H width of the states, D width of
the embedding, T tokens of all rows packed one after another. `forward` returns raw embeddings: the
kernels normalise each MRL prefix themselves, and `encode` cuts first and normalises then, because
the prefix of a unit vector is no unit vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from embkit.errors import UsageError
from embkit.model import attention, states
from embkit.model.convert import is_causal, make_bidirectional
from embkit.model.convert import positions as positions
from embkit.model.prepack import prepacked
from embkit.model.projection import linears, new_projection, prefix, seeded
from embkit.model.rows import evaluating, gather
from embkit.model.rows import hash_tensors as hash_tensors
from embkit.model.rows import micro_batches as micro_batches
from embkit.model.tokens import TextTokenizer, load_tokenizer, pad
from embkit.model.tuning import Tuning, merged_state
from embkit.model.tuning import apply as apply_tuning
from embkit.model.tuning import merge as merge_adapters

if TYPE_CHECKING:
    from embkit import recipe

ROLES = ("query", "passage")
POOLINGS = ("mean", "cls", "last")
_TOKENS = 4096  # of an encoding micro-batch: large enough for full speed, small enough for caches


def _widened(states: torch.Tensor) -> torch.Tensor:
    """States in float32 where no gradient is wanted: a mean rounded to 8 bits moves rankings."""
    if states.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled():
        return states.float()
    return states


class Encoder(nn.Module):
    """A text encoder with MRL widths.

    Args:
        backbone: a transformers model that returns ``last_hidden_state`` [B, L, H].
        tokenizer: anything :func:`embkit.model.tokens.load_tokenizer` takes.
        dims: MRL widths, any order; the largest is the width D of the embedding.
        pooling: ``"mean"``, ``"cls"`` or ``"last"``.
        projection: linear layer without bias [D, H], or a Sequential of two. None keeps the states'
            width when D = H, and makes a layer that starts as the cut to the first D numbers when
            D < H.
        include_prompt: whether the tokens of the prompt count in the mean.
        prompts: text put before a text of a role, ``{"query": ..., "passage": ...}``; under other
            names, prompts that users may ask for.
        max_length: tokens a text of a role keeps, special tokens included.
        bidirectional: let every token see every other in a model that was causal (docs/models.md).
        soft_mask_steps: training steps over which that happens, as in Conan-embedding-v2; 0 is at
            once.
        tuning: what is trained, and how.

    Raises:
        UsageError: unknown pooling, no width, a width the model does not give, a model that stays
            causal, or a part to freeze that it does not have.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        *,
        dims: Sequence[int],
        pooling: str = "mean",
        projection: nn.Module | None = None,
        include_prompt: bool = True,
        prompts: Mapping[str, str] | None = None,
        max_length: Mapping[str, int] | None = None,
        bidirectional: bool = False,
        soft_mask_steps: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.projection = projection
        self.tokenizer: TextTokenizer = load_tokenizer(tokenizer)
        self.dims = tuple(sorted({int(d) for d in dims}, reverse=True))
        self.pooling = pooling
        self.include_prompt = include_prompt
        self.prompts = dict.fromkeys(ROLES, "") | {k: str(v) for k, v in (prompts or {}).items()}
        limit = positions(backbone)
        given = max_length or {}
        self.max_length = {r: min(int(given.get(r, limit)), limit) for r in ROLES}
        hidden = int(getattr(backbone.config, "hidden_size", 0))
        width = linears(projection)[-1].out_features if projection is not None else hidden
        if pooling not in POOLINGS:
            raise UsageError(
                f"Unknown pooling {pooling!r}.", where="pooling", fix=f"one of {POOLINGS}"
            )
        if not self.dims or self.dims[-1] < 1 or self.dims[0] > width:
            raise UsageError(
                f"Widths {list(dims)} do not fit: this model gives embeddings of width {width}.",
                where="dims",
                fix=f"give widths from 1 to {width}, or let a projection make a wider embedding",
            )
        if projection is None and self.dims[0] < hidden:
            self.projection = prefix(hidden, self.dims[0])
        if pooling != "mean" and not include_prompt:
            raise UsageError(
                "Only mean pooling can leave the prompt out.",
                where="include_prompt",
                fix='use pooling = "mean", or include the prompt',
            )
        if is_causal(backbone) and hasattr(backbone.config, "use_cache"):
            backbone.config.use_cache = False  # keys and values for generation: memory for nothing
        self._prepacks = False
        self._attends = attention.use(backbone) and states.takes_positions(backbone)
        self.soft_mask_steps, self.soft_mask_step = soft_mask_steps, 0
        if soft_mask_steps and not (self._attends and bidirectional):
            raise UsageError(
                f"soft_mask_steps = {soft_mask_steps} opens the attention of a causal model that "
                "becomes bidirectional.",
                where="soft_mask_steps",
                fix="set bidirectional = true, or leave it out",
            )
        if bidirectional:
            make_bidirectional(backbone)
        self.tuning = tuning or Tuning()
        apply_tuning(self, self.tuning)

    @classmethod
    def from_config(
        cls,
        model: recipe.Model,
        tokenizer: Any,
        *,
        max_length: Mapping[str, int] | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> Encoder:
        """Build a small BERT with random weights.

        Args:
            model: sizes, widths, pooling, dropout and the seed of the initialisation.
            tokenizer: decides the vocabulary; see :func:`~embkit.model.tokens.load_tokenizer`.
            max_length: tokens per role; the longest decides the position table (default 32, 96).
            prompts: text per role.
        """
        from transformers.models.bert import BertConfig, BertModel

        tokens = load_tokenizer(tokenizer)
        lengths = {"query": 32, "passage": 96} | dict(max_length or {})
        config = BertConfig(
            vocab_size=tokens.vocab_size,
            hidden_size=model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            intermediate_size=model.intermediate,
            hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout,
            max_position_embeddings=max(lengths.values()),
            pad_token_id=tokens.pad_id,
            attn_implementation="sdpa",
        )
        with seeded(model.seed):
            backbone = BertModel(config, add_pooling_layer=False)
            width = max(model.dims)
            between = model.projection_hidden
            made = (
                new_projection(model.hidden, width, between=between) if model.projection else None
            )
        return cls(
            backbone,
            tokens,
            dims=model.dims,
            pooling=model.pooling,
            projection=made,
            include_prompt=model.include_prompt,
            prompts=prompts,
            max_length=lengths,
            tuning=Tuning.from_recipe(model),
        )

    @classmethod
    def from_pretrained(cls, path: Path | str, **options: Any) -> Encoder:
        """Load a model directory or hub id; see :func:`embkit.model.load.load_encoder`."""
        from embkit.model.load import load_encoder

        return load_encoder(path, **options)

    @property
    def width(self) -> int:
        """Width D of the full embedding."""
        return self.dims[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def bidirectional(self) -> bool:
        """Whether tokens see later ones, or will when the soft mask is open."""
        return not is_causal(self.backbone)

    @property
    def opening(self) -> float:
        """How open the attention is: 0 causal, 1 as the model is built."""
        return min(self.soft_mask_step / self.soft_mask_steps, 1.0) if self.soft_mask_steps else 1.0

    @property
    def can_pack(self) -> bool:
        """Whether :meth:`packed` works with this model, now."""
        return self._attends and self.opening == 1.0

    @property
    def packs_fast(self) -> bool:
        """Whether one kernel does that on a GPU in half precision, in training too."""
        return self.can_pack and attention.kernel_takes(self.backbone.config)

    def adopt_prompts(
        self, prompts: Mapping[str, str], task_prompts: Mapping[str, Mapping[str, str]]
    ) -> None:
        """Take over the prompts of a store; those of single tasks under the task's name.

        What stands before a task's passages is called ``"TASK passage"``. Prompts that each row
        of the store fills in are none to serve with.
        """
        self.prompts = {**self.prompts, **prompts}
        for task, sides in task_prompts.items():
            for side, text in sides.items():
                if "{task_text}" not in text:
                    name = task if side != "passage" else f"{task} passage"
                    self.prompts[name] = text

    def begin_step(self, step: int) -> None:
        """Set what depends on the training step, counted from 0: the soft mask.

        A function of the step alone, so a resumed run goes on with the same mask.
        """
        self.soft_mask_step = min(step + 1, self.soft_mask_steps)

    def check_steps(self, steps: int) -> None:
        """Refuse a training that would end before the soft mask is open.

        Raises:
            UsageError: ``steps`` is below ``soft_mask_steps``.
        """
        if self.opening < 1.0 and steps < self.soft_mask_steps:
            raise UsageError(
                f"The attention opens over {self.soft_mask_steps} steps, and {steps} are trained.",
                where="soft_mask_steps",
                fix=f"give at most {steps}",
            )

    def finish(self) -> None:
        """End a training stage: adapters go into the weights, and new ones take their place; a soft
        mask that is open stays open.

        What an export holds, and what a next stage starts from, is then the encoder itself.
        """
        if self.opening == 1.0:
            self.soft_mask_steps = self.soft_mask_step = 0
        if self.tuning.lora:
            merge_adapters(self)
            apply_tuning(self, self.tuning)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        prompt_len: torch.Tensor | None = None,
        *,
        cu_seqlens: torch.Tensor | None = None,
        longest: int | None = None,
    ) -> torch.Tensor:
        """Raw embeddings of a padded batch, or of a packed one.

        Args:
            input_ids: token ids int64 [B, L], padded on either side; [T] with ``cu_seqlens``.
            attention_mask: 1 for tokens, 0 for padding, int64 [B, L]; None with ``cu_seqlens``.
            prompt_len: tokens of the prompt in front int64 [B]; used when the prompt is excluded.
            cu_seqlens, longest: see :meth:`packed`, which wrappers of a module do not see.

        Returns:
            float [B, D], not normalised.
        """
        skip = None if self.include_prompt else prompt_len
        if cu_seqlens is None:
            if attention_mask is None:
                raise UsageError("A padded batch needs its attention_mask.", fix="give the mask")
            h_BLH = states.padded(self.backbone, input_ids, attention_mask, opening=self.opening)
            h_BLH = _widened(h_BLH)
            pooled_BH = states.pool(h_BLH, attention_mask, pooling=self.pooling, skip=skip)
        else:
            if not self.can_pack:
                why = "until its soft mask is open" if self._attends else "with its attention"
                raise UsageError(
                    f"{type(self.backbone).__name__} takes no packed input {why}.",
                    fix="use padded batches",
                )
            h_TH = states.packed(self.backbone, input_ids, cu_seqlens, longest=longest)
            h_TH = _widened(h_TH)
            pooled_BH = states.pool_packed(h_TH, cu_seqlens, pooling=self.pooling, skip=skip)
        if self.projection is None:
            return pooled_BH
        if pooled_BH.dtype == linears(self.projection)[0].weight.dtype or torch.is_grad_enabled():
            return self.projection(pooled_BH)
        for layer in linears(self.projection):  # of a model in half precision
            pooled_BH = nn.functional.linear(pooled_BH, layer.weight.to(pooled_BH.dtype))
        return pooled_BH

    def packed(
        self,
        ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        prompt_len: torch.Tensor | None = None,
        *,
        longest: int | None = None,
    ) -> torch.Tensor:
        """Raw embeddings of sequences that lie one after another, without padding.

        The same as :meth:`forward` on the padded batch, to rounding. On CUDA in half precision one
        varlen kernel takes all sequences, elsewhere SDPA each run of equal lengths.

        Args:
            ids: token ids int64 [T].
            cu_seqlens: int32 [B + 1]; sequence b is ids[cu_seqlens[b]:cu_seqlens[b + 1]].
            prompt_len: tokens of the prompt in front int64 [B]; used when the prompt is excluded.
            longest: tokens of the longest sequence; None reads it from ``cu_seqlens``, for which a
                GPU is waited for.

        Returns:
            float [B, D], not normalised.

        Raises:
            UsageError: a model whose attention takes no packed input, or a soft mask that is not
                open yet; see :attr:`can_pack`.
        """
        return self(ids, prompt_len=prompt_len, cu_seqlens=cu_seqlens, longest=longest)

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: str | None = None,
        prompt: str | None = None,
        dim: int | None = None,
        normalize: bool = True,
        token_budget: int = _TOKENS,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            texts: n strings.
            role: ``"query"`` or ``"passage"`` puts that role's prompt in front and keeps its
                length; None means no prompt and the longer length, as SentenceTransformer does.
            prompt: a prompt of your own instead of the role's.
            dim: MRL width to cut to, any from 1 to the full width (default).
            normalize: to unit length after the cut.
            token_budget: tokens of a micro-batch, padding included.
            progress: called with the number of texts done.

        Returns:
            float32 [n, dim], in the order of the texts.

        Raises:
            UsageError: unknown role, or a width out of range.
        """
        if isinstance(texts, str):
            raise UsageError("encode takes a list of texts.", fix="write encode([text])")
        before, length = self._side(role, prompt)
        flat, offsets = self.tokenizer.ids([before + t for t in texts], max_length=length)
        prompt_tokens = 0 if self.include_prompt else self.tokenizer.prompt_length(before)

        def fetch(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            ids, mask = pad(flat, offsets, rows, self.tokenizer.pad_id)
            return ids, mask, np.full(len(rows), prompt_tokens, np.int64)

        return self._embed(
            np.diff(offsets), fetch, dim=dim, normalize=normalize, budget=token_budget,
            progress=progress,
        )  # fmt: skip

    def encode_rows(
        self,
        store: Any,
        rows: np.ndarray,
        *,
        dim: int | None = None,
        normalize: bool = True,
        token_budget: int = _TOKENS,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Embed rows of a token store without tokenising again; prompts are in the rows.

        Args:
            store: an ``embkit._rust.Store``, or an object with one in its ``rows_store``.
            rows: u64 [n] row numbers.
            dim, normalize, token_budget, progress: as in :meth:`encode`.

        Returns:
            float32 [n, dim], in the order of ``rows``.
        """
        rows = np.ascontiguousarray(rows, np.uint64)

        def fetch(at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            part = rows[at]
            ids, mask = gather(store, part, self.tokenizer.pad_id)
            return ids, mask, np.asarray(store.prompt_len(part), np.int64)

        return self._embed(
            np.asarray(store.lengths(rows), np.int64), fetch, dim=dim, normalize=normalize,
            budget=token_budget, progress=progress,
        )  # fmt: skip

    def prepack(self, on: bool = True) -> Encoder:
        """Let :meth:`encode` on a CPU lay out weights for oneDNN first; a sixth faster or more.

        Embeddings then differ from those without by rounding, some 1e-7, which is why nothing that
        trains or mines does so by itself. In bfloat16 it is always done.

        Returns:
            itself.
        """
        self._prepacks = on
        return self

    def digest(self, algorithm: str = "sha256") -> str:
        """Hex digest of everything that decides an embedding, and of what will be trained.

        Weights, widths, pooling, tokenizer, prompts, and where they are not the plain ones the
        direction of attention and the tuning. The same for a model in memory and for its export,
        and independent of the file form.
        """
        total = hashlib.new(algorithm)
        about = [list(self.dims), self.pooling, self.include_prompt, self.tokenizer.json]
        more = self.beyond_weights()
        sides = [self.prompts, self.max_length, *([more] if more else [])]
        total.update(json.dumps([*about, *sides], sort_keys=True).encode())
        hash_tensors(total, self.merged_state())
        return total.hexdigest()

    def merged_state(self) -> dict[str, torch.Tensor]:
        """Weights by name as an export has them: adapters are in the weights."""
        if not self.tuning.lora:
            return self.state_dict()
        own = {f"backbone.{k}": v for k, v in merged_state(self.backbone).items()}
        return own | {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def beyond_weights(self) -> dict[str, Any]:
        """What neither weights nor settings of every encoder say, as JSON types; {} for most."""
        out: dict[str, Any] = {}
        config = self.backbone.config
        if getattr(config, "is_causal", None) is False or getattr(
            config, "use_bidirectional_attention", False
        ):
            out["bidirectional"] = True
        if self.opening < 1.0:
            out["soft_mask"] = {"steps": self.soft_mask_steps, "step": self.soft_mask_step}
        if changed := self.tuning.changes():
            out["tuning"] = changed
        return out

    def export(self, path: Path | str, **options: Any) -> Path:
        """Write the sentence-transformers layout; see :func:`embkit.model.export.export`."""
        from embkit.model.export import export

        return export(self, path, **options)

    def _side(self, role: str | None, prompt: str | None) -> tuple[str, int]:
        if role is not None and role not in ROLES:
            raise UsageError(
                f"Unknown role {role!r}.", where="role", fix='give "query", "passage" or None'
            )
        if role is None:
            return prompt or "", max(self.max_length.values())
        return self.prompts[role] if prompt is None else prompt, self.max_length[role]

    @torch.inference_mode()
    def _embed(
        self,
        lengths: np.ndarray,
        fetch: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]],
        *,
        dim: int | None,
        normalize: bool,
        budget: int,
        progress: Callable[[int], object] | None,
    ) -> np.ndarray:
        width = self.width if dim is None else dim
        if not 1 <= width <= self.width:
            raise UsageError(
                f"Width {width} is out of range.", where="dim", fix=f"give 1 to {self.width}"
            )
        out = np.empty((len(lengths), width), np.float32)
        done = 0
        half = self.device.type == "cpu" and next(self.parameters()).dtype == torch.bfloat16
        packs = prepacked(self, int(lengths.sum())) if half or self._prepacks else nullcontext()
        with evaluating(self), packs:
            for at in micro_batches(lengths, budget):
                ids, mask, prompt_len = (torch.from_numpy(a).to(self.device) for a in fetch(at))
                e_BD = self(ids, mask, prompt_len)[:, :width].float()
                if normalize:
                    e_BD = nn.functional.normalize(e_BD, dim=1)
                out[at] = e_BD.cpu().numpy()
                done += len(at)
                if progress is not None:
                    progress(done)
        return out
