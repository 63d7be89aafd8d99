"""What the site has beside docs/: README as its first page, CONTRIBUTING, and the examples.

Links in these pages are written for readers of the repository; here they become the site's, and
docstrings are made ready for the reference.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
# Packages of which the reference shows some names only (those of `embkit` where they live).
INSIDE = ("embkit", "pipeline")
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


def on_post_build(config: Any) -> None:
    """Refuse a reference without one of the public functions and classes."""
    package, site = REPO / "python" / "embkit", Path(config["site_dir"])
    pages = "".join(p.read_text("utf-8") for p in (site / "reference").glob("*.html"))
    shown = {name.split(".")[-1] for name in re.findall(r'id="(embkit[\w.]*)"', pages)}
    for path in (*package.rglob("__init__.py"), package / "kernels" / "__init__.py"):
        lists = re.findall(
            r"^(?:__all__|_HOME) = [\[{](.*?)^[\]}]", path.read_text("utf-8"), re.M | re.S
        )
        public = {n for text in lists for n in re.findall(r'^ *"(\w+)"', text, re.M)}
        missing = sorted(n for n in public - shown if not n.isupper())
        if missing and path.parent.name not in INSIDE:
            raise PluginError(f"docs/reference lacks {', '.join(missing)} of {path.parent.name}")


class House(griffe.Extension):
    """The habits of our docstrings, as the reference wants them."""

    def on_object(self, *, obj: griffe.Object, **more: Any) -> None:
        """Called for each object that is read."""
        if obj.docstring is not None:
            text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            text = re.sub(r"\bdocs/([\w-]+)\.md\b", r"[\1](../\1.md)", text)
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            text = re.sub(r"^>>>(?:.*\n?.+)*", _example, text, flags=re.MULTILINE)
            obj.docstring.value = _SHARED.sub(_apart, text)


# One description of several arguments or attributes: `q, p: ...` with the lines below it.
_SHARED = re.compile(r"^( +)(\**\w+(?:, \**\w+)+):( .*(?:\n\1 +\S.*)*)", re.MULTILINE)


def _apart(match: re.Match[str]) -> str:
    return "\n".join(f"{match[1]}{name}:{match[3]}" for name in match[2].split(", "))


def _example(match: re.Match[str]) -> str:
    return "Examples:\n" + textwrap.indent(match[0], "    ")
