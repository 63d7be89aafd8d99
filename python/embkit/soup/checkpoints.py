"""Checkpoints of one run as ingredients: each is written as a model directory first."""

from __future__ import annotations

from pathlib import Path

from embkit.errors import UsageError


def chosen(run: Path, which: str) -> list[Path]:
    """Checkpoints of a finished run, the oldest first.

    Args:
        run: a training run's directory.
        which: ``"all"``, ``"last:5"``, or their steps, ``"800,900,1000"``.

    Raises:
        UsageError: there are none, fewer than asked for, or ``which`` is none of these.
    """
    from embkit.train.checkpoint import newest_first, step_of

    found = newest_first(run / "checkpoints")[::-1] if (run / "checkpoints").is_dir() else []
    there = {step_of(path): path for path in found}
    if not there:
        raise UsageError("The run has no checkpoints.", where=run, fix="give a training run")
    steps = list(there)
    word, _, count = which.partition(":")
    if which == "all":
        wanted = steps
    elif word == "last" and count.isdecimal() and int(count) > 0:
        wanted = steps[-int(count) :] if int(count) <= len(steps) else [*steps, -1]
    elif all(part.strip().isdecimal() for part in which.split(",")):
        wanted = sorted({int(part) for part in which.split(",")})
    else:
        raise UsageError(
            f"checkpoints = {which!r} names none.", where="checkpoints",
            fix='give "all", "last:5" or steps, "800,900,1000"',
        )  # fmt: skip
    if any(step not in there for step in wanted):
        raise UsageError(
            f"checkpoints = {which!r}, and the run has those of step {', '.join(map(str, steps))}.",
            where=run,
            fix="train with keep_checkpoints as large as the number to average",
        )
    return [there[step] for step in wanted]


def write_model(run: Path, checkpoint: Path, out: Path) -> Path:
    """Write the weights of a checkpoint as a model directory; all else is the finished model's.

    The model is held in memory once, as the training did: adapters have to be merged, and the
    parts of several ranks put together. The weights are those of the step, not their moving
    average where the run keeps one.

    Raises:
        CorruptError: a damaged checkpoint.
    """
    from embkit.model import Encoder
    from embkit.train import checkpoint as checkpoints
    from embkit.train.sharding import load_state

    found = checkpoints.load(checkpoint)
    encoder = Encoder.from_pretrained(run / "model")
    load_state(encoder, found.model)
    return encoder.export(out)
