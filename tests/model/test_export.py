"""Export: the exact legacy layout, read back by sentence-transformers and by ourselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from embkit import _rust
from embkit.errors import UsageError
from embkit.model import Encoder, check_export, export

LIMIT = 2e-6  # contracts: fp32, same batch


def content(path: Path) -> object:
    return json.loads(path.read_text())


def test_layout_is_the_legacy_one(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    out = export(make_encoder(prompts={"query": "w50 : ", "passage": ""}), tmp_path / "m")
    kinds = ["Transformer", "Pooling", "Dense", "Normalize"]
    assert content(out / "modules.json") == [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(
            zip(["", "1_Pooling", "2_Dense", "3_Normalize"], kinds, strict=True)
        )
    ]
    assert content(out / "1_Pooling/config.json") == {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
        "pooling_mode_weightedmean_tokens": False,
        "pooling_mode_lasttoken": False,
        "include_prompt": True,
    }
    assert content(out / "2_Dense/config.json") == {
        "in_features": 32,
        "out_features": 48,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    assert content(out / "sentence_bert_config.json") == {
        "max_seq_length": 20,
        "do_lower_case": False,
    }
    described = content(out / "config_sentence_transformers.json")
    assert described["prompts"] == {"query": "w50 : ", "document": ""}
    assert described["similarity_fn_name"] == "cosine" and described["default_prompt_name"] is None
    config = content(out / "config.json")
    assert config["architectures"] == ["BertModel"] and config["torch_dtype"] == "float32"
    assert content(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert content(out / "tokenizer_config.json")["pad_token"] == "[PAD]"
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "- sentence-transformers\n" in card
    umask_mode = 0o666 & ~_umask()
    assert {p.stat().st_mode & 0o777 for p in out.rglob("*") if p.is_file()} == {umask_mode}


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("projection", [True, False])
def test_sentence_transformers_gives_the_same(
    make_encoder: Callable[..., Encoder],
    texts: list[str],
    tmp_path: Path,
    pooling: str,
    projection: bool,
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    dims = (48, 16) if projection else (32, 16)
    encoder = make_encoder(pooling=pooling, projection=projection, dims=dims)
    out = encoder.export(tmp_path / "m")
    difference = check_export(encoder, out, texts)
    assert difference is not None and difference <= LIMIT
    cut = sentence_transformers.SentenceTransformer(str(out), device="cpu", truncate_dim=16)
    theirs = cut.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    assert np.abs(theirs - encoder.encode(texts, dim=16)).max() <= LIMIT


def test_a_width_below_the_states_is_exported(
    make_encoder: Callable[..., Encoder], texts: list[str], tmp_path: Path
) -> None:
    whole = make_encoder(projection=False, dims=(32,))
    narrow = Encoder(whole.backbone, whole.tokenizer, dims=(16, 8), max_length=whole.max_length)
    assert np.abs(narrow.encode(texts) - whole.encode(texts, dim=16)).max() < LIMIT
    out = narrow.export(tmp_path / "m")
    assert content(out / "2_Dense/config.json")["out_features"] == 16
    difference = check_export(narrow, out, texts)
    assert difference is None or difference <= LIMIT


def test_prompts_give_the_same_there(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = make_encoder(prompts={"query": "w50 : ", "passage": "w51 : "})
    encoder.include_prompt = False
    out = encoder.export(tmp_path / "m")
    texts = ["w1 w2", "w3"]
    difference = check_export(encoder, out, texts)
    assert difference is not None and difference <= LIMIT
    other = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    theirs = other.encode(texts, prompt_name="query", show_progress_bar=False)
    assert np.abs(theirs - encoder.encode(texts, role="query")).max() <= LIMIT
    encoder.include_prompt = True  # a wrong setting must be seen by the check
    wrong = check_export(encoder, out, texts)
    assert wrong is not None and wrong > 1e-3


def test_round_trip_is_exact(
    make_encoder: Callable[..., Encoder], texts: list[str], tmp_path: Path
) -> None:
    encoder = make_encoder(prompts={"query": "w50 : ", "passage": "w51 : "})
    back = Encoder.from_pretrained(encoder.export(tmp_path / "m"))
    assert back.digest() == encoder.digest()
    assert back.dims == (48, 16, 8) and back.max_length == {"query": 8, "passage": 20}
    assert np.array_equal(back.encode(texts, role="query"), encoder.encode(texts, role="query"))
    again = back.export(tmp_path / "n")
    for path in sorted(p for p in again.rglob("*") if p.is_file() and p.name != "README.md"):
        twin = tmp_path / "m" / path.relative_to(again)
        assert path.read_bytes() == twin.read_bytes(), path


def test_export_replaces_models_and_nothing_else(
    make_encoder: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, out = make_encoder(), tmp_path / "m"
    encoder.export(out)
    with torch.no_grad():
        encoder.projection.weight.mul_(-1)
    encoder.export(out)
    assert Encoder.from_pretrained(out).digest() == encoder.digest()
    before = encoder.digest()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        encoder.projection.weight.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(_rust, "publish_dir", full)
        with pytest.raises(OSError, match="No space"):
            encoder.export(out)
    assert Encoder.from_pretrained(out).digest() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(UsageError, match="no model directory"):
        encoder.export(tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask
