"""Tiny models of sentence-transformers: random BERTs over a vocabulary of 60 words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import backbone
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small tensors: more threads only cost time."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes a SentenceTransformer of width 32, in training mode; another `order` of the words is
    another tokenizer, `dropout` that of hidden states and attention."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import PreTrainedTokenizerFast

    def make(order: int = 1, dropout: float = 0.0, seed: int = 7) -> Any:
        words = [f"w{i * order % 61}" for i in range(1, 61)]
        vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
        made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        folder = tmp_path_factory.mktemp("model")
        PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
            sep_token="[SEP]", mask_token="[MASK]",
        ).save_pretrained(folder)  # fmt: skip
        bert = backbone("bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for parameter in bert.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.35)
        bert.save_pretrained(folder)
        transformer = Transformer(str(folder), max_seq_length=32)
        pooling = Pooling(transformer.get_embedding_dimension())
        return SentenceTransformer(modules=[transformer, pooling], device="cpu").train()

    return make


@pytest.fixture(scope="session")
def make_texts() -> Callable[[int, int], list[str]]:
    """Random texts of 3 to 12 words: `(how many, seed)`."""

    def make(n: int, seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 13, (n,), generator=generator).tolist()
        drawn = [torch.randint(1, 61, (k,), generator=generator).tolist() for k in lengths]
        return [" ".join(f"w{i}" for i in words) for words in drawn]

    return make
