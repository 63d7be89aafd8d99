"""Losses by kind of task: who is compared with whom, and which kernel does the arithmetic.

No maths here: rows, identity keys and masks go in, ``embkit.kernels`` is called.
"""

from embkit.losses.candidates import Candidates
from embkit.losses.explain import Known, explain
from embkit.losses.fit import losses_fit
from embkit.losses.sides import Outcome, Sides
from embkit.losses.tasks import compute, value_and_grad

__all__ = [
    "Candidates",
    "Known",
    "Outcome",
    "Sides",
    "compute",
    "explain",
    "losses_fit",
    "value_and_grad",
]
