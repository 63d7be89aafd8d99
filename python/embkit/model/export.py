"""Export in the sentence-transformers LEGACY layout, which every reader of the field understands.

Module types are the ``sentence_transformers.models.*`` names: sentence-transformers 3.4 to 6, TEI
and vLLM all load them, while the layout that version 6 writes is refused or silently cut short by
the others. The projection is a Dense module with Identity, spelled out because Dense's own default
is Tanh.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embkit import _rust
from embkit.errors import EmbkitError, UsageError
from embkit.model import card as cards
from embkit.model.card import Card
from embkit.model.encoder import Encoder
from embkit.model.load import quiet
from embkit.model.portable import portable_config
from embkit.model.projection import dense_layers
from embkit.model.tuning import merged_state

_TYPE = "sentence_transformers.models"
# Our names of prompts -> those that sentence-transformers and MTEB look for.
_PROMPT_NAMES = {"passage": "document", "sts": "STS", "classification": "Classification"}
_LAYOUT = "3.4.1"  # the oldest sentence-transformers this layout is tested with


def export(
    encoder: Encoder,
    path: Path | str,
    *,
    name: str | None = None,
    card: Card | None = None,
    onnx: bool = False,
    int8: bool = False,
) -> Path:
    """Write a model directory, whole or not at all.

    Args:
        encoder: what to write, in fp32.
        path: the directory; one that embkit wrote before is replaced as one step.
        name: title of the model card, and what its snippets load: a hub id, say (default: the
            directory's name).
        card: what the card says of data, scores and soup.
        onnx: write ``onnx/model.onnx`` too (needs ``embkit[onnx]``); int8: and one of 8-bit
            weights, ``onnx/model_qint8.onnx``.

    Returns:
        The directory.

    Raises:
        UsageError: the path exists and is no model directory, or ONNX without its extra.
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
        graphs = _graphs(encoder, int8=int8) if onnx or int8 else {}
        readme = cards.write(encoder, name or out.name, card or Card(), onnx=list(graphs)).encode()
        for file, data in {**_files(encoder), **graphs, "README.md": readme}.items():
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


def _files(encoder: Encoder) -> dict[str, bytes]:
    """Every file of the directory but its card, by name."""
    hidden = int(encoder.backbone.config.hidden_size)
    settings = portable_config(encoder)
    length = max(encoder.max_length.values())
    tokenizer = {**encoder.tokenizer.config, "model_max_length": length}
    # Older readers pass on whatever the tokenizer gives, and a model may not take token types.
    if "token_type_ids" not in inspect.signature(encoder.backbone.forward).parameters:
        tokenizer["model_input_names"] = ["input_ids", "attention_mask"]
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    dense = {f"{2 + i}_Dense": layer for i, layer in enumerate(dense_layers(encoder.projection))}
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
    }
    for folder, (layer, activation) in dense.items():
        about = {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
            "activation_function": activation,
        }
        files[f"{folder}/config.json"] = _json(about)
        weights = {f"linear.{name}": value for name, value in layer.state_dict().items()}
        files[f"{folder}/model.safetensors"] = _safetensors(weights)
    return files


def _graphs(encoder: Encoder, *, int8: bool) -> dict[str, bytes]:
    """ONNX files by name: written elsewhere first, for their writers do not flush to the disk."""
    from embkit.model.onnx import write_onnx

    with tempfile.TemporaryDirectory() as scratch:
        names = write_onnx(encoder, Path(scratch), int8=int8)
        return {name: (Path(scratch) / name).read_bytes() for name in names}


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
