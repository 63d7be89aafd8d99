"""Vectors of texts: each encoded once, found again on disk; quantised ones against bit counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embkit.errors import UsageError
from embkit.evaluate.run import prefix
from embkit.evaluate.vectors import TextVectors, quantised

TEXTS = ["small text library", "fast image", "small text library", "old sound"]


def test_each_text_is_encoded_once_per_prompt(encoder: Any, tmp_path: Path) -> None:
    vectors = TextVectors(encoder, tmp_path)
    first = vectors.get(TEXTS, role=None, prompt=None)
    assert vectors.encoded == 3
    # What stands in one batch with a text moves its vector by a rounding.
    assert first == pytest.approx(encoder.encode(TEXTS, normalize=False), abs=1e-5)
    assert np.array_equal(first[0], first[2])
    assert np.array_equal(vectors.get(TEXTS[1:], role=None, prompt=None), first[1:])
    assert vectors.encoded == 3
    vectors.get(TEXTS[:2], role="query", prompt=None)  # another length limit
    assert vectors.encoded == 5
    asked = vectors.get(["old sound"], role=None, prompt="about: ")
    assert vectors.encoded == 6
    want = encoder.encode(["about: old sound"], normalize=False)
    assert asked == pytest.approx(want, abs=1e-5)
    assert np.abs(asked - first[3]).max() > 1e-2


def test_a_second_evaluation_encodes_nothing(encoder: Any, tmp_path: Path) -> None:
    first = TextVectors(encoder, tmp_path).get(TEXTS, role=None, prompt=None)
    again = TextVectors(encoder, tmp_path)
    again.forget()  # files stay
    assert np.array_equal(again.get(TEXTS, role=None, prompt=None), first)
    assert again.encoded == 0


def test_a_damaged_file_is_encoded_again(encoder: Any, tmp_path: Path) -> None:
    want = TextVectors(encoder, tmp_path).get(TEXTS, role=None, prompt=None)
    (file,) = tmp_path.rglob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 255
    file.write_bytes(raw)
    again = TextVectors(encoder, tmp_path)
    assert np.array_equal(again.get(TEXTS, role=None, prompt=None), want)
    assert again.encoded == 3
    assert TextVectors(encoder, tmp_path).get(TEXTS, role=None, prompt=None).shape == want.shape


def test_another_model_has_vectors_of_its_own(encoder: Any, tmp_path: Path) -> None:
    import copy

    TextVectors(encoder, tmp_path).get(TEXTS, role=None, prompt=None)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    vectors = TextVectors(other, tmp_path)
    vectors.get(TEXTS, role=None, prompt=None)
    assert vectors.encoded == 3


def test_without_a_directory_vectors_last_until_forgotten(encoder: Any) -> None:
    vectors = TextVectors(encoder)
    vectors.get(TEXTS, role=None, prompt=None)
    vectors.get(TEXTS, role=None, prompt=None)
    assert vectors.encoded == 3
    vectors.forget()
    vectors.get(TEXTS, role=None, prompt=None)
    assert vectors.encoded == 6


@pytest.fixture
def raw() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(30, 64)).astype(np.float32)


def test_binary_cosine_is_the_hamming_distance(raw: np.ndarray) -> None:
    got = quantised(raw, 48, "binary")
    bits = np.packbits(raw[:, :48] > 0, axis=1)
    apart = np.bitwise_count(bits[:, None] ^ bits[None]).sum(axis=2)
    assert got @ got.T == pytest.approx(1 - 2 * apart / 48, abs=1e-6)


def test_int8_cosine_is_that_of_whole_numbers(raw: np.ndarray) -> None:
    """One scale per vector: the cosine of the codes is that of the decoded vectors."""
    got = quantised(raw, 48, "int8")
    unit = prefix(raw, 48)
    codes = np.round(unit / np.abs(unit).max(axis=1, keepdims=True) * 127).astype(np.int64)
    assert np.abs(codes).max() == 127
    want = (codes @ codes.T) / np.sqrt(np.outer((codes**2).sum(1), (codes**2).sum(1)))
    assert got @ got.T == pytest.approx(want, abs=1e-6)
    assert np.abs(got @ got.T - unit @ unit.T).max() < 0.01
    assert not np.array_equal(got, unit)


def test_float_is_the_prefix_and_zeros_stay_finite(raw: np.ndarray) -> None:
    assert np.array_equal(quantised(raw, 48, "float"), prefix(raw, 48))
    zero = np.zeros((1, 8), np.float32)
    assert all(np.isfinite(quantised(zero, 8, p)).all() for p in ("float", "int8", "binary"))
    with pytest.raises(UsageError, match="Unknown precision 'int4'"):
        quantised(raw, 8, "int4")
