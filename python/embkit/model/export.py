"""Export in the sentence-transformers LEGACY layout, which every reader of the field understands.

Module types are the ``sentence_transformers.models.*`` names: sentence-transformers 3.4 to 6, TEI
and vLLM all load them, while the layout that version 6 writes is refused or silently cut short by
the others. The projection is a Dense module with Identity, spelled out because Dense's own default
is Tanh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import embkit
from embkit import _rust
from embkit.errors import EmbkitError, UsageError
from embkit.model.attention import caps_scores
from embkit.model.encoder import Encoder
from embkit.model.load import quiet
from embkit.model.projection import linears
from embkit.model.tuning import merged_state

_TYPE = "sentence_transformers.models"
# Our names of prompts -> those that sentence-transformers and MTEB look for.
_PROMPT_NAMES = {"passage": "document", "sts": "STS", "classification": "Classification"}
_LAYOUT = "3.4.1"  # the oldest sentence-transformers this layout is tested with


def export(encoder: Encoder, path: Path | str, *, name: str | None = None) -> Path:
    """Write a model directory, whole or not at all.

    Args:
        encoder: what to write, in fp32.
        path: the directory; one that embkit wrote before is replaced as one step.
        name: title of the model card (default: the directory's name).

    Returns:
        The directory.

    Raises:
        UsageError: the path exists and is no model directory.
    """
    out = Path(path)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_model(out))):
        raise UsageError(
            "The export path exists and is no model directory.",
            where=out,
            fix="choose another directory, or empty this one",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    _rust.sweep_tmp(str(out.parent))  # of exports that were killed
    work = Path(_rust.temp_path(str(out)))
    work.mkdir()
    try:
        for file, data in _files(encoder, name or out.name).items():
            (work / file).parent.mkdir(exist_ok=True)
            _rust.publish_file(str(work / file), data)
        _rust.publish_dir(str(work), str(out))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def check_export(encoder: Encoder, path: Path | str, texts: Sequence[str]) -> float | None:
    """Largest difference between ``encoder.encode`` and SentenceTransformer on the same batch.

    Both get the same texts with the passage prompt, normalised, in fp32.

    Returns:
        max |difference|, or None when sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return None
    with quiet():
        other = SentenceTransformer(str(path), device="cpu", truncate_dim=encoder.width)
    prompt = encoder.prompts["passage"]
    longest = len(texts) * max(encoder.max_length.values())
    theirs = other.encode(
        list(texts),
        prompt=prompt or None,
        batch_size=max(len(texts), 1),
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    ours = encoder.encode(texts, prompt=prompt, token_budget=longest)
    if theirs.shape != ours.shape:
        raise EmbkitError(
            f"SentenceTransformer gives {theirs.shape}, embkit {ours.shape}.", where=path
        )
    return float(np.abs(theirs.astype(np.float64) - ours).max(initial=0.0))


def _files(encoder: Encoder, title: str) -> dict[str, bytes]:
    """Every file of the directory, by name."""
    config = encoder.backbone.config
    hidden = int(config.hidden_size)
    length = max(encoder.max_length.values())
    settings = {**json.loads(config.to_json_string(use_diff=False)), "dtype": "float32"}
    settings.pop("_name_or_path", None)  # a path of this machine
    settings["torch_dtype"] = "float32"  # the key that transformers 4 reads
    if caps_scores(config):  # by default transformers takes SDPA, which has no cap
        settings["attn_implementation"] = "eager"
    settings["architectures"] = [type(encoder.backbone).__name__]
    tokenizer = {**encoder.tokenizer.config, "model_max_length": length}
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    dense = {f"{2 + i}_Dense": layer for i, layer in enumerate(linears(encoder.projection))}
    modules += [(folder, "Dense") for folder in dense]
    modules.append((f"{max(2 + len(dense), 3)}_Normalize", "Normalize"))
    files = {
        "config.json": _json(settings),
        "model.safetensors": _safetensors(_with_pooler(encoder)),
        "tokenizer.json": encoder.tokenizer.json.encode(),
        "tokenizer_config.json": _json(tokenizer),
        "modules.json": _json(
            [
                {"idx": i, "name": str(i), "path": where, "type": f"{_TYPE}.{kind}"}
                for i, (where, kind) in enumerate(modules)
            ]
        ),
        "sentence_bert_config.json": _json({"max_seq_length": length, "do_lower_case": False}),
        "1_Pooling/config.json": _json(_pooling(encoder, hidden)),
        "config_sentence_transformers.json": _json(
            {
                "__version__": {
                    "sentence_transformers": _LAYOUT,
                    "transformers": str(settings.get("transformers_version", "")),
                    "pytorch": torch.__version__.partition("+")[0],
                },
                "prompts": {
                    _PROMPT_NAMES.get(name, name): text for name, text in encoder.prompts.items()
                },
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            }
        ),
        "embkit.json": _json(
            {
                "format": "embkit.model",
                "version": 2 if encoder.opening < 1 else 1,
                "dims": list(encoder.dims),
                "pooling": encoder.pooling,
                "include_prompt": encoder.include_prompt,
                "prompts": encoder.prompts,
                "max_length": encoder.max_length,
                "digest": encoder.digest(),
                **encoder.beyond_weights(),
            }
        ),
        "README.md": _card(encoder, title).encode(),
    }
    for folder, layer in dense.items():
        about = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
        }
        files[f"{folder}/config.json"] = _json(about)
        files[f"{folder}/model.safetensors"] = _safetensors({"linear.weight": layer.weight})
    return files


def _pooling(encoder: Encoder, hidden: int) -> dict[str, Any]:
    """Only the legacy keys: a file with both key sets breaks sentence-transformers up to 5.3."""
    return {
        "word_embedding_dimension": hidden,
        "pooling_mode_cls_token": encoder.pooling == "cls",
        "pooling_mode_mean_tokens": encoder.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": encoder.pooling == "last",
        "include_prompt": encoder.include_prompt,
    }


def _with_pooler(encoder: Encoder) -> dict[str, torch.Tensor]:
    """The backbone's weights, with an identity for BERT's unused tanh pooler.

    AutoModel builds the pooler anyway; without weights for it transformers draws random ones and
    warns about it each time a user loads the model.
    """
    weights = merged_state(encoder.backbone)
    if getattr(encoder.backbone.config, "model_type", "") in ("bert", "roberta", "xlm-roberta"):
        hidden = int(encoder.backbone.config.hidden_size)
        weights.setdefault("pooler.dense.weight", torch.eye(hidden))
        weights.setdefault("pooler.dense.bias", torch.zeros(hidden))
    return weights


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    plain = {k: v.detach().cpu().float().contiguous() for k, v in tensors.items()}
    return bytes(save(plain, metadata={"format": "pt"}))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "modules.json").is_file()


def _card(encoder: Encoder, title: str) -> str:
    widths = ", ".join(str(d) for d in encoder.dims)
    length = max(encoder.max_length.values())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- embkit
---

# {title}

A text-embedding model trained with embkit {embkit.__version__}. It maps texts to unit vectors of
width {encoder.width}; the first {widths} numbers are embeddings of their own (Matryoshka), to be
normalised again after the cut.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{title}", truncate_dim={encoder.dims[-1]})
embeddings = model.encode(["a text", "another text"], normalize_embeddings=True)
```

- Pooling: {encoder.pooling}; projection: {_head(encoder)}
- Longest text: {length} tokens (queries were trained with {encoder.max_length["query"]})
- Prompts: query {encoder.prompts["query"]!r}, passage {encoder.prompts["passage"]!r}
- Similarity: cosine
{_attention_note(encoder)}"""


def _head(encoder: Encoder) -> str:
    layers = linears(encoder.projection)
    widths = [layer.out_features for layer in layers]
    if len(layers) > 1:
        return f"{len(layers)} linear layers, {' -> '.join(map(str, widths))}"
    return "linear" if layers else "none"


def _attention_note(encoder: Encoder) -> str:
    """What the reader of a converted language model has to know."""
    import transformers

    if encoder.opening < 1:
        return f"""
## Attention

Unfinished: the soft mask of this model is {encoder.opening:.0%} open. Only embkit computes it;
sentence-transformers would let every token see every other.
"""
    if "bidirectional" not in encoder.beyond_weights():
        return ""
    flag = "use_bidirectional_attention" if _own_flag(encoder) else "is_causal"
    value = "true" if _own_flag(encoder) else "false"
    return f"""
## Attention

Bidirectional: a language model was turned into an encoder. `config.json` says so by
`"{flag}": {value}`. transformers {transformers.__version__}, with which this was exported, follows
it; a library that does not know the key runs the model with causal attention and gives other
embeddings, without an error. To be sure, embed two texts that differ in the last word alone and
compare the states of their first token: they must differ.
"""


def _own_flag(encoder: Encoder) -> bool:
    return bool(getattr(encoder.backbone.config, "use_bidirectional_attention", False))
