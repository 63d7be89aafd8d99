"""A token behind each text: in every kind of post-processor, in the store, and in the export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import backbone
from small import write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from embkit import data, pipeline, recipe
from embkit.data import vocabulary
from embkit.errors import UsageError
from embkit.model import Encoder, check_export

END = "<|endoftext|>"


def byte_level() -> Tokenizer:
    """Bytes as tokens, and special ones that no text contains."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, "<|start|>"])
    return tokenizer


def template() -> Any:
    return processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 257)]
    )


@pytest.mark.parametrize(
    "post",
    [
        None,
        processors.ByteLevel(trim_offsets=False),
        template(),
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template()]),
        processors.Sequence([processors.ByteLevel(trim_offsets=False)]),
    ],
    ids=["none", "byte level", "template", "both", "sequence"],
)
def test_it_stands_behind_what_was_there(post: Any) -> None:
    plain = byte_level()
    if post is not None:
        plain.post_processor = post
    ended = Tokenizer.from_str(vocabulary.ending_with(plain.to_str(), END))
    for text in ("a", "some text", ""):
        assert ended.encode(text).ids == [*plain.encode(text).ids, 256]
        assert (
            ended.encode(text, add_special_tokens=False).ids
            == plain.encode(text, add_special_tokens=False).ids
        )
    assert ended.encode("a", "b").ids == [*plain.encode("a", "b").ids, 256]
    ended.enable_truncation(4)
    assert len(ended.encode("a long text").ids) == 4 and ended.encode("a long text").ids[-1] == 256
    again = vocabulary.ending_with(ended.to_str(), END)
    assert again == ended.to_str()  # a text does not end twice


def test_what_cannot_be() -> None:
    with pytest.raises(UsageError, match="has no token '</s>'"):
        vocabulary.ending_with(byte_level().to_str(), "</s>")
    closed = byte_level()
    closed.post_processor = processors.BertProcessing(("<|start|>", 257), ("<|start|>", 257))
    with pytest.raises(UsageError, match="BertProcessing"):
        vocabulary.ending_with(closed.to_str(), END)


def test_from_the_recipe_to_the_export(tmp_path: Path) -> None:
    """The store's rows end with it, cut ones too; the state of that token is the embedding; and
    sentence-transformers, which loads the export, gives the same."""
    model = tmp_path / "start"
    backbone("qwen3", vocab_size=258).save_pretrained(model)
    content = json.loads(byte_level().to_str())
    vocabulary.write(model, json.dumps(content), {"pad_token": END, "eos_token": END})
    rows = [{"query": f"query {i}", "positive": f"a passage {i} " * (i + 1)} for i in range(6)]
    write_jsonl(tmp_path / "in" / "pairs.jsonl", rows)
    loaded = recipe.from_table(
        {
            "tokenizer": {
                "end_token": END, "prompt_query": "find: ", "max_length_query": 20,
                "max_length_passage": 30,
            },
            "model": {"path": str(model), "pooling": "last", "dims": [32]},
        }
    )  # fmt: skip
    records = data.read(tmp_path / "in").save(tmp_path / "records")
    options = pipeline.tokenizer_options(loaded, pipeline.kinds_of(records))
    stores = [
        data.tokenize(records, out=tmp_path / backend, backend=backend, **options)
        for backend in ("auto", "tokenizers")
    ]
    store, rows_ = stores[0], np.arange(stores[0].rows, dtype=np.uint64)
    assert "fast path" in store.manifest["tokenizer"]["backend"]
    for one in stores:
        lengths = one.lengths(rows_)
        out, bounds = np.zeros(lengths.sum(), np.int64), np.zeros(len(rows_) + 1, np.int32)
        one.gather(rows_, out, bounds)
        assert set(out[bounds[1:] - 1]) == {256} and (out == 256).sum() == len(rows_)
        assert lengths.max() == 30
    encoder = pipeline.start_encoder(loaded, store)
    encoder.export(tmp_path / "model")
    texts = ["query 1", "a much longer text than any that fits here, by far", "x"]
    assert (check_export(encoder, tmp_path / "model", texts) or 0) < 2e-6
    again = Encoder.from_pretrained(tmp_path / "model")
    assert again.tokenizer.ids(["find: query 1"], max_length=20)[0][-1] == 256
    assert again.tokenizer.json == encoder.tokenizer.json
    plain = Encoder.from_pretrained(model, pooling="last", dims=(32,))
    assert not np.allclose(plain.encode(texts[:1]), encoder.encode(texts[:1]), atol=1e-3)
