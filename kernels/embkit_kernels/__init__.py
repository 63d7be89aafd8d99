"""embkit's kernels: pooling and losses for text-embedding training, on torch alone.

Each op has a specification in plain torch (`*_naive`, `*_ref`), a memory-bounded torch reference
with a closed-form backward behind `torch.library` custom ops, and, where there is one, a Triton
kernel. `EMBKIT_KERNELS=auto|triton|ref` chooses. Triton is optional; importing never needs it.
"""

from ._dispatch import KernelUnavailableError, provider
from .cosent import cosent, cosent_naive, prefix_cosine
from .distill import embedding_distill, embedding_distill_naive
from .infonce import infonce, infonce_naive, infonce_ring, value_and_grads
from .mean_pool import cls_pool, last_token_pool, mean_pool, mean_pool_ref
from .score_distill import score_distill, score_distill_naive
from .similarity import mrl_similarity, mrl_similarity_naive
from .spread_out import spread_out, spread_out_naive

__all__ = [
    "KernelUnavailableError",
    "cls_pool",
    "cosent",
    "cosent_naive",
    "embedding_distill",
    "embedding_distill_naive",
    "infonce",
    "infonce_naive",
    "infonce_ring",
    "last_token_pool",
    "mean_pool",
    "mean_pool_ref",
    "mrl_similarity",
    "mrl_similarity_naive",
    "prefix_cosine",
    "provider",
    "score_distill",
    "score_distill_naive",
    "spread_out",
    "spread_out_naive",
    "value_and_grads",
]
