"""Checks before the first step: what cannot work is refused, with its reason."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import UsageError
from embkit.model.encoder import positions
from embkit.model.tokens import load_tokenizer
from embkit.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.refresh import Miner


def before_training(encoder: Encoder, store: Any) -> None:
    """The store's tokens must be this encoder's tokens.

    Raises:
        UsageError: another tokenizer or prompt, more tokens than embeddings, or texts longer than
            the position table.
    """
    theirs = load_tokenizer(store.tokenizer)
    if theirs.json != encoder.tokenizer.json:
        raise UsageError(
            "The store was tokenised with another tokenizer than the encoder's.",
            where=store.path,
            fix="tokenize again with this model's tokenizer, or start from a model made for the "
            "store",
        )
    for role, prompt in store.prompts.items():
        own = encoder.prompts.get(role, "")
        if own and own != prompt:
            raise UsageError(
                f"The store was tokenised with the {role} prompt {prompt!r}, the encoder serves "
                f"with {own!r}.",
                where=store.path,
                fix="tokenize again with the encoder's prompts, or give the encoder the store's",
            )
    embeddings = encoder.backbone.get_input_embeddings().num_embeddings
    if theirs.vocab_size > embeddings:
        raise UsageError(
            f"The tokenizer has {theirs.vocab_size} tokens, the model embeds {embeddings}.",
            where=store.path,
            fix="use the tokenizer that belongs to the model",
        )
    longest = max(store.max_length.values())
    if longest > positions(encoder.backbone):
        raise UsageError(
            f"Texts of the store have up to {longest} tokens, the model takes "
            f"{positions(encoder.backbone)}.",
            where=store.path,
            fix="tokenize with a smaller max_length_query and max_length_passage",
        )


def negatives_dir(negatives: Any) -> Path | None:
    """The directory of mined negatives: a path, or an object that knows its own."""
    if negatives is None:
        return None
    if not isinstance(negatives, (str, os.PathLike)):
        negatives = getattr(negatives, "dir", None) or getattr(negatives, "path", None)
    if not isinstance(negatives, (str, os.PathLike)):
        raise UsageError(
            "negatives is neither a directory nor what mine() returned.",
            fix="give the directory that embkit mine wrote",
        )
    return Path(negatives)


def miner_for(config: Train, refresh: Miner | None) -> Miner | None:
    """The miner of a run whose settings ask for refreshes; None for others.

    Raises:
        UsageError: they ask for it, and there is none.
    """
    if config.refresh_every and refresh is None:
        raise UsageError(
            f"refresh_every = {config.refresh_every}, and nothing that mines.",
            fix="give refresh=embkit.train.Miner(...), or set refresh_every = 0",
        )
    return refresh if config.refresh_every else None


def checkpoint_fits(
    found: Checkpoint, *, stage_digest: str, data_digest: str, cursor: Mapping[str, int]
) -> None:
    """A checkpoint must be of this very run.

    Raises:
        UsageError: it is of other settings, other data or another plan.
    """
    for field, want, what in (
        ("stage_digest", stage_digest, "of other settings or another start model"),
        ("data_digest", data_digest, "on other data: the store has changed"),
        ("cursor", dict(cursor), "of another plan"),
    ):
        if found.state.get(field) != want:
            raise UsageError(
                f"The checkpoint is {what}.",
                where=found.path,
                fix="run with --fresh, or give the run another output directory",
            )
