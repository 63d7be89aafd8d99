"""Loading: plain Hugging Face directories, foreign layouts, and every way a directory is wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from embkit.errors import CorruptError, FormatError, UsageError
from embkit.model import Encoder


@pytest.fixture
def exported(make_encoder: Callable[..., Encoder], tmp_path: Path) -> Path:
    return make_encoder().export(tmp_path / "model")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_plain_hugging_face_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.bert import BertConfig, BertModel

    config = BertConfig(
        vocab_size=66, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertModel(config).eval()  # with a pooler, which must not count as damage
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, dims=(24, 8))
    ids = torch.tensor([tokenizer.encode("w1 w2 w3").ids])
    with torch.no_grad():
        states = model(input_ids=ids).last_hidden_state[0]
    want = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
    assert np.abs(encoder.encode(["w1 w2 w3"])[0] - want).max() < 2e-6
    assert encoder.max_length == {"query": 40, "passage": 40} and encoder.projection is None
    wider = [Encoder.from_pretrained(tmp_path, dims=(64, 8), seed=s) for s in (1, 1, 2)]
    assert wider[0].encode(["w1"]).shape == (1, 64)
    assert wider[0].digest() == wider[1].digest() != wider[2].digest()
    assert Encoder.from_pretrained(tmp_path, dropout=0.3).backbone.config.hidden_dropout_prob == 0.3


def test_training_run_directory(exported: Path, tmp_path: Path) -> None:
    assert Encoder.from_pretrained(tmp_path).digest() == Encoder.from_pretrained(exported).digest()


def test_new_pooling_keys(exported: Path) -> None:
    (exported / "1_Pooling/config.json").write_text(
        '{"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": true}'
    )
    assert Encoder.from_pretrained(exported).pooling == "cls"


def test_weights_are_needed(exported: Path) -> None:
    (exported / "model.safetensors").unlink()
    with pytest.raises(CorruptError, match="no weights"):
        Encoder.from_pretrained(exported)
    (exported / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CorruptError, match="pickle"):
        Encoder.from_pretrained(exported)


@pytest.mark.parametrize("file", ["model.safetensors", "2_Dense/model.safetensors"])
@pytest.mark.parametrize("size", [0, 7, 300, -1])
def test_truncated_weights(exported: Path, file: str, size: int) -> None:
    path = exported / file
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError, match=r"cannot be read") as caught:
        Encoder.from_pretrained(exported)
    assert caught.value.fix and caught.value.where


def test_weights_that_do_not_fit(exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    dropped = {k: v for k, v in weights.items() if "layer.1.output.dense" not in k}
    save_file(dropped, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptError, match=r"do not fit config\.json: 2 missing"):
        Encoder.from_pretrained(exported)
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    edit(exported / "config.json", intermediate_size=65)
    with pytest.raises(CorruptError):
        Encoder.from_pretrained(exported)


@pytest.mark.parametrize(
    ("file", "kind", "match"),
    [
        ("config.json", CorruptError, "no config.json"),
        ("tokenizer.json", UsageError, "no tokenizer.json"),
        ("1_Pooling/config.json", CorruptError, "missing"),
        ("2_Dense/model.safetensors", CorruptError, "no model.safetensors"),
    ],
)
def test_missing_files(exported: Path, file: str, kind: type[Exception], match: str) -> None:
    (exported / file).unlink()
    with pytest.raises(kind, match=match):
        Encoder.from_pretrained(exported)


@pytest.mark.parametrize(
    "file",
    ["config.json", "modules.json", "tokenizer.json", "embkit.json", "1_Pooling/config.json"],
)
@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01"])
def test_damaged_json(exported: Path, file: str, text: str) -> None:
    (exported / file).write_text(text)
    with pytest.raises(CorruptError) as caught:
        Encoder.from_pretrained(exported)
    assert caught.value.fix


def test_refused_layouts(exported: Path) -> None:
    edit(exported / "embkit.json", version=99)
    with pytest.raises(FormatError, match="newer embkit"):
        Encoder.from_pretrained(exported)
    (exported / "embkit.json").unlink()
    edit(
        exported / "2_Dense/config.json", activation_function="torch.nn.modules.activation.Softplus"
    )
    with pytest.raises(UsageError, match="Softplus"):
        Encoder.from_pretrained(exported)
    edit(exported / "config.json", model_type="no_such_model")
    with pytest.raises(UsageError, match="transformers cannot build"):
        Encoder.from_pretrained(exported)


def test_unknown_path() -> None:
    with pytest.raises(UsageError, match="neither a directory nor a model id"):
        Encoder.from_pretrained("./no/such/directory here")


def test_hub_that_never_answers() -> None:
    """A server that accepts and stays silent: an error within seconds, not a hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (
            "import sys, time\n"
            "from embkit.model.load import load_encoder\n"
            "from embkit.errors import UsageError\n"
            "began = time.monotonic()\n"
            "try:\n    load_encoder('nobody/no-such-model')\n"
            "except UsageError:\n    print(time.monotonic() - began)\n"
        )
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 30 <= 120 - (time.monotonic() - began)
