"""Exports by the rules of TEI's and vLLM's loaders; each rule is seen to fail once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, backbone, word_tokenizer

from embkit.model import Encoder, check_serving


def edit(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "gone"}))


def exported(family: str, out: Path, *, bidirectional: bool = False) -> Path:
    encoder = Encoder(
        backbone(family), word_tokenizer(), dims=(32, 8), bidirectional=bidirectional,
        max_length={"query": 20, "passage": 20},
    )  # fmt: skip
    return encoder.export(out)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert", "llama", "qwen2", "qwen3"])
def test_exports_fit(family: str, tmp_path: Path) -> None:
    out = exported(family, tmp_path / "m")
    assert check_serving(out) == {"tei": [], "vllm": []}
    config = json.loads((out / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [8, 32]
    if family in DECODERS:
        assert config["rope_theta"] == 10000.0 == config["rope_parameters"]["rope_theta"]


def test_converted_models_carry_every_flag(tmp_path: Path) -> None:
    for family in ("llama", "mistral", "qwen3", "gemma3"):
        out = exported(family, tmp_path / family, bidirectional=True)
        assert check_serving(out) == {"tei": [], "vllm": []}, family
        config = json.loads((out / "config.json").read_text())
        assert config["use_bidirectional_attention"] is True
        assert family == "gemma3" or config["is_causal"] is False
        back = Encoder.from_pretrained(out)
        again = back.export(tmp_path / "again")
        assert back.bidirectional
        for name in ("config.json", "embkit.json", "tokenizer_config.json"):
            assert (again / name).read_bytes() == (out / name).read_bytes(), (family, name)
    notes = check_serving(exported("qwen2", tmp_path / "q", bidirectional=True))
    assert notes["vllm"] == [] and "causal attention" in notes["tei"][0]
    notes = check_serving(exported("gemma2", tmp_path / "g", bidirectional=True))
    assert len(notes["tei"]) == 2 and len(notes["vllm"]) == 1


def test_auto_model_attends_both_ways(tmp_path: Path) -> None:
    """What transformers alone builds from an export, without embkit's attention functions."""
    from transformers import AutoModel

    ids = torch.tensor([[5, 9, 7, 6], [5, 9, 7, 30]])
    for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"):
        for bidirectional in (False, True):
            out = exported(family, tmp_path / "m", bidirectional=bidirectional)
            ours = Encoder.from_pretrained(out).backbone
            plain = AutoModel.from_pretrained(out).eval()
            with torch.no_grad():
                states = plain(input_ids=ids, attention_mask=torch.ones_like(ids))
                want = ours(input_ids=ids, attention_mask=torch.ones_like(ids))
            worst = (states.last_hidden_state - want.last_hidden_state).abs().max()
            assert worst <= 1e-5 * want.last_hidden_state.abs().max(), family
            first = states.last_hidden_state[:, 0]
            assert bool((first[0] != first[1]).any()) == bidirectional, family


def test_every_rule_is_seen(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    def broken(family: str | None, file: str, server: str, match: str, **changes: Any) -> None:
        out = tmp_path / "m"
        if family is None:
            make_encoder(prompts={"query": "w50 : "}).export(out)
        else:
            exported(family, out, bidirectional=family in ("llama", "gemma3"))
        assert check_serving(out) == {"tei": [], "vllm": []}
        edit(out / file, **changes)
        notes = check_serving(out)
        servers = ("tei", "vllm") if server == "both" else (server,)
        for name in ("tei", "vllm"):
            assert any(match in note for note in notes[name]) == (name in servers), (file, notes)

    pooling, dense = "1_Pooling/config.json", "2_Dense/config.json"
    broken(None, pooling, "both", "leaves it out", include_prompt=False)
    broken(None, pooling, "both", "Pooling is", pooling_mode_max_tokens=True)
    broken(None, pooling, "tei", "pooling_mode_cls_token", pooling_mode_cls_token="gone")
    broken(None, dense, "both", "ReLU", activation_function="torch.nn.ReLU")
    broken(None, "sentence_bert_config.json", "tei", "max_seq_length", max_seq_length="gone")
    broken("llama", "config.json", "tei", "rope_theta", rope_theta="gone")
    broken("llama", "config.json", "tei", "use_bidir", use_bidirectional_attention="gone")
    broken("llama", "config.json", "vllm", "is_causal", is_causal=None)
    broken("qwen3", "config.json", "tei", "sliding window", use_sliding_window=True)
    broken("bert", "config.json", "tei", "does not know", model_type="t5")
    broken("bert", "config.json", "vllm", "matryoshka", matryoshka_dimensions=8)


def test_the_newer_layout_is_named(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    out = make_encoder().export(tmp_path / "m")
    library.SentenceTransformer(str(out), device="cpu").save(str(tmp_path / "six"))
    notes = check_serving(tmp_path / "six")
    assert sum("newer layout" in note for note in notes["tei"]) >= 3
