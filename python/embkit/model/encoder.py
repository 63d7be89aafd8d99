"""The encoder: a transformer, pooling, an optional linear projection, and encoding of texts.

Shape suffixes: B rows of a batch, L tokens of the longest row, H width of the states, D width of
the embedding. `forward` returns raw embeddings: the kernels normalise each MRL prefix themselves,
and `encode` cuts first and normalises then, because the prefix of a unit vector is no unit vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from embkit import _rust, kernels
from embkit.errors import UsageError
from embkit.model.tokens import TextTokenizer, load_tokenizer, pad

if TYPE_CHECKING:
    from embkit import recipe

ROLES = ("query", "passage")
POOLINGS = ("mean", "cls", "last")
_TOKENS = 4096  # of an encoding micro-batch: large enough for full speed, small enough for caches


class Encoder(nn.Module):
    """A text encoder with MRL widths.

    Args:
        backbone: a transformers model that returns ``last_hidden_state`` [B, L, H].
        tokenizer: anything :func:`embkit.model.tokens.load_tokenizer` takes.
        dims: MRL widths, any order; the largest is the width D of the embedding.
        pooling: ``"mean"``, ``"cls"`` or ``"last"``.
        projection: linear layer without bias [D, H]. None keeps the states' width when D = H, and
            makes a layer that starts as the cut to the first D numbers when D < H.
        include_prompt: whether the tokens of the prompt count in the mean.
        prompts: text put before a text of a role, ``{"query": ..., "passage": ...}``.
        max_length: tokens a text of a role keeps, special tokens included.

    Raises:
        UsageError: unknown pooling, no width, or a width the model does not give.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        *,
        dims: Sequence[int],
        pooling: str = "mean",
        projection: nn.Linear | None = None,
        include_prompt: bool = True,
        prompts: Mapping[str, str] | None = None,
        max_length: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.projection = projection
        self.tokenizer: TextTokenizer = load_tokenizer(tokenizer)
        self.dims = tuple(sorted({int(d) for d in dims}, reverse=True))
        self.pooling = pooling
        self.include_prompt = include_prompt
        self.prompts = {role: str((prompts or {}).get(role, "")) for role in ROLES}
        limit = positions(backbone)
        given = max_length or {}
        self.max_length = {r: min(int(given.get(r, limit)), limit) for r in ROLES}
        hidden = int(getattr(backbone.config, "hidden_size", 0))
        width = projection.out_features if projection is not None else hidden
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
            self.projection = _prefix(hidden, self.dims[0])
        if pooling != "mean" and not include_prompt:
            raise UsageError(
                "Only mean pooling can leave the prompt out.",
                where="include_prompt",
                fix='use pooling = "mean", or include the prompt',
            )

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
            projection = new_projection(model.hidden, width) if model.projection else None
        return cls(
            backbone,
            tokens,
            dims=model.dims,
            pooling=model.pooling,
            projection=projection,
            prompts=prompts,
            max_length=lengths,
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

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt_len: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raw embeddings.

        Args:
            input_ids: token ids int64 [B, L], padded on the right.
            attention_mask: 1 for tokens, 0 for padding, int64 [B, L].
            prompt_len: tokens of the prompt in front int64 [B]; used when the prompt is excluded.

        Returns:
            float [B, D], not normalised.
        """
        h_BLH = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "mean":
            skip = None if self.include_prompt else prompt_len
            pooled_BH = kernels.mean_pool(h_BLH, mask=attention_mask, prompt_len=skip)
        elif self.pooling == "cls":
            pooled_BH = kernels.cls_pool(h_BLH)
        else:
            pooled_BH = kernels.last_token_pool(h_BLH, mask=attention_mask)
        return self.projection(pooled_BH) if self.projection is not None else pooled_BH

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

    def digest(self, algorithm: str = "sha256") -> str:
        """Hex digest of everything that decides an embedding: weights, widths, pooling, tokenizer.

        The same for a model in memory and for its export, and independent of the file form.
        """
        total = hashlib.new(algorithm)
        about = [list(self.dims), self.pooling, self.include_prompt, self.tokenizer.json]
        total.update(json.dumps([*about, self.prompts, self.max_length], sort_keys=True).encode())
        hash_tensors(total, self.state_dict())
        return total.hexdigest()

    def export(self, path: Path | str) -> Path:
        """Write the sentence-transformers layout; see :func:`embkit.model.export.export`."""
        from embkit.model.export import export

        return export(self, path)

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
        with evaluating(self):
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


def micro_batches(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Cut rows, longest first, into batches of similar length and at most ``budget`` tokens.

    Titles beside descriptions would be mostly padding in one batch, and many small batches cost
    calls: the cuts are where padded tokens plus a fixed price per batch are least in sum.

    Args:
        lengths: tokens of each row, int [n].
        budget: tokens of a batch with padding; one row is taken even when it is longer.

    Yields:
        Positions int64 [b] into ``lengths``; together each exactly once. Ties keep their order.
    """
    order, ends = _rust.micro_batches(np.ascontiguousarray(lengths, np.uint32), budget)
    if len(order):
        yield from np.split(order.astype(np.int64), ends[:-1].astype(np.int64))


def gather(store: Any, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids and mask, int64 [b, L], of rows of a token store."""
    width = max(int(np.asarray(store.lengths(rows)).max(initial=0)), 1)
    ids = np.full(len(rows) * width, pad_id, np.int64)
    mask = np.zeros(len(rows) * width, np.int64)
    store.gather_padded(rows, ids, mask, pad_id)
    return ids.reshape(-1, width), mask.reshape(-1, width)


def hash_tensors(total: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Feed names, dtypes, shapes and values to a hash, in the order of the names."""
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)


def new_projection(hidden: int, width: int) -> nn.Linear:
    """A randomly initialised projection [width, hidden] without bias, rows of about unit norm."""
    layer = nn.Linear(hidden, width, bias=False)
    nn.init.normal_(layer.weight, std=hidden**-0.5)
    return layer


def _prefix(hidden: int, width: int) -> nn.Linear:
    """A projection that keeps the first ``width`` of ``hidden`` numbers."""
    layer = nn.Linear(hidden, width, bias=False)
    nn.init.eye_(layer.weight)
    return layer


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside, and leave the caller's state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside."""
    was = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was)


def positions(backbone: Any) -> int:
    """Longest input the position table allows; XLM-R and RoBERTa start after the padding index."""
    config = backbone.config
    limit = int(getattr(config, "max_position_embeddings", 512) or 512)
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        limit -= int(config.pad_token_id) + 1
    return limit
