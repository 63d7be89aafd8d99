"""Bench group `store`: from ids to shards and from shards to batches, beside every rival."""

from __future__ import annotations

from embkit.bench.store_batches import batches, packed
from embkit.bench.store_files import cold, opened, verify, verify_gather, write
from embkit.bench.store_plan import growth, no_duplicates, resume, resume_plan
from embkit.bench.store_steps import (
    large_steps_packed,
    large_steps_padded,
    steps_packed,
    steps_padded,
    vs_st,
    vs_st_once,
)
from embkit.bench.tokenizing import tokenize, tokenize_bpe

CASES = (
    tokenize,
    tokenize_bpe,
    batches,
    packed,
    steps_packed,
    steps_padded,
    large_steps_packed,
    large_steps_padded,
    vs_st,
    vs_st_once,
    write,
    verify,
    verify_gather,
    no_duplicates,
    growth,
    resume_plan,
    opened,
    resume,
    cold,
)
