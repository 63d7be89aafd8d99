"""A tiny random backbone of each model family, with weights large enough to tell states apart, and
a tokenizer of 60 words for them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

VOCAB = 66  # of the conftest's tokenizer
ENCODERS = ("bert", "xlm-roberta", "modernbert", "eurobert")
DECODERS = (
    "llama", "smollm3", "mistral", "ministral", "qwen2", "qwen2-window", "qwen3", "gemma", "gemma2",
    "gemma3",
)  # fmt: skip
FAMILIES = (*ENCODERS, *DECODERS)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def word_tokenizer() -> Tokenizer:
    """Whole words w0 to w59, lower-cased, [CLS] and [SEP] around them."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(60)), ":"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def backbone(family: str, *, layers: int = 2, **changes: Any) -> Any:
    """The bare model of a family, in evaluation mode."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
    grouped = {**common, "num_key_value_heads": 2}
    mixed = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    narrow = {"sliding_window": 4, "layer_types": mixed}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "bert": ("Bert", common),
        "xlm-roberta": ("XLMRoberta", {**common, "pad_token_id": 1}),
        "modernbert": ("ModernBert", {
            **common, "local_attention": 6, "layer_types": mixed, "cls_token_id": 2,
            "sep_token_id": 3,
        }),
        "eurobert": ("EuroBert", {**grouped, "mask_token_id": 4}),
        "llama": ("Llama", grouped),
        "smollm3": ("SmolLM3", grouped),
        "mistral": ("Mistral", {**grouped, "sliding_window": 4}),
        "ministral": ("Ministral", {**grouped, **narrow, "head_dim": 8}),
        "qwen2": ("Qwen2", grouped),
        "qwen2-window": ("Qwen2", {**grouped, **narrow, "use_sliding_window": True}),
        "qwen3": ("Qwen3", {**grouped, "head_dim": 8}),
        "gemma": ("Gemma", {**grouped, "head_dim": 8}),
        "gemma2": ("Gemma2", {
            **grouped, **narrow, "head_dim": 8, "query_pre_attn_scalar": 8,
        }),
        "gemma3": ("Gemma3Text", {
            **grouped, **narrow, "head_dim": 8, "query_pre_attn_scalar": 8,
        }),
    }  # fmt: skip
    name, settings = kinds[family]
    config = getattr(hf, f"{name}Config")(**{**settings, **changes})
    options = {"add_pooling_layer": False} if family in ("bert", "xlm-roberta") else {}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = getattr(hf, f"{name}Model")(config, **options)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.35)
    return model.eval()
