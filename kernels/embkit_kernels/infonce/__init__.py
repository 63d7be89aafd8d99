"""InfoNCE over matryoshka widths: `infonce`, `value_and_grads`, `infonce_ring`; its specification.

`naive` is the specification, `chunked` the torch reference with its closed-form backward, `op` the
custom ops, `functional` what users call. Kernels of a later day sit beside `chunked`.
"""

from .functional import infonce, value_and_grads
from .naive import infonce_naive
from .ring import infonce_ring

__all__ = ["infonce", "infonce_naive", "infonce_ring", "value_and_grads"]
