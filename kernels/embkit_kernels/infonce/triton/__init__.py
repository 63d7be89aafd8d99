"""The Triton provider of InfoNCE: `forward` and `backward` of `infonce.op`, same arguments.

Imported only where a kernel is about to run or to be compiled: it needs triton.
"""

from .call import forward
from .gradients import backward

__all__ = ["backward", "forward"]
