"""Changes to a transformers backbone: bidirectional attention, the bottom layers only, positions.

Everything here ends up in the backbone's own config, so that transformers builds the same model
from an export without embkit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embkit.errors import UsageError

_OFFSET = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")
_OWN_FLAG = ("gemma3_text",)  # use_bidirectional_attention, which other servers know too


def is_causal(backbone: Any) -> bool:
    """Whether tokens are kept from seeing later ones."""
    config = backbone.config
    said = getattr(config, "is_causal", None)
    if said is not None:
        return bool(said)
    if getattr(config, "use_bidirectional_attention", False):
        return False
    return any(getattr(module, "is_causal", False) is True for module in backbone.modules())


def make_bidirectional(backbone: Any) -> None:
    """Let every token see every other; a model that does so already is left alone.

    Sets ``is_causal = false`` in the config, which transformers' masks and attention follow, or the
    flag that the family has of its own (Gemma 3, whose window then counts both sides together).

    Raises:
        UsageError: the installed transformers, or the family, does not follow it.
    """
    if not is_causal(backbone):
        return
    config = backbone.config
    if getattr(config, "model_type", "") in _OWN_FLAG:
        config.use_bidirectional_attention = True
        config.sliding_window = config.sliding_window // 2 + 1  # as the config does when it is read
        for module in backbone.modules():
            if getattr(module, "is_causal", None) is True:
                module.is_causal = False
                if module.sliding_window is not None:
                    module.sliding_window = config.sliding_window
    else:
        config.is_causal = False
    if not sees_later_tokens(backbone):
        import transformers

        raise UsageError(
            f"transformers {transformers.__version__} keeps {type(backbone).__name__} causal.",
            where="bidirectional",
            fix="upgrade transformers (5.17 is tested), or choose another model family",
        )


def sees_later_tokens(backbone: Any) -> bool:
    """Whether the first token's state changes with the last token: the proof of the switch."""
    table = backbone.get_input_embeddings()
    was = backbone.training
    backbone.eval()
    try:
        with torch.inference_mode():
            ids = torch.tensor([[5, 6, 7], [5, 6, 8]], device=table.weight.device)
            ids %= table.num_embeddings
            mask = torch.ones_like(ids)
            states = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0].float()
    finally:
        backbone.train(was)
    return bool((states[0] != states[1]).any())


def blocks(backbone: Any) -> nn.ModuleList:
    """The transformer blocks, bottom first.

    Raises:
        UsageError: none found.
    """
    count = int(backbone.config.num_hidden_layers)
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UsageError(
        f"{type(backbone).__name__} has no list of {count} blocks.",
        fix="leave keep_layers, freeze = layers:K and layer_lr_decay out with this model",
    )


def keep_layers(backbone: Any, count: int) -> None:
    """Cut the model to its bottom ``count`` blocks; its final norm stays.

    Raises:
        UsageError: the model has fewer.
    """
    found = blocks(backbone)
    if not 1 <= count <= len(found):
        raise UsageError(
            f"keep_layers = {count}, and the model has {len(found)} blocks.",
            where="keep_layers",
            fix=f"give 1 to {len(found)}, or 0 for all",
        )
    del found[count:]
    config = backbone.config
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(config.layer_types)[:count]


def position_offset(backbone: Any) -> int:
    """Position of a text's first token: RoBERTa's start after the padding index."""
    config = backbone.config
    if getattr(config, "model_type", "") in _OFFSET:
        return int(config.pad_token_id) + 1
    return 0


def positions(backbone: Any) -> int:
    """Longest input the position table allows."""
    limit = int(getattr(backbone.config, "max_position_embeddings", 512) or 512)
    return limit - position_offset(backbone)
