"""Errors that say what happened, where and what to do; each knows its exit code.

The Rust core raises the same classes. Trouble of the operating system stays what it is in Python
(``FileNotFoundError``, ``OSError``, ``MemoryError``); the command line turns it into exit code 4.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmbkitError(Exception):
    """A check failed. Base of every error that embkit raises on purpose.

    Args:
        what: what happened, one sentence.
        where: the file, row, key or option it happened at.
        fix: what the reader can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix
        lines = [what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if fix is not None:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


class UsageError(EmbkitError, ValueError):
    """A wrong argument, option or recipe. Exit code 2."""

    exit_code = 2


class CorruptError(EmbkitError):
    """Input that is damaged, unreadable or not what it claims to be. Exit code 3."""

    exit_code = 3


class FormatError(CorruptError):
    """A file of a newer format version than this embkit reads. Exit code 3."""


class Preempted(EmbkitError):
    """SIGTERM arrived and a checkpoint was written; the same command resumes. Exit code 75."""

    exit_code = 75


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known)
