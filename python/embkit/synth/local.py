"""A causal language model in this process: exact log-likelihoods, a shared prefix computed once.

Prompts of a stage begin alike (instructions and examples). The longest prefix that all prompts of a
call share goes through the model once; its keys and values stand before every batch. What is left
is deduplicated, sorted by length and cut into batches of a fixed number of tokens, so the numbers
depend on the call alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from json import JSONDecoder
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embkit.errors import UsageError
from embkit.synth.llm import FIRST_TOKEN, GENERATE, LOGLIKELIHOOD, Completion, Likelihood, Usage

_SLOT = "\x00embkit\x00"  # stands for the prompt in a chat template
_LOGITS = 1 << 26  # numbers of a block of logits: 256 MiB
_TREE = 512  # tokens of a tree: its attention is quadratic
_SHARED = 8  # tokens from which rows are computed together


class Local:
    """A transformers causal LM.

    Args:
        model: a directory or id, or a model object.
        tokenizer: with a model object, its tokenizer.
        gguf: name of a GGUF file inside the directory (needs the package ``gguf``).
        chat: put the tokenizer's chat template around prompts of ``generate``; by default when
            there is one. Likelihoods are always those of plain text.
        token_budget: tokens of a batch, padding included.
        device, dtype: of the model; float32 on the CPU by default.
        name: for provenance; the directory's name by default.

    Raises:
        UsageError: no fast tokenizer, or ``chat`` without a template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        gguf: str | None = None,
        chat: bool | None = None,
        token_budget: int = 2048,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        name: str | None = None,
    ) -> None:
        if token_budget < 1:
            raise UsageError(f"token_budget = {token_budget} is not positive.")
        self._path: Path | None = None
        self._gguf = gguf
        if isinstance(model, (str, Path)):
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self._path = Path(model) if Path(model).exists() else None
            more = {"gguf_file": gguf} if gguf else {}
            tokenizer = AutoTokenizer.from_pretrained(str(model), **more)
            name = name or Path(model).name
            model = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, **more)
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                "A likelihood needs to know which characters a token stands for.",
                fix="give the model's fast tokenizer",
            )
        self.model, self.tokenizer = model.to(device).eval(), tokenizer
        self._name = name or type(model).__name__
        template = getattr(tokenizer, "chat_template", None)
        if chat and not template:
            raise UsageError("The tokenizer has no chat template.", fix="chat=False")
        self.chat = bool(template) if chat is None else chat
        self.token_budget, self.usage = token_budget, Usage()
        config = model.config.get_text_config()
        self.longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def capabilities(self) -> frozenset[str]:
        """Everything."""
        return frozenset({GENERATE, LOGLIKELIHOOD, FIRST_TOKEN})

    def params(self) -> dict[str, Any]:
        """Digest of the weights and what decides the numbers."""
        return {
            "backend": "local", "model": self._digest, "name": self.name, "chat": self.chat,
            "token_budget": self.token_budget,
        }  # fmt: skip

    @cached_property
    def _digest(self) -> str:
        from embkit import _rust
        from embkit.stage import digest_of

        if self._path is not None:
            return digest_of(self._path / self._gguf if self._gguf else self._path)
        parts = [
            f"{name} {_rust.blake3(tensor.detach().cpu().float().numpy().tobytes())}"
            for name, tensor in sorted(self.model.state_dict().items())
        ]
        return _rust.blake3("\n".join([*parts, self.tokenizer.backend_tokenizer.to_str()]).encode())

    # ------------------------------------------------------------ likelihood

    @torch.inference_mode()
    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See :class:`embkit.synth.LLM`. Special tokens in the texts are read as plain text."""
        out: list[Likelihood | None] = [None] * len(pairs)
        ids: dict[int, list[int]] = {}  # without the last token, which predicts nothing
        targets: dict[int, list[int]] = {}
        for i, (prompt, continuation) in enumerate(pairs):
            tokens, ends = self._encode(prompt + continuation)
            first = next((j for j, end in enumerate(ends) if end > len(prompt)), len(tokens))
            if first == len(tokens):
                out[i] = Likelihood(reason="empty")
            elif len(tokens) > self.longest:
                out[i] = Likelihood(reason="too_long", prompt_tokens=len(tokens))
            elif first == 0:
                out[i] = Likelihood(reason="empty")  # nothing to condition on
            else:
                ids[i], targets[i] = tokens[:-1], tokens[first:]
                self.usage.add(prompt=len(tokens))
            if i in ids:
                continue
            self.usage.add(reject=str(getattr(out[i], "reason", "")))
        prefix = self._prefix(ids.values())
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, tokens in ids.items():
            rows.setdefault(tuple(tokens[len(prefix) :]), []).append(i)
        shown = {row: max(len(targets[i]) for i in mine) for row, mine in rows.items()}
        past = self._past(prefix)
        grown = (
            trees(shown, min(self.token_budget, _TREE))
            if self._branches
            else [Tree(r, [r]) for r in shown]
        )
        for batch in self._batches(grown, shown):
            for row, logits in self._forward(batch, shown, past, len(prefix)):
                for i in rows[row]:
                    want = torch.tensor(targets[i], device=logits.device)
                    part = logits[len(logits) - len(want) :].float()
                    value = part.gather(1, want[:, None])[:, 0] - part.logsumexp(1)
                    out[i] = Likelihood(
                        value=float(value.double().sum()),
                        tokens=len(want),
                        prompt_tokens=len(prefix) + len(row) + 1,
                    )
        return [found or Likelihood(reason="empty") for found in out]

    def first_token(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float] | str]:
        """See :class:`embkit.synth.LLM`; here the likelihood of whole choices."""
        found = self.loglikelihood([(p, c) for p in prompts for c in choices])
        rows = [found[i : i + len(choices)] for i in range(0, len(found), len(choices))]
        return [
            next((one.reason for one in row if one.reason), None) or [one.value for one in row]
            for row in rows
        ]

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and the end of each in the text; a first token where the model has one."""
        found = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
            verbose=False,
        )  # fmt: skip
        ids, ends = list(found["input_ids"]), [end for _, end in found["offset_mapping"]]
        return ([self._begin, *ids], [0, *ends]) if self._begin is not None else (ids, ends)

    @cached_property
    def _begin(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        first = self.tokenizer("a")["input_ids"][:1]
        return bos if bos is not None and first == [bos] else None

    def _prefix(self, rows: Any) -> list[int]:
        """What all rows begin with; at least one token of each row is left."""
        rows = list(rows)
        if len(rows) < 2:
            return []
        low, high = min(rows), max(rows)  # the two that differ the earliest
        most = min(map(len, rows)) - 1
        same = 0
        while same < min(most, len(high)) and low[same] == high[same]:
            same += 1
        return low[:same]

    def _past(self, prefix: Sequence[int]) -> list[tuple[Any, Any]]:
        """Keys and values of the prefix, per layer [1, heads, P, d]."""
        from transformers import DynamicCache

        if not prefix:
            return []
        cache = DynamicCache()
        ids = torch.tensor([prefix], device=self.model.device)
        self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _cache(self, past: Sequence[tuple[Any, Any]], rows: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
        return cache

    @cached_property
    def _branches(self) -> bool:
        """Whether the model takes a mask of ours in all of its layers."""
        config = self.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        attention = getattr(config, "_attn_implementation", "")
        return kinds == {"full_attention"} and not window and attention in ("sdpa", "eager")

    def _batches(self, grown: list[Tree], shown: Mapping[Any, int]) -> Iterator[list[Tree]]:
        """Trees of like length, the longest first, within the token budget."""
        first = {id(tree): tree.first(shown) for tree in grown}
        grown.sort(key=lambda tree: (-tree.length, first[id(tree)], tree.rows))
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        batch: list[Tree] = []
        for tree in grown:
            longest = batch[0].length if batch else tree.length
            kept = longest - min(first[id(t)] for t in [*batch, tree])
            full = (len(batch) + 1) * longest > self.token_budget
            if batch and (full or (len(batch) + 1) * kept * vocabulary > _LOGITS):
                yield batch
                batch = []
            batch.append(tree)
        if batch:
            yield batch

    def _forward(
        self, batch: Sequence[Tree], shown: Mapping[Any, int],
        past: Sequence[tuple[Any, Any]], before: int,
    ) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:  # fmt: skip
        """Each row with the logits of its last positions, as many as ``shown`` says.

        Padding is on the right: a causal model does not see it.
        """
        device, longest = self.model.device, batch[0].length
        start = min(tree.first(shown) for tree in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        place = torch.arange(before, before + longest).repeat(len(batch), 1)
        for i, tree in enumerate(batch):
            ids[i, : tree.length] = torch.tensor(tree.tokens)
            place[i, : tree.length] = before + torch.tensor(tree.places)
        mask = None
        if any(len(tree.rows) > 1 for tree in batch):
            seen = torch.ones(len(batch), longest, before + longest, dtype=torch.bool)
            seen[:, :, before:] = torch.stack([tree.seen(longest) for tree in batch])
            mask = torch.zeros(seen.shape, dtype=self.model.dtype).masked_fill_(~seen, -math.inf)
            mask = mask[:, None].to(device)
        cache = self._cache(past, len(batch)) if before else None
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=place.to(device) if mask is not None else place[:1].to(device),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=longest - start,
        ).logits
        self.usage.add(requests=1)
        for tree, found in zip(batch, logits, strict=True):
            for row, at in zip(tree.rows, tree.ends(), strict=True):
                index = tree.index(row, at)[len(row) - shown[row] :]
                yield row, found[torch.tensor(index, device=device) - start]

    # ------------------------------------------------------------ generation

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        schema: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """See :class:`embkit.synth.LLM`; a schema is not enforced.

        An answer that has one ends with its first whole JSON object.
        """
        ids = [self._chat(prompt) for prompt in prompts]
        out = [Completion(reason="too_long", prompt_tokens=len(row)) for row in ids]
        fits = [i for i, row in enumerate(ids) if len(row) + max_tokens <= self.longest]
        self.usage.add(prompt=sum(len(ids[i]) for i in fits))
        prefix = self._prefix([ids[i] for i in fits])
        past = self._past(prefix)
        order = sorted(fits, key=lambda i: (-len(ids[i]), i))
        while order:
            longest = len(ids[order[0]]) - len(prefix) + max_tokens
            size = max(1, self.token_budget // longest)
            batch, order = order[:size], order[size:]
            rows = [ids[i][len(prefix) :] for i in batch]
            drawn = [int(seeds[i]) if seeds is not None else 0 for i in batch]
            texts = self._decode(
                rows,
                past,
                len(prefix),
                max_tokens,
                temperature,
                drawn,
                json=(schema or {}).get("type") == "object",
                stop=stop,
            )
            for i, (tokens, ended) in zip(batch, texts, strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                text = text[: _first(text, stop)]
                self.usage.add(completion=len(tokens))
                out[i] = Completion(
                    text=text, reason="" if text.strip() else "empty", cut=not ended,
                    prompt_tokens=len(ids[i]), completion_tokens=len(tokens),
                )  # fmt: skip
        for found in out:
            if found.reason:
                self.usage.add(reject=found.reason)
        return out

    def _chat(self, prompt: str) -> list[int]:
        """Token ids of a prompt: special tokens are those of the template, none of the prompt."""
        if not self.chat:
            return self._encode(prompt)[0]
        before, _, behind = self._template.partition(_SLOT)
        parts = (self.tokenizer(before, add_special_tokens=False)["input_ids"],
                 self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True,
                                verbose=False)["input_ids"],
                 self.tokenizer(behind, add_special_tokens=False)["input_ids"])  # fmt: skip
        return [token for part in parts for token in part]

    @cached_property
    def _template(self) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": _SLOT}], tokenize=False, add_generation_prompt=True
        )
        return text

    @cached_property
    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        found = set(ends if isinstance(ends, (list, tuple)) else [ends])
        return {token for token in (*found, self.tokenizer.eos_token_id) if token is not None}

    def _decode(
        self, rows: Sequence[Sequence[int]], past: Sequence[tuple[Any, Any]], before: int,
        max_tokens: int, temperature: float, seeds: Sequence[int], json: bool, stop: Sequence[str],
    ) -> list[tuple[list[int], bool]]:  # fmt: skip
        """Continue rows; each with the tokens up to its end, and whether it ended."""
        n, longest = len(rows), max(map(len, rows))
        device = self.model.device
        ids = torch.zeros(n, longest, dtype=torch.long)
        mask = torch.ones(n, before + longest, dtype=torch.long)
        for i, row in enumerate(rows):  # the ends in one column: padding between prefix and row
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, before : before + longest - len(row)] = 0
        ids, mask = ids.to(device), mask.to(device)
        place = mask.cumsum(1)[:, -longest:] - 1
        place = place.clamp(min=0)
        cache = self._cache(past, n)
        draws = [np.random.default_rng(seed) for seed in seeds]
        found: list[list[int]] = [[] for _ in rows]
        ended = [False] * n
        for _ in range(max_tokens):
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
            self.usage.add(requests=1)
            tokens = _pick(logits.double().cpu(), temperature, draws)
            for i, token in enumerate(tokens):
                ended[i] = ended[i] or token in self._ends
                if not ended[i]:
                    found[i].append(token)
                    piece = self.tokenizer.decode([token])
                    if json and "}" in piece:
                        ended[i] = has_object(self.tokenizer.decode(found[i]))
                    if any(mark[-1] in piece for mark in stop):
                        ended[i] = _first(self.tokenizer.decode(found[i]), stop) is not None
            if all(ended):
                break
            ids = torch.tensor(tokens, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(n, 1)], 1)
            place = place[:, -1:] + 1
        return list(zip(found, ended, strict=True))


def _first(text: str, marks: Sequence[str]) -> int | None:
    """Where the first of some marks begins in a text, if one does."""
    return min((at for mark in marks if (at := text.find(mark)) >= 0), default=None)


def has_object(text: str) -> bool:
    """Whether a text has a whole JSON object from its first brace on."""
    start = text.find("{")
    try:
        return start >= 0 and isinstance(JSONDecoder().raw_decode(text, start)[0], dict)
    except ValueError:
        return False


class Tree:
    """Rows that begin alike as one row of the model: what they share, then the rest of each.

    Args:
        shared: tokens that all begin with.
        rows: distinct token rows.
    """

    def __init__(self, shared: Sequence[int], rows: list[tuple[int, ...]]) -> None:
        self.stem, self.rows = len(shared), rows
        self.tokens = [*shared, *(token for row in rows for token in row[self.stem :])]
        self.places = [*range(self.stem), *(j for r in rows for j in range(self.stem, len(r)))]
        self.length = len(self.tokens)

    def ends(self) -> list[int]:
        """Where the own part of each row begins."""
        sizes = [len(row) - self.stem for row in self.rows]
        return [self.stem + sum(sizes[:i]) for i in range(len(sizes))]

    def index(self, row: tuple[int, ...], at: int) -> list[int]:
        """Places of a row's tokens, its own part beginning at ``at``."""
        return [*range(self.stem), *range(at, at + len(row) - self.stem)]

    def first(self, shown: Mapping[Any, int]) -> int:
        """The first place whose logits are asked for."""
        return min(
            self.index(row, at)[len(row) - shown[row]]
            for row, at in zip(self.rows, self.ends(), strict=True)
        )

    def seen(self, longest: int) -> torch.Tensor:
        """Which place [longest] sees which: earlier ones of its row; bool [longest, longest]."""
        owner = torch.full((longest,), -1)
        for i, (row, at) in enumerate(zip(self.rows, self.ends(), strict=True)):
            owner[at : at + len(row) - self.stem] = i
        owner[self.length :] = len(self.rows)  # padding sees padding
        same = (owner[:, None] == owner[None]) | (torch.arange(longest) < self.stem)[None]
        return same.tril()


def trees(rows: Iterable[tuple[int, ...]], most: int) -> list[Tree]:
    """Group rows so that what neighbours in their sorted order share is computed once.

    A row joins while that saves tokens, up to ``most`` tokens in a tree.
    """
    out: list[Tree] = []
    group: list[tuple[int, ...]] = []
    same = total = 0  # tokens that the group shares, and tokens of its tree
    for row in sorted(rows):
        if group:
            both = 0
            for a, b in zip(group[-1][: same or None] if len(group) > 1 else group[0], row):  # noqa: B905
                if a != b:
                    break
                both += 1
            size = total + (len(group) - 1) * (same - both) + len(row) - both
            joins = both * len(group) > same * (len(group) - 1) and size <= most
            if joins and both >= _SHARED:
                group.append(row)
                same, total = both, size
                continue
            out.append(Tree(group[0][:same], group))
        group, same, total = [row], len(row), len(row)
    if group:
        out.append(Tree(group[0][:same], group))
    return out


def _pick(logits: torch.Tensor, temperature: float, draws: Sequence[Any]) -> list[int]:
    """One token per row: the likeliest, or drawn by the row's own generator."""
    if temperature <= 0 or not math.isfinite(temperature):
        return [int(token) for token in logits.argmax(1)]
    sums = torch.softmax(logits / temperature, 1).cumsum(1).numpy()
    return [
        min(int(np.searchsorted(row, draw.random() * row[-1], side="right")), len(row) - 1)
        for row, draw in zip(sums, draws, strict=True)
    ]
