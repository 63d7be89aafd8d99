"""InfoNCE over matryoshka widths: `infonce`, `value_and_grads`, and the specification.

`naive` is the specification, `chunked` the torch reference with its closed-form backward, `op` the
custom ops, `functional` what users call. Kernels of a later day sit beside `chunked`.
"""

from .functional import infonce, value_and_grads
from .naive import infonce_naive

__all__ = ["infonce", "infonce_naive", "value_and_grads"]
