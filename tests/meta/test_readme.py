"""README says what happens: its Python example is short, its commands exist, its links resolve."""

from __future__ import annotations

import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_example_is_short() -> None:
    """That it runs is seen by tests/docs."""
    (example,) = (b for b in blocks("python") if "import embkit as ek" in b)
    assert len([line for line in example.splitlines() if line.strip()]) <= 14


def test_the_make_targets_it_names_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README)) - {"and"}
    assert {"demo", "test"} <= named <= targets


def test_its_links_resolve() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (REPO / target).exists(), target


def test_no_placeholder_is_left() -> None:
    assert "{{" not in README
