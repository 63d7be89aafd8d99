"""embkit inside `SentenceTransformerTrainer`: change an import, keep the script.

Losses are subclasses of those whose names they have, with the same arguments, values and gradients;
samplers have the interface of `batch_sampler` and `multi_dataset_batch_sampler`;
`mine_hard_negatives` the signature of `sentence_transformers.util`'s. docs/sentence-transformers.md
has a table of what is gained. Needs sentence-transformers 6: ``pip install 'embkit[st]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError

if TYPE_CHECKING:
    from .cosent import CoSENTLoss as CoSENTLoss
    from .dataset import dedup as dedup
    from .guided import CachedGISTEmbedLoss as CachedGISTEmbedLoss
    from .guided import GISTEmbedLoss as GISTEmbedLoss
    from .matryoshka import MatryoshkaLoss as MatryoshkaLoss
    from .mining import mine_hard_negatives as mine_hard_negatives
    from .ranking import CachedMultipleNegativesRankingLoss as CachedMultipleNegativesRankingLoss
    from .ranking import MultipleNegativesRankingLoss as MultipleNegativesRankingLoss
    from .samplers import NoDuplicatesBatchSampler as NoDuplicatesBatchSampler
    from .samplers import SingleTaskBatchSampler as SingleTaskBatchSampler

_HOME = {
    "CoSENTLoss": "cosent",
    "dedup": "dataset",
    "CachedGISTEmbedLoss": "guided",
    "GISTEmbedLoss": "guided",
    "MatryoshkaLoss": "matryoshka",
    "mine_hard_negatives": "mining",
    "CachedMultipleNegativesRankingLoss": "ranking",
    "MultipleNegativesRankingLoss": "ranking",
    "NoDuplicatesBatchSampler": "samplers",
    "SingleTaskBatchSampler": "samplers",
}
__all__ = list(_HOME)
_OLDEST = 6


def _check() -> None:
    """Raises UsageError: sentence-transformers is missing, or too old."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("sentence-transformers")
    except PackageNotFoundError:
        found = "0"
    if int(found.split(".")[0]) < _OLDEST:
        have = "is not installed" if found == "0" else f"is {found}"
        raise UsageError(
            f"sentence-transformers {have}; embkit's adapters are for version {_OLDEST}.",
            fix=f"pip install 'sentence-transformers>={_OLDEST}'",
        )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        _check()
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
