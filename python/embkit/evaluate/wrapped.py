"""An encoder as `mteb` wants it: one width, one precision, vectors from the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embkit.evaluate.run import Vectors
from embkit.evaluate.vectors import TextVectors, quantised

if TYPE_CHECKING:
    from embkit.model import Encoder

# mteb's types of tasks, by our word for the kind
TYPES = {
    "Retrieval": "retrieval",
    "InstructionRetrieval": "instruction_retrieval",
    "InstructionReranking": "instruction_retrieval",
    "Reranking": "reranking",
    "STS": "sts",
    "PairClassification": "pairclass",
    "Classification": "classification",
    "MultilabelClassification": "multilabel",
    "Clustering": "clustering",
    "BitextMining": "bitext",
    "Summarization": "summarization",
}
_ROLES = {"query": "query", "document": "passage"}


class WrappedEncoder:
    """What ``mteb.evaluate`` takes as a model.

    Args:
        vectors: the encoder with its cache.
        width, precision: see :func:`embkit.evaluate.vectors.quantised`.
        name: ``organisation/model``, as results carry it.
    """

    def __init__(self, vectors: TextVectors, *, width: int, precision: str, name: str) -> None:
        from mteb.models import ModelMeta

        self.vectors, self.width, self.precision = vectors, width, precision
        full = width == vectors.encoder.width and precision == "float"
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name if full else f"{name}-{width}-{precision}",
                "revision": vectors.model[:40],
                "embed_dim": width,
                "max_tokens": float(max(vectors.encoder.max_length.values())),
                "framework": ["PyTorch"],
            }
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **more: Any
    ) -> Vectors:
        """Unit vectors of a loader's texts.

        Args:
            inputs: mteb's loader.
            task_metadata: of the task; with ``prompt_type`` it decides the prompt.
            more: what mteb passes beside (split, subset, batch size): it changes nothing here.

        Returns:
            float32 [n, width], in the order of the texts.
        """
        side = getattr(prompt_type, "value", prompt_type)
        role, prompt = prompt_of(self.vectors.encoder, task_metadata, side)
        raw = self.vectors.get(_texts(inputs), role=role, prompt=prompt)
        return quantised(raw, self.width, self.precision)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """Cosines [n, m] of unit vectors [n, d] and [m, d]; a number for two vectors."""
        return np.asarray(embeddings1) @ np.asarray(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> NDArray[np.float32]:
        """Cosines [n] of unit vectors [n, d], row by row."""
        return np.einsum("nd,nd->n", np.asarray(embeddings1), np.asarray(embeddings2))


def prompt_of(encoder: Encoder, metadata: Any, side: str | None) -> tuple[str | None, str | None]:
    """The role and the prompt a task's texts are encoded with.

    A prompt under the task's name comes first (``"NAME passage"`` for passages), then that of the
    role, or of the kind (``sts``, ``clustering`` ...) where a task has no roles.

    Args:
        metadata: mteb's metadata of the task.
        side: ``"query"``, ``"document"`` or None.
    """
    role = _ROLES.get(side or "")
    name = str(metadata.name)
    if role is None:
        kind = TYPES.get(str(metadata.type), "")
        return None, encoder.prompts.get(name, encoder.prompts.get(kind))
    return role, encoder.prompts.get(name if role == "query" else f"{name} passage")


def _texts(inputs: Any) -> list[str]:
    """The texts of a loader; whole columns at once where it reads a table."""
    table = getattr(inputs, "dataset", None)
    if "text" in (getattr(table, "column_names", None) or ()):
        return list(table["text"])  # type: ignore[index]
    return [text for batch in inputs for text in batch["text"]]
