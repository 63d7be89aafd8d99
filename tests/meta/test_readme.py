"""README says what happens: its Python example runs, its commands exist, its links resolve."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.timeout(400)
def test_the_python_example_runs_on_small_real_data(small_data: Path, tmp_path: Path) -> None:
    """Only sizes and paths are replaced, and the model it starts from is a small untrained one."""
    (example,) = (b for b in blocks("python") if "import embkit as ek" in b)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 14
    replaced = {
        '"raw/*.jsonl.zst"': repr(str(small_data / "train" / "*.jsonl")),
        '"data/': f'"{small_data}/',
        'tokenizer="path-or-id"': "vocab_size=1500",
        '"path-or-id", dims': '"start", dims',
        "(384, 192, 96)": "(48, 24, 12)",
        "steps=2000, batch_size=512": "steps=3, batch_size=32",
        "range(4)": "range(2)",
        "hard_negatives=4": "hard_negatives=1, steps=3, batch_size=16",
    }
    for old, new in replaced.items():
        assert old in example, old
        example = example.replace(old, new)
    start = (
        "from embkit.model import Encoder\nfrom embkit.recipe import Model\n"
        "small = Model(hidden=48, layers=1, heads=3, intermediate=64, dims=(48, 24, 12))\n"
        "Encoder.from_config(small, 'store/tokenizer').export('start')\n"
    )
    before, line, after = example.partition("encoder = ek.Encoder")
    code = before + start + line + after
    code += (
        "\nfrom sentence_transformers import SentenceTransformer\n"
        "saved = SentenceTransformer('my-embedder', device='cpu')\n"
        "assert saved.encode(['a text']).shape == (1, 48)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=380,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_make_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"and"}
    assert {"demo", "test"} <= named <= targets


def test_its_links_resolve() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (REPO / target).exists(), target


def test_no_placeholder_is_left() -> None:
    assert "{{" not in README
