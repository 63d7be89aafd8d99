"""Directories of sentence-transformers, in the legacy layout and in that of version 6.

Both are a list of modules with a folder each. The newer one has longer type names, other keys for
the pooling, leaves out defaults, and keeps the longest text with the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from embkit.errors import CorruptError, UsageError
from embkit.model.projection import ACTIVATIONS, IDENTITY
from embkit.model.tokens import read_json

_LEGACY_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_NEW_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
# Names of prompts as others have them -> ours.
_PROMPTS = {"document": "passage", "STS": "sts", "Classification": "classification"}
_NO_LIMIT = 10**6  # transformers writes 1e30 for a tokenizer without one
_WHY = {
    "Dropout": "it has no effect when texts are encoded: take it out of modules.json, and set the "
    "dropout of training by `dropout`",
    "LayerNorm": "embkit's projection has no norm; a new head on the same transformer: give the "
    "transformer's own directory, and new_head = true",
}


def body(folder: Path) -> Path:
    """Where the transformer is: the directory itself, or a folder of it in old models."""
    listing = folder / "modules.json"
    if (folder / "config.json").is_file() or not listing.is_file():
        return folder
    modules = read_list(listing)
    return folder / str(modules[0].get("path", "")) if modules else folder


def read(folder: Path) -> dict[str, Any]:
    """Pooling, projection, prompts and length from a sentence-transformers directory.

    Raises:
        UsageError: a module, pooling or order that an Encoder does not have. CorruptError: a file
            that is missing or damaged.
    """
    out: dict[str, Any] = {}
    listing = folder / "modules.json"
    if not listing.is_file():
        return out
    kinds: list[str] = []
    for module in read_list(listing):
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        where = folder / str(module.get("path", ""))
        if kind == "Pooling":
            out |= _pooling(where / "config.json")
        elif kind == "Dense":
            out.setdefault("projection", []).extend(_dense(where))
        elif kind not in ("Transformer", "Normalize"):
            raise UsageError(
                f"An Encoder has no module {kind}.",
                where=listing,
                fix=_WHY.get(kind, "embkit reads Transformer, Pooling, Dense and Normalize"),
            )
        kinds.append(kind)
    order = [k for k in kinds if k != "Dense"]
    if (
        order not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        or ("Dense" in kinds and kinds.index("Dense") < 2)
        or ("Normalize" in kinds and kinds[-1] != "Normalize")
    ):
        raise UsageError(
            f"The modules come in another order than an Encoder has: {' -> '.join(kinds)}.",
            where=listing,
            fix="embkit reads Transformer -> Pooling -> Dense ... -> Normalize",
        )
    return out | _text_settings(folder)


def _text_settings(folder: Path) -> dict[str, Any]:
    """What decides the tokens of a text."""
    out: dict[str, Any] = {}
    place = body(folder)
    settings = place / "sentence_bert_config.json"
    given = read_json(settings) if settings.is_file() else {}
    length = given.get("max_seq_length")
    if not length and (file := place / "tokenizer_config.json").is_file():
        longest = read_json(file).get("model_max_length")
        length = longest if isinstance(longest, int | float) and longest < _NO_LIMIT else None
    if length:
        out["max_length"] = {"query": int(length), "passage": int(length)}
    out["lower_case"] = bool(given.get("do_lower_case"))
    described = folder / "config_sentence_transformers.json"
    if described.is_file():
        prompts = read_json(described).get("prompts") or {}
        ours = {_PROMPTS.get(name, name): str(text) for name, text in prompts.items()}
        # Both names may be there, and one of them empty.
        ours["passage"] = prompts.get("passage") or prompts.get("document") or ""
        out["prompts"] = {"query": "", **ours}
    return out


def _pooling(path: Path) -> dict[str, Any]:
    config = read_json(path)
    modes = [k for k, v in config.items() if k.startswith("pooling_mode_") and v]
    said = config.get("pooling_mode")
    if said is not None:
        modes = [said] if isinstance(said, str) else list(said)
    names = [_LEGACY_POOLING.get(m) or _NEW_POOLING.get(m) for m in modes]
    if len(names) != 1 or names[0] is None:
        shown = ", ".join(m.removeprefix("pooling_mode_") for m in modes) or "none"
        raise UsageError(
            f"The pooling of this model is {shown}; an Encoder has mean, cls or last token alone.",
            where=path,
            fix="pass pooling=... to train the transformer with another: give its own directory",
        )
    return {"pooling": names[0], "include_prompt": bool(config.get("include_prompt", True))}


def _dense(folder: Path) -> list[nn.Module]:
    """The layer of a Dense module, and its activation if it has one."""
    from safetensors.torch import load_file

    path = folder / "config.json"
    config = read_json(path)
    # Its own defaults are a bias and a tanh.
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation != IDENTITY and activation not in ACTIVATIONS:
        known = ", ".join(name.rsplit(".", 1)[-1] for name in (IDENTITY, *ACTIVATIONS))
        raise UsageError(f"The Dense module has {activation}; embkit reads {known}.", where=path)
    inside = config.get("module_input_name", "sentence_embedding")
    if config.get("use_residual") or inside != "sentence_embedding":
        raise UsageError("The Dense module is residual, or of single tokens.", where=path)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pickle = (folder / "pytorch_model.bin").is_file()
        raise CorruptError(
            "The projection has no model.safetensors."
            + (" Its weights are a pickle, which embkit does not load." if pickle else ""),
            where=folder,
            fix="convert once: SentenceTransformer(DIR).save(DIR)" if pickle else "copy it again",
        )
    try:
        found = load_file(weights)
        values = {"weight": found["linear.weight"].float()}
        if config.get("bias", True):
            values["bias"] = found["linear.bias"].float()
    except Exception as error:
        raise CorruptError(
            f"The projection cannot be read: {error}", where=weights, fix="copy the model again"
        ) from error
    layer = nn.Linear(
        int(config["in_features"]), int(config["out_features"]), bias="bias" in values
    )
    for name, value in values.items():
        own = layer.get_parameter(name)
        if own.shape != value.shape:
            raise CorruptError(
                f"The projection's {name} is {list(value.shape)}, its config says "
                f"{list(own.shape)}.",
                where=weights,
                fix="copy the model again",
            )
        own.data.copy_(value)
    return [layer] if activation == IDENTITY else [layer, ACTIVATIONS[activation]()]


def read_list(path: Path) -> list[dict[str, Any]]:
    """A JSON list of objects from a file: modules.json."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptError(f"Not JSON: {error}", where=path, fix="copy it again") from error
    if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
        raise CorruptError("Expected a list of modules.", where=path, fix="copy it again")
    return value
