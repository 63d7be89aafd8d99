"""config.json of an export, for every reader: transformers 4 and 5, TEI and vLLM.

transformers 5 moved and renamed keys, and an older reader that does not find its own takes a
default without a word: a wrong rotary base gives other embeddings and no error. So both forms are
written wherever there are two.
"""

from __future__ import annotations

import json
from typing import Any

from embkit.model.attention import caps_scores
from embkit.model.encoder import Encoder

# Families whose config decides the direction by a flag of its own alone.
OWN_FLAG = ("gemma3_text",)
# The first transformers that follow is_causal = false, and that flag; those before run the model
# causally without a word (tests/model/test_export_matrix.py).
BIDIRECTIONAL_SINCE, OWN_FLAG_SINCE = "5.2", "4.57"


def portable_config(encoder: Encoder) -> dict[str, Any]:
    """The content of config.json."""
    config = encoder.backbone.config
    out = {**json.loads(config.to_json_string(use_diff=False)), "dtype": "float32"}
    out.pop("_name_or_path", None)  # a path of this machine
    out["torch_dtype"] = "float32"  # the key that transformers 4 reads
    if caps_scores(config):  # by default transformers takes SDPA, which has no cap
        out["attn_implementation"] = "eager"
    out["architectures"] = [type(encoder.backbone).__name__]
    out |= _rope(out)
    if is_converted(encoder) and out.get("model_type") not in OWN_FLAG:
        # is_causal is for transformers and vLLM, the other for TEI (Llama, Mistral, Qwen3).
        out |= {"is_causal": False, "use_bidirectional_attention": True}
    out.pop("matryoshka_dimensions", None)
    if len(encoder.dims) > 1:  # vLLM takes a request's `dimensions` only when they are listed here
        out["matryoshka_dimensions"] = sorted(encoder.dims)
    return out


def is_converted(encoder: Encoder) -> bool:
    """Whether a language model was turned into an encoder that looks both ways."""
    return "bidirectional" in encoder.beyond_weights()


def needed_transformers(encoder: Encoder) -> str:
    """The oldest transformers that computes a converted model as it was trained; else ``""``."""
    if not is_converted(encoder):
        return ""
    own = getattr(encoder.backbone.config, "model_type", "") in OWN_FLAG
    return OWN_FLAG_SINCE if own else BIDIRECTIONAL_SINCE


def _rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions by their names before transformers 5; {} for a model without."""
    rope = settings.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    if "full_attention" not in rope and "sliding_attention" not in rope:
        return {"rope_theta": rope.get("rope_theta"), "rope_scaling": _scaling(rope)}
    whole, near = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if settings.get("model_type") == "modernbert":
        out = {
            "global_rope_theta": whole.get("rope_theta"), "local_rope_theta": near.get("rope_theta")
        }  # fmt: skip
        kinds = settings.get("layer_types") or []
        for n in range(1, len(kinds) + 1):
            every = [("sliding" if i % n else "full") + "_attention" for i in range(len(kinds))]
            if every == kinds:
                return out | {"global_attn_every_n_layers": n}
        return out
    return {
        "rope_theta": whole.get("rope_theta"),
        "rope_local_base_freq": near.get("rope_theta"),
        "rope_scaling": _scaling(whole),
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    if rope.get("rope_type", "default") == "default":
        return None
    return {k: v for k, v in rope.items() if k != "rope_theta"}
