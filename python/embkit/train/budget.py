"""`token_budget = 0`: how large a micro-batch may be, found by trying it on the GPU.

How rows are cut into micro-batches shows in the last bits of a model, and what fits depends on the
machine. So the number that was found is written down before the first step, in the run's directory
and in every checkpoint, and a run that goes on keeps it, wherever it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from embkit import _rust
from embkit.errors import CorruptError, UsageError
from embkit.train.batches import MicroBatch, layout_of
from embkit.train.callbacks import random_state_kept

if TYPE_CHECKING:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train.parallel import Ranks

FILE = "token_budget.json"
# No memory to fill there. A step takes the same time from 2048 to 16384 (three layers of MiniLM,
# one thread: 9.8 to 10.7 s of CPU for 17,471 tokens; 12.1 s with 1024).
CPU_TOKENS = 4096
_STEPS = 8  # the answer is within an eighth of the largest
_MARGIN = 0.1  # of the memory, left alone: fragments, and what other libraries take


def settled(config: Train, encoder: Encoder, longest: int, *, folder: Path, ranks: Ranks) -> int:
    """The token budget of a run: the recipe's, or the one that was found. Every rank calls this.

    Args:
        config: with ``token_budget = 0`` for one to be found. encoder: on its device; left as it
            was.
        longest: tokens of the longest row. folder: the run's partial directory.
        ranks: of the run; the least of their budgets is that of all.

    Raises:
        UsageError: not even one row fits; or weights are sharded, whose ranks cannot try alone.
        CorruptError: what was written down is not readable.
    """
    if config.token_budget:
        return config.token_budget
    path = folder / FILE
    told = ranks.once(lambda: _read(path) if path.is_file() else 0)
    if told:
        return int(told)
    found = CPU_TOKENS if encoder.device.type == "cpu" else probe(config, encoder, longest)
    each = ranks.gather(torch.tensor([found], device=ranks.device()))
    least = int(each.min())
    ranks.once(lambda: _rust.publish_file(str(path), json.dumps({"token_budget": least}).encode()))
    return least


def largest(fits: Callable[[int], bool], *, start: int, most: int) -> int:
    """The largest number for which ``fits``, to an eighth, by doubling and then halving steps.

    Args:
        fits: monotone; called a few times. start: the first to try. most: no need for more.

    Returns:
        0 where not even ``start`` fits.

    >>> largest(lambda n: n <= 1000, start=100, most=10**6)
    1000
    """
    if not fits(start):
        return 0
    low = start
    while low < most and fits(min(2 * low, most)):
        low = min(2 * low, most)
    step = low // 2
    while low < most and step and 2 * _STEPS * step >= low:
        if low + step < most and fits(low + step):
            low += step
        step //= 2
    return low


def trial(
    encoder: Encoder,
    tokens: int,
    longest: int,
    *,
    packed: bool = False,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Forward and backward of a micro-batch of ``tokens``, rows of ``longest``, in training mode
    (dropout keeps masks, blocks may be recomputed); leaves no trace.

    Raises:
        torch.OutOfMemoryError: there is no room for it.
    """
    rows, device = max(tokens // longest, 1), encoder.device
    ids = torch.full((rows, longest), encoder.tokenizer.pad_id, dtype=torch.int64, device=device)
    prompt = torch.zeros(rows, dtype=torch.int64, device=device)
    if packed:
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * longest
        micro = MicroBatch(
            ids=ids.flatten(), prompt_len=prompt, longest=longest, cu_seqlens=ends
        )  # fmt: skip
    else:
        micro = MicroBatch(
            ids=ids, prompt_len=prompt, longest=longest, mask=torch.ones_like(ids)
        )  # fmt: skip
    was = encoder.training
    with random_state_kept():
        try:
            encoder.train()
            with torch.enable_grad(), around():
                e_BD = micro.embed(encoder)
            torch.autograd.backward(e_BD, torch.zeros_like(e_BD))
        finally:
            encoder.train(was)
            for parameter in encoder.parameters():
                parameter.grad = None


def reserved(config: Train, encoder: Encoder) -> int:
    """Bytes that a step has beside a micro-batch: moments, averages, kept graphs, embeddings."""
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    copies = 2 + bool(config.ema)
    # Embeddings, their gradients, and two more of each while the loss is taken.
    batch = 4 * 4 * _rows(config) * encoder.dims[0]
    return 4 * copies * trained + int(config.graph_memory * 2**30) + batch


def probe(
    config: Train,
    encoder: Encoder,
    longest: int,
    fits: Callable[[Callable[[], None]], bool] | None = None,
) -> int:
    """Tokens of the largest micro-batch, whole rows of ``longest``, that fits on this process.

    Args:
        fits: whether a piece of work has enough memory; by default on the encoder's GPU.

    Raises:
        UsageError: not even one row fits, or weights are sharded.
    """
    if config.sharding != "replicate":
        raise UsageError(
            "token_budget = 0 is found by each rank alone, which sharded weights do not allow.",
            where="token_budget",
            fix="give a number, e.g. token_budget = 16384",
        )
    rest = reserved(config, encoder)
    enough = fits or partial(_on_gpu, encoder.device, rest)
    packed = layout_of(encoder, config) == "packed"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

    def around() -> AbstractContextManager[Any]:
        return nullcontext() if half is None else torch.autocast(encoder.device.type, dtype=half)

    def rows_fit(rows: int) -> bool:
        return enough(
            partial(trial, encoder, rows * longest, longest, packed=packed, around=around)
        )

    found = largest(rows_fit, start=1, most=_rows(config)) * longest
    if not found:
        raise UsageError(
            f"A text of {longest} tokens does not fit beside {rest / 2**30:.1f} GiB for the "
            "optimizer and kept graphs.",
            where="token_budget",
            fix="lower graph_memory or the batch size, set model.gradient_checkpointing, or use "
            'precision = "bf16"',
        )
    return found


def _on_gpu(device: torch.device, rest: int, work: Callable[[], None]) -> bool:
    """Whether work leaves ``rest`` bytes and the margin of what this process can have."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, _ = torch.cuda.mem_get_info(device)
    room = free + torch.cuda.memory_reserved(device)
    try:
        work()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(device) + rest <= (1 - _MARGIN) * room


def _rows(config: Train) -> int:
    """The most rows that one process may have of a batch."""
    return max(p.batch_size * (2 + p.hard_negatives) for p in config.parts or (config,))


def _read(path: Path) -> int:
    try:
        found = json.loads(path.read_bytes())["token_budget"]
        if isinstance(found, int) and found > 0:
            return found
    except (ValueError, KeyError, TypeError):
        pass
    raise CorruptError(
        "The token budget of the run is not readable.", where=path, fix="run the stage with --fresh"
    )
