"""Checks before the first step: what cannot work is refused, with its reason."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit import _rust
from embkit.errors import CorruptError, UsageError
from embkit.model.encoder import positions
from embkit.model.tokens import load_tokenizer
from embkit.stage import digest_of, partial_dir, partials
from embkit.train.checkpoint import Checkpoint, newest_first, read_state

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.parallel import Ranks
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


def ranks_fit(config: Train, ranks: Ranks) -> None:
    """The recipe's numbers of ranks must fit those of the run.

    Raises:
        UsageError: fewer (or more) ranks than the recipe needs.
    """
    needed = sum(part.ranks for part in config.parts)
    if needed and ranks.world not in (1, needed):
        raise UsageError(
            f"The recipe's parts need {needed} ranks, this run has {ranks.world}.",
            where="parts",
            fix=f"start {needed} processes (torchrun --nproc-per-node={needed}), or one, in which "
            "the parts take turns",
        )
    if config.sharding != "replicate" and ranks.world % config.shard_ranks:
        raise UsageError(
            f"Sets of {config.shard_ranks} ranks do not divide {ranks.world} ranks.",
            where="shard_ranks",
            fix="give a divisor of the number of ranks, such as the GPUs of one machine",
        )


def same_start(ranks: Ranks, init_sha256: str) -> None:
    """Ranks that start from different weights would train as many models and publish one.

    Raises:
        UsageError: on every rank, when the weights of one differ from the first's.
    """
    if ranks.any(ranks.once(lambda: init_sha256) != init_sha256):
        raise UsageError(
            "The ranks start from different weights.",
            fix="load one model on all of them, or draw new weights from one seed",
        )


def gpu_is_there(device: torch.device) -> None:
    """The GPU that a launcher gave to this process must be one of the machine's.

    Raises:
        UsageError: there are fewer.
    """
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"This process is to train on GPU {device.index or 0}, counted from 0, of {count}.",
            where="LOCAL_RANK",
            fix=f"start a process per GPU: torchrun --nproc-per-node={max(count, 1)}",
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


def identity(
    stage_digest: str, config: Mapping[str, Any], encoder: Encoder, store: Any
) -> dict[str, Any]:
    """What a checkpoint must agree with to belong to a run; it is part of its state.json."""
    tokenizer = _rust.blake3(encoder.tokenizer.json.encode())
    return {
        "stage_digest": stage_digest,
        "data_digest": digest_of(store.path),
        "config": json.loads(json.dumps(dict(config))),  # as state.json will have it
        "dims": list(encoder.dims),
        "tokenizer": tokenizer,
    }


def checkpoint_fits(found: Checkpoint, wanted: Mapping[str, Any]) -> None:
    """A checkpoint must be of this very run.

    Args:
        wanted: what :func:`identity` gave, and the ``cursor`` of the plan.

    Raises:
        UsageError: it is of other settings, widths, data, another tokenizer or another plan.
    """
    if any(found.state.get(field) != value for field, value in wanted.items()):
        raise UsageError(
            f"The checkpoint is {differences(found.state, wanted)}.",
            where=found.path,
            fix="run with --fresh, or give the run another output directory",
        )


def no_other_run(out: Path, digest: str, wanted: Mapping[str, Any]) -> None:
    """An unfinished run of other settings or data must not be lost unseen.

    Raises:
        UsageError: there is one for this output, with checkpoints.
    """
    for partial in partials(out):
        if partial == partial_dir(out, digest):
            continue
        for path in newest_first(partial / "checkpoints"):
            try:
                state = read_state(path)
            except (CorruptError, OSError):
                continue
            raise UsageError(
                f"There is an unfinished run for this output, {state['step']} steps in, "
                f"{differences(state, wanted)}.",
                where=partial,
                fix="to go on with it, undo the change; to give it up, remove that directory, or "
                "run with --fresh (of `embkit run`: --from this stage); or choose another output",
            )


def differences(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In which way a checkpoint's state is not of the run that is wanted, most telling first."""
    if state.get("tokenizer") not in (None, wanted["tokenizer"]):
        return "of a model with another tokenizer"
    if state.get("dims") not in (None, wanted["dims"]):
        return f"of a model with widths {state['dims']}, not {wanted['dims']}"
    before, now = state.get("config", {}), wanted["config"]
    changed = [
        f"{key} = {before.get(key, 'not set')!r} (now {now.get(key, 'not set')!r})"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        return f"of other settings: {', '.join(changed)}"
    if state.get("data_digest") != wanted["data_digest"]:
        return "on other data: the store has changed"
    if state.get("parameter_groups") != wanted.get(
        "parameter_groups", state.get("parameter_groups")
    ):
        return "of a model with other blocks"
    if state.get("cursor") != wanted.get("cursor", state.get("cursor")):
        return "of another plan"
    return "of another start model, other negatives or another recipe"
