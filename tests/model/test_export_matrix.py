"""Exports read by each sentence-transformers of tests/matrix.py, in its own environment."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import matrix
import numpy as np
import pytest
from families import DECODERS, backbone, word_tokenizer
from packaging.version import Version

from embkit.model import Encoder
from embkit.model.portable import BIDIRECTIONAL_SINCE, OWN_FLAG_SINCE

pytestmark = pytest.mark.slow

LIMIT = 2e-6
# Families that the oldest version cannot know, and the transformers that brought them.
SINCE = {"gemma3": "4.50", "qwen3": "4.51"}
# Rotary bases that are no default: a reader that misses the key is seen.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
SCALED = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 10,
    }
}  # fmt: skip
NEAR = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 90.0},
    }
}
THIRDS = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
# Name -> family, changes to its config, options of the encoder.
EXPORTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "bert": ("bert", {}, {"include_prompt": False}),
    "bert-cls": ("bert", {}, {"pooling": "cls"}),
    "xlm-roberta": ("xlm-roberta", {}, {}),
    "modernbert": ("modernbert", {**NEAR, **THIRDS, "layers": 3}, {}),
    "llama": ("llama", ROPE, {"pooling": "last"}),
    "llama-scaled": ("llama", SCALED, {}),
    "mistral": ("mistral", ROPE, {}),
    "qwen3": ("qwen3", ROPE, {"pooling": "last"}),
    "gemma3": ("gemma3", NEAR, {}),
    "llama-converted": ("llama", ROPE, {"bidirectional": True}),
    "qwen3-converted": ("qwen3", ROPE, {"bidirectional": True}),
    "gemma3-converted": ("gemma3", NEAR, {"bidirectional": True}),
}
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
TEXTS = ["w1 w2 w3", "w4", " ".join(f"w{i}" for i in range(30)), "nothing known", "W9 w8 w7"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every export with what its encoder gives on one batch."""
    root = tmp_path_factory.mktemp("matrix")
    for name, (family, changes, options) in EXPORTS.items():
        encoder = Encoder(
            backbone(family, **changes), word_tokenizer(), dims=(32, 8),
            max_length={"query": 20, "passage": 20},
            prompts={"query": "w50 w51 : ", "passage": ""}, **options,
        ).eval()  # fmt: skip
        # One graph is enough: sentence-transformers reads it through optimum, where that is built.
        encoder.export(root / name / "model", onnx=name == "xlm-roberta" and HAS_ONNX)
        whole = {"token_budget": 20 * len(TEXTS)}
        np.savez(
            root / name / "expected.npz",
            texts=np.array(TEXTS),
            plain=encoder.encode(TEXTS, **whole),
            query=encoder.encode(TEXTS, prompt="w50 w51 : ", **whole),
            cut=encoder.encode(TEXTS, dim=8, **whole),
        )
    return root


@pytest.mark.parametrize("name", matrix.ENVIRONMENTS)
def test_exports_are_read_alike(name: str, exports: Path) -> None:
    python = matrix.python(name)
    if python is None:
        pytest.skip(f"{name} is not built: make matrix")
    reader = Path(matrix.__file__).with_name("matrix_reader.py")
    done = subprocess.run(
        [str(python), str(reader), str(exports)], capture_output=True, text=True, timeout=280,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    found = json.loads(lines[-1].removeprefix("RESULT "))
    library, transformers = found.pop("versions")
    assert name == "pinned" or name == f"st-{library}"
    assert set(found) == set(EXPORTS)
    for export, seen in found.items():
        family = EXPORTS[export][0]
        if Version(transformers) < Version(SINCE.get(family, "4")):
            assert "error" in seen, (export, "is read by transformers", transformers)
            continue
        assert "error" not in seen, (export, seen)
        converted = export.endswith("-converted")
        since = OWN_FLAG_SINCE if family == "gemma3" else BIDIRECTIONAL_SINCE
        old = Version(transformers) < Version(since)
        decoder = family in DECODERS
        # The probe: change the last token; the first state must move, or must not.
        assert seen["sees_later_tokens"] == (not decoder or (converted and not old)), export
        assert seen["prompts"]["query"] == "w50 w51 : " and seen["max_seq_length"] == 20
        assert seen["similarity"] <= 1e-5
        if export == "xlm-roberta" and HAS_ONNX and name == "st-5.1.0":
            assert "onnx" in seen["difference"]
        worst = max(seen["difference"].values())
        if converted and old:
            assert worst > 1e-3, "the card says that this version computes something else"
        else:
            assert worst <= LIMIT, (export, seen["difference"])
