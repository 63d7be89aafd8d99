"""Runs inside an environment of tests/matrix.py: reads exports, and compares.

``python matrix_reader.py FOLDER``: for each NAME in the folder, NAME/model is an export and
NAME/expected.npz what the encoder gave. Prints one JSON object, NAME -> what was found.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def read(folder: Path) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    expected = np.load(folder / "expected.npz")
    texts = [str(t) for t in expected["texts"]]
    model = SentenceTransformer(str(folder / "model"), device="cpu")
    options: dict[str, Any] = {"batch_size": len(texts), "show_progress_bar": False}
    found = {
        "plain": model.encode(texts, **options),
        "query": model.encode(texts, prompt_name="query", **options),
    }
    narrow = SentenceTransformer(str(folder / "model"), device="cpu", truncate_dim=8)
    found["cut"] = narrow.encode(texts, normalize_embeddings=True, **options)
    if (folder / "model" / "onnx").is_dir() and importlib.util.find_spec("optimum"):
        options_of = {"file_name": "onnx/model.onnx", "provider": "CPUExecutionProvider"}
        graph = SentenceTransformer(
            str(folder / "model"), device="cpu", backend="onnx", model_kwargs=options_of
        )
        found["onnx"] = graph.encode(texts, **options)
    tokens = model.tokenize([" ".join(f"w{i}" for i in range(9))])
    ids = tokens["input_ids"].repeat(2, 1)
    ids[1, -1] = ids[1, -1] + 1
    body = model[0].auto_model
    with torch.no_grad():
        states = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    similarity = model.similarity(found["plain"], found["plain"])
    cosines = found["plain"].astype(np.float64) @ found["plain"].astype(np.float64).T
    return {
        "difference": {
            name: float(np.abs(value.astype(np.float64) - expected[_as(name)]).max())
            if value.shape == expected[_as(name)].shape
            else f"shape {value.shape}"
            for name, value in found.items()
        },
        "similarity": float(np.abs(similarity.numpy() - cosines).max()),
        "prompts": dict(model.prompts),
        "max_seq_length": int(model.max_seq_length),
        "sees_later_tokens": bool((states[0] != states[1]).any()),
    }


def _as(name: str) -> str:
    return "plain" if name == "onnx" else name


def main(root: Path) -> None:
    warnings.simplefilter("ignore")
    import sentence_transformers
    import torch
    import transformers

    torch.set_num_threads(1)
    out: dict[str, Any] = {
        "versions": [sentence_transformers.__version__, transformers.__version__]
    }
    for folder in sorted(p for p in root.iterdir() if (p / "expected.npz").is_file()):
        try:
            out[folder.name] = read(folder)
        except Exception as error:  # a version that lacks the family: the test decides
            out[folder.name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    print("RESULT " + json.dumps(out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
