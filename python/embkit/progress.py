"""Progress of long work: a bar with rate and ETA on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOG_EVERY = 10.0  # seconds between plain lines


class Bar:
    """Counts work done; made by :func:`bar`."""

    def __init__(self, label: str, total: float | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._begun = 0.0
        self.started = time.monotonic()
        self._notes: dict[str, object] = {}

    def start(self, done: float) -> None:
        """Set the units that were done before, and start the clock: they do not count as speed."""
        self.done = self._begun = done
        self.started = time.monotonic()
        self._show()

    def advance(self, amount: float = 1, **notes: object) -> None:
        """Add ``amount`` units; ``notes`` (say ``loss=2.31``) are shown beside the rate."""
        self.update(self.done + amount, **notes)

    def update(self, done: float, **notes: object) -> None:
        """Set the units done so far."""
        self.done = done
        self._notes.update(notes)
        self._show()

    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self._begun) / max(time.monotonic() - self.started, 1e-9)

    def _text(self) -> str:
        rate = self.rate()
        text = f"{_si(rate)} {self.unit}/s"
        if self.total and rate > 0 and self.done < self.total:
            text += f", {_clock((self.total - self.done) / rate)} left"
        for key, value in self._notes.items():
            text += f", {key} {value:.4g}" if isinstance(value, float) else f", {key} {value}"
        return text

    def _show(self) -> None:
        """Draw; the plain form draws only now and then."""

    def close(self, ok: bool) -> None:
        """Finish the line."""


class _Plain(Bar):
    def __init__(self, label: str, total: float | None, unit: str) -> None:
        super().__init__(label, total, unit)
        self._next = self.started + _LOG_EVERY

    def _show(self) -> None:
        if time.monotonic() >= self._next:
            self._next += _LOG_EVERY
            of = f"/{_si(self.total)}" if self.total else ""
            print(f"  {self.label}: {_si(self.done)}{of} ({self._text()})", flush=True)

    def close(self, ok: bool) -> None:
        taken = time.monotonic() - self.started
        if ok:
            print(
                f"  {self.label}: {_si(self.done)} {self.unit} in {taken:.1f} s ({self._text()})",
                flush=True,
            )


class _Live(Bar):
    def __init__(self, label: str, total: float | None, unit: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        super().__init__(label, total, unit)
        self._progress = Progress(
            TextColumn("  {task.description:<24}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[text]}"),
            refresh_per_second=8,
        )
        self._progress.start()
        self._task = self._progress.add_task(label, total=total, text="")

    def _show(self) -> None:
        self._progress.update(self._task, completed=self.done, text=self._text())

    def close(self, ok: bool) -> None:
        if ok:
            taken = f"{_si(self.done)} {self.unit} in {time.monotonic() - self.started:.1f} s"
            self._progress.update(
                self._task, total=self.done or 1, completed=self.done or 1, text=taken
            )
        self._progress.stop()


class _Quiet(Bar):
    pass


@contextmanager
def bar(label: str | None, *, total: float | None = None, unit: str = "rows") -> Iterator[Bar]:
    """Show progress of a piece of work.

    Args:
        label: what is being done, e.g. ``"Tokenize"``; None shows nothing.
        total: units in all, or None when unknown.
        unit: what is counted, e.g. ``"tokens"``.

    ``EMBKIT_PROGRESS=bar|plain|off`` overrides the choice by terminal. Of the processes that
    torchrun starts, the first alone shows progress.
    """
    kind = {"bar": _Live, "plain": _Plain}.get(_mode() if label is not None else "", _Quiet)
    shown = kind(label or "", total, unit)
    try:
        yield shown
    except BaseException:
        shown.close(ok=False)
        raise
    shown.close(ok=True)


def say(text: str) -> None:
    """Print one indented line, unless progress is off."""
    if _mode() != "off":
        print(f"  {text}", flush=True)


def _mode() -> str:
    if os.environ.get("RANK", "0") != "0":
        return "off"  # one of several processes speaks
    return os.environ.get("EMBKIT_PROGRESS") or ("bar" if sys.stdout.isatty() else "plain")


def _si(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.3g}" if value != int(value) else str(int(value))


def _clock(seconds: float) -> str:
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return f"{seconds // 60}:{seconds % 60:02d}"
