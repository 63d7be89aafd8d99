"""SIGTERM during training: remember it, finish the step, and let the loop write a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopFlag:
    """Context in which SIGTERM sets :attr:`requested` and ends nothing.

    Handlers belong to the main thread; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            # A handler installed from C cannot be put back; the default is the nearest thing.
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
