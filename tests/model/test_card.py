"""The model card: metadata that the hub reads, nothing of this machine, snippets that run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import backbone, word_tokenizer
from huggingface_hub import ModelCard

from embkit.errors import UsageError
from embkit.model import Card, Data, Encoder, export
from embkit.model.card import find

RECIPE = """name = "mine"
[data]
path = "/home/somebody/data/sets"
[model]
path = "org/base"
prompt = "a/b: "
[soup]
select = "greedy"
"""


def made_run(root: Path) -> Path:
    """A run's directory as `embkit run` leaves it, with what a card reads of it."""
    scores = {
        "retrieval/a": {
            "type": "retrieval",
            "widths": {"8": {"mrr@10": 1.0, "ndcg@10": 30.5}, "48": {"ndcg@10": 41.239}},
        },
        "sts/b": {"type": "sts", "widths": {"8": {"spearman": 60.0}, "48": {"spearman": 70.0}}},
    }
    soup = {
        "select": "greedy", "kept": ["ft-1", "ft-0"], "weights": [0.5, 0.5], "dev": 44.0,
        "candidates": [{"run": "ft-0", "dev": 42.0}, {"run": "ft-1", "dev": 43.0}],
    }  # fmt: skip
    files = {
        "result.json": {
            "scores": {"test": {"soup, greedy": {"tasks": scores}}},
            "soup": {"greedy": soup},
        },
        "store/manifest.json": {"sources": [{"task": "a", "name": "a.jsonl"}]},
        "clean/report.json": {"examples": {"a": {"before": 20, "after": 17}}},
    }
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(value))
    (root / "recipe.toml").write_text(RECIPE)
    return root


def test_card_of_a_run(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    card = find(run / "model")
    assert card == Card.of_run(run)
    out = export(make_encoder(), run / "model", name="org/mine", card=card)
    found = ModelCard.load(out / "README.md")
    data = found.data.to_dict()
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity" and "matryoshka" in data["tags"]
    assert data["base_model"] == "org/base" and "license" not in data and "language" not in data
    results = {
        (r.dataset_name, r.metric_name): (r.task_type, r.metric_type, r.metric_value)
        for r in found.data.eval_results
    }
    assert found.data.model_name == "org/mine" and len(results) == 4
    assert results["retrieval/a", "ndcg@10 (width 48)"] == (
        "information-retrieval", "ndcg@10", 41.24,
    )  # fmt: skip
    assert results["sts/b", "spearman (width 8)"] == ("semantic-similarity", "spearman", 60.0)
    text = found.text
    assert "| retrieval/a | ndcg@10 | 41.24 | 30.50 |" in text
    assert "| a | 17 | not stated |" in text
    assert "average (greedy) of ft-1 (0.5), ft-0 (0.5)" in text
    assert "ft-0 42.00, ft-1 43.00; the average: 44.00" in text
    assert "somebody" not in text and '".../sets"' in text and 'prompt = "a/b: "' in text
    for name in ("embkit", "torch", "transformers", "Python"):
        assert re.search(rf"{name} \d+\.\d+", text), name


def test_card_of_a_soup_alone(make_encoder: Callable[..., Encoder], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    report = {"select": "uniform", "kept": ["a", "b"], "weights": [0.25, 0.75], "dev": None}
    (tmp_path / "report.json").write_text(json.dumps(report))
    for folder in (tmp_path, tmp_path / "model"):
        out = export(make_encoder(), tmp_path / "out", card=find(folder))
        text = (out / "README.md").read_text()
        assert "average (uniform) of a (0.25), b (0.75)" in text and "On dev" not in text
    assert find(tmp_path / "elsewhere" / "model") == Card()


def test_card_file_says_what_the_run_cannot(
    make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    run = made_run(tmp_path / "run")
    file = tmp_path / "card.toml"
    file.write_text(
        'license = "apache-2.0"\nlanguage = "en"\n'
        '[[data]]\nname = "a"\nlicense = "cc-by-4.0"\nurl = "https://example.org/a"\n'
        '[[data]]\nname = "org/b"\nexamples = 5\n'
    )
    card = Card.read(file, base=Card.of_run(run))
    assert card.data == [
        Data("a", "cc-by-4.0", "https://example.org/a", 17), Data("org/b", examples=5)
    ]  # fmt: skip
    out = export(make_encoder(dims=(48,)), tmp_path / "m", card=card)
    found = ModelCard.load(out / "README.md")
    data = found.data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["datasets"] == ["org/b"] and "matryoshka" not in data["tags"]
    assert "| [a](https://example.org/a) | 17 | cc-by-4.0 |" in found.text
    for text, match in [
        ("licence = 'mit'", "Unknown key 'licence'"), ("a = ", "No card"),
        ("[[data]]\nlicense = 'mit'", "name at least"),
        ("[[data]]\nname='a'\nx=1", "name at least"),
    ]:  # fmt: skip
        file.write_text(text)
        with pytest.raises(UsageError, match=match):
            Card.read(file)
    with pytest.raises(UsageError, match="No card"):
        Card.read(tmp_path / "nothing.toml")


def test_snippets_run(
    make_encoder: Callable[..., Encoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentence_transformers")
    encoder = make_encoder(prompts={"query": "w50 : ", "passage": ""})
    out = export(encoder, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 2
    seen: dict[str, Any] = {}
    for block in blocks:
        exec(block, seen)  # what a reader would paste
    assert seen["queries"].shape == (1, 8) and seen["passages"].shape == (2, 8)
    assert seen["encoder"].digest() == encoder.digest()


def test_converted_models_say_which_transformers_they_need(tmp_path: Path) -> None:
    for family, flag, needs in (
        ("llama", '"is_causal": false', "5.2"),
        ("gemma3", '"use_bidirectional_attention": true', "4.57"),
    ):
        made = Encoder(backbone(family), word_tokenizer(), dims=(32,), bidirectional=True)
        for encoder in (made, Encoder.from_pretrained(made.export(tmp_path / family))):
            text = (encoder.export(tmp_path / "again") / "README.md").read_text()
            assert flag in text and f"transformers {needs} or newer is needed" in text
        assert ("is_causal" in text) == (family == "llama")
    plain = Encoder(backbone("llama"), word_tokenizer(), dims=(32,)).export(tmp_path / "causal")
    assert "Bidirectional" not in (plain / "README.md").read_text()
