"""What the site has beside docs/: README as its first page, CONTRIBUTING, and the examples.

Links in these pages are written for readers of the repository; here they become the site's. Roles
of docstrings (``:func:`x```) become plain names in the reference.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie elsewhere, and the examples as plain files."""
    for name, source in PAGES.items():
        text = (REPO / source).read_text("utf-8").replace("](docs/", "](")
        for page, there in PAGES.items():
            text = text.replace(f"]({there})", f"]({page})")
        files.append(File.generated(config, name, content=text))
    for path in sorted((REPO / "examples").iterdir()):
        files.append(File.generated(config, f"examples/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to the examples, as this site has them."""
    for name, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({name}")
    return re.sub(r"\]\((?:\.\./)+examples/", "](examples/", markdown)


class Roles(griffe.Extension):
    """Docstrings without RST roles."""

    def on_object(self, *, obj: griffe.Object, **more: Any) -> None:
        """Called for each object that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
