"""Losses by kind of task: who is compared with whom, and which kernel does the arithmetic.

No maths here: rows, identity keys and masks go in, ``embkit.kernels`` is called.
"""

from embkit.losses.candidates import KINDS, Sides, TaskData
from embkit.losses.tasks import Outcome, compute, explain

__all__ = ["KINDS", "Outcome", "Sides", "TaskData", "compute", "explain"]
