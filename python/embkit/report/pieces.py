"""Pieces of a page: every text in them is escaped, whoever wrote it."""

from __future__ import annotations

from html import escape


def table(head: list[str], body: list[list[str]], *, text: bool = False) -> str:
    """A table; its cells are text, whatever is in them.

    Args:
        head: of the columns. body: rows of as many cells. text: cells are sentences, not numbers.
    """
    kind = ' class="text"' if text else ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in body
    )
    inner = f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{inner}</div>'


def figure(title: str, content: str) -> str:
    """A chart with its title; ``content`` is HTML."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def details(title: str, content: str) -> str:
    """What is shown on a click; ``content`` is HTML."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def decimal(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def clock(seconds: float) -> str:
    """A time in words."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
