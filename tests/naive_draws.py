"""The reference of the Rust plan's randomness: counter-based draws and keyed permutations.

A draw is a hash of what it is for (seed, task, epoch, example), so any position of any epoch can be
computed alone, in any thread, on any machine. numpy only.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


def key_of(*parts: int | str) -> int:
    """A 64-bit key from a path such as ``(seed, "rows", task, epoch)``; types are kept apart."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, u64 to u64, elementwise."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def draws(key: int, counters: np.ndarray) -> np.ndarray:
    """Uniform u64 for each counter: SplitMix64 started at ``key``, at position ``counter``."""
    with np.errstate(over="ignore"):
        start = np.uint64(key) + _GOLDEN * (np.asarray(counters, np.uint64) + np.uint64(1))
        return mix(mix(start) ^ np.uint64(key))


def sample(key: int, items: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """Draw without replacement, for each item its own set.

    Args:
        key: of this use and epoch.
        items: u64 [b], what makes the draws of a row its own (example numbers).
        sizes: int [b], how many there are to choose from in each row.
        count: how many to draw.

    Returns:
        int64 [b, count] positions below ``sizes``, -1 where a row has fewer than ``count``.
    """
    widest = int(sizes.max(initial=0))
    out = np.full((len(items), count), -1, np.int64)
    if widest == 0 or count == 0:
        return out
    column = np.arange(widest, dtype=np.uint64)
    own = draws(key, np.asarray(items, np.uint64))
    with np.errstate(over="ignore"):
        order = mix(own[:, None] + _GOLDEN * (column + np.uint64(1)))
    # The largest value marks absent columns; a real draw of it would only sort a row's last.
    order = np.where(column < np.asarray(sizes, np.uint64)[:, None], order, np.uint64(2**64 - 1))
    chosen = np.argsort(order, axis=1, kind="stable")[:, :count]
    have = np.arange(chosen.shape[1]) < np.asarray(sizes)[:, None]
    out[:, : chosen.shape[1]] = np.where(have, chosen, -1)
    return out


def permute(n: int, key: int, start: int, count: int) -> np.ndarray:
    """``count`` values from ``start`` of the keyed permutation of [0, n), u64; by the Rust core."""
    from embkit import _rust

    return np.asarray(_rust.permute(n, key, start, count))


def permute_naive(n: int, key: int, start: int, count: int) -> np.ndarray:
    """The same in numpy, from the text of docs/formats.md: what the tests compare against."""
    bits = max(int(n) - 1, 0).bit_length()
    left, right = bits // 2, bits - bits // 2
    with np.errstate(over="ignore"):
        keys = mix(np.uint64(key) + _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64))
        x = np.arange(start, start + count, dtype=np.uint64)
        walking = np.ones(count, bool)
        while walking.any():
            wl, wr = left, right
            left_half = x >> np.uint64(wr)
            right_half = x & np.uint64((1 << wr) - 1)
            for k in keys:
                f = mix(right_half ^ k) & np.uint64((1 << wl) - 1)
                left_half, right_half = right_half, left_half ^ f
                wl, wr = wr, wl
            x = np.where(walking, (left_half << np.uint64(wr)) | right_half, x)
            walking = x >= np.uint64(n)
    return x
