"""A causal language model of random weights and a byte-level tokenizer with special tokens."""

from __future__ import annotations

from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_lm(*, longest: int = 4096) -> tuple[Any, Any]:
    """Model and tokenizer; two layers, grouped heads, as the small Llamas have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters)}
    merges = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("i", "n"), ("a", "t")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    made = Tokenizer(models.BPE(vocab, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=longest,
        initializer_range=0.25, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@torch.inference_mode()
def direct(model: Any, tokenizer: Any, text: str) -> tuple[list[str], list[Any], list[int]]:
    """Tokens of a text, the log-probability of each (None for the first) and where each starts.

    One forward over the whole text, nothing shared: what ``Local`` must agree with.
    """
    found = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ids = found["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
    values = [float(logs[i, token]) for i, token in enumerate(ids[1:])]
    spans = found["offset_mapping"]
    return [text[a:b] for a, b in spans], [None, *values], [a for a, _ in spans]


@torch.inference_mode()
def echo_with_best(model: Any, tokenizer: Any, text: str, before: int) -> dict[str, Any]:
    """Echoed log-probabilities with the likeliest ASCII letters of each place.

    ``before`` 1 takes a token's value from the token before it; 0 from itself, which is wrong.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    logs = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
    plain = [t for t in range(len(tokenizer)) if tokenizer.decode([t]).strip().isalpha()]
    plain = [t for t in plain if tokenizer.decode([t]).isascii()]
    values: list[Any] = []
    tops: list[Any] = []
    for i, token in enumerate(ids):
        row = logs[i - before]
        best = max(plain, key=lambda token: float(row[token]))
        values.append(float(row[token]) if i else None)
        tops.append({tokenizer.decode([best]): float(row[best])} if i else None)
    spans = found["offset_mapping"]
    return {
        "tokens": [text[a:b] for a, b in spans], "token_logprobs": values, "top_logprobs": tops,
        "text_offset": [a for a, _ in spans],
    }  # fmt: skip
