"""Where the time of a run goes."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Profile:
    """Seconds of a run by what they were spent on, and the tokens they were spent on."""

    wait: float = 0.0
    forward: float = 0.0
    loss: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    checkpoint: float = 0.0
    negatives: float = 0.0
    refresh: float = 0.0
    other: float = 0.0
    tokens: int = 0
    padded: int = 0
    steps: int = 0

    @property
    def total(self) -> float:
        """Seconds of all steps; checkpoints and waiting for a refresh are left out."""
        model = self.forward + self.loss + self.backward + self.optimizer
        return model + self.wait + self.negatives + self.other

    @property
    def overhead(self) -> float:
        """Share of a step outside forward, loss, backward and optimizer."""
        return (self.wait + self.negatives + self.other) / max(self.total, 1e-12)


class Clock:
    """Adds the time between laps to the fields of a profile."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.last = profile, time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        setattr(self.profile, name, getattr(self.profile, name) + now - self.last)
        self.last = now
