"""Embeddings of evaluation texts: each text is encoded once, ever, per model and prompt.

Raw vectors of the full width are kept, so every MRL width and precision is a cut of the same
encode. A text is known by a digest of role, prompt and text, below a directory named by the
model's digest; whatever changes a vector changes one of the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embkit import _rust, container
from embkit.errors import CorruptError, UsageError
from embkit.evaluate.run import Vectors, prefix

if TYPE_CHECKING:
    from embkit.model import Encoder

KIND = "embkit.text_embeddings"
PRECISIONS = ("float", "int8", "binary")
_KEY = 16  # bytes of a text's digest
_BLOCK = 16384  # texts of a file: what a kill loses at most


class TextVectors:
    """Vectors of texts, made when first asked for.

    Args:
        encoder: the model.
        cache: keep vectors below this directory, in one folder per model; None keeps them in
            memory until :meth:`forget`.

    Attributes:
        encoded: how many texts this object has had encoded; what the cache had is not counted.
        model: digest of the encoder.
    """

    def __init__(self, encoder: Encoder, cache: Path | str | None = None) -> None:
        self.encoder = encoder
        self.encoded = 0
        self.model = encoder.digest()
        self._directory = Path(cache) / self.model[:32] if cache is not None else None
        self._blocks: list[NDArray[np.float32]] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            _rust.sweep_tmp(str(self._directory))
            for path in sorted(self._directory.glob("*.safetensors")):
                self._open(path)

    def get(self, texts: Sequence[str], *, role: str | None, prompt: str | None) -> Vectors:
        """Raw vectors of texts.

        Args:
            texts: n texts, repeats allowed.
            role, prompt: as in ``Encoder.encode``.

        Returns:
            float32 [n, D], not normalised.
        """
        before = f"{role or ''}\0{prompt if prompt is not None else ''}\0{prompt is None}\0"
        keys = [
            hashlib.blake2b((before + text).encode("utf-8", "replace"), digest_size=_KEY).digest()
            for text in texts
        ]
        missing = {k: t for k, t in zip(keys, texts, strict=True) if k not in self._place}
        names, lacking = list(missing), list(missing.values())
        for start in range(0, len(names), _BLOCK):
            part = slice(start, start + _BLOCK)
            made = self.encoder.encode(lacking[part], role=role, prompt=prompt, normalize=False)
            self._add(names[part], np.asarray(made, np.float32))
            self.encoded += len(names[part])
        out = np.empty((len(texts), self.encoder.width), np.float32)
        places = np.array([self._place[k] for k in keys], np.int64).reshape(-1, 2)
        for i in np.unique(places[:, 0]).tolist():
            here = places[:, 0] == i
            out[here] = self._blocks[i][places[here, 1]]
        return out

    def forget(self) -> None:
        """Free the memory of vectors that no file holds."""
        if self._directory is None:
            self._blocks.clear()
            self._place.clear()

    def _add(self, keys: list[bytes], vectors: Vectors) -> None:
        if self._directory is None:
            self._enter(keys, vectors)
            return
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY)
        name = hashlib.blake2b(packed.tobytes(), digest_size=_KEY).hexdigest()
        path = self._directory / f"{name}.safetensors"
        container.save(
            path,
            {"key": packed, "embedding": vectors},
            kind=KIND,
            metadata={"model": self.model, "normalised": "false"},
        )
        if not self._open(path):
            raise CorruptError("These vectors cannot be read back.", where=path)

    def _open(self, path: Path) -> bool:
        """Take over a file that is whole and of this model; others are as if they were not there:
        their texts are encoded again."""
        try:
            found = container.load(path, kind=KIND, verify="open")
            of = container.metadata(path).get("model")
        except CorruptError:
            return False
        keys, vectors = found["key"], found["embedding"]
        if of != self.model or vectors.shape != (len(keys), self.encoder.width):
            return False
        self._enter([row.tobytes() for row in keys], vectors)
        return True

    def _enter(self, keys: Sequence[bytes], vectors: Vectors) -> None:
        at = len(self._blocks)
        self._blocks.append(vectors)
        self._place.update((key, (at, i)) for i, key in enumerate(keys))


def quantised(vectors: Vectors, width: int, precision: str) -> Vectors:
    """Unit vectors whose inner products are those of the stored precision.

    ``int8`` rounds each vector to 255 steps of its own largest number (a scale per vector, which a
    cosine does not see). ``binary`` keeps the signs: the cosine is 1 - 2 x Hamming distance /
    width. Queries and passages are treated alike.

    Args:
        vectors: float32 [n, D].
        width: numbers kept of each.
        precision: ``"float"``, ``"int8"`` or ``"binary"``.

    Returns:
        float32 [n, width].

    Raises:
        UsageError: another precision.
    """
    cut = prefix(vectors, width)
    if precision == "float":
        return cut
    if precision == "int8":
        peak = np.abs(cut).max(axis=1, keepdims=True, initial=0)
        codes = np.rint(cut * (127 / np.where(peak > 0, peak, 1))).astype(np.int8)
        return prefix(codes.astype(np.float32), width)
    if precision == "binary":
        return prefix(np.where(cut > 0, np.float32(1), np.float32(-1)), width)
    raise UsageError(f"Unknown precision {precision!r}.", fix=f"one of {', '.join(PRECISIONS)}")
