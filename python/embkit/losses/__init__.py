"""Losses by kind of task: who is compared with whom, and which kernel does the arithmetic.

No maths here: rows, identity keys and masks go in, ``embkit.kernels`` is called.
"""

from embkit.losses.tasks import Outcome, Sides, compute, explain, value_and_grad

__all__ = ["Outcome", "Sides", "compute", "explain", "value_and_grad"]
