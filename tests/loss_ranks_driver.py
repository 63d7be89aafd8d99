"""Losses over ranks on embeddings that are there: value and gradient of each rank's own rows.

    python loss_ranks_driver.py OUT WORLD

OUT/<case>-<world>-<rank>.npz has what a rank adds to the loss, to each width's and to the gradient.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from loss_forms import Batch, drawn

from embkit.losses import value_and_grad
from embkit.recipe import Loss, Train
from embkit.recipe.loss import FORMS
from embkit.train.parallel import Ranks, Share

DIMS = (8, 3)
CONFIG = Train(temperature=0.2, steps=10)
SETTINGS: dict[str, dict[str, Any]] = {
    **{form: {"form": form} for form in FORMS},
    "shared": {"hard": "shared"},
    "shared alone": {"form": "conan", "hard": "shared"},
    "gecko shared": {"form": "gecko", "hard": "shared", "mask": "positives"},
    "qwen3 unmasked": {"form": "qwen3", "mask": "off", "margin_rule": "relative", "margin": -0.1},
    "symmetric": {"symmetric": True},
    "queries only": {"in_batch": False, "same_tower": True},
    "documents": {"doc_doc": True, "dim_weights": {"3": 0.5}},
    "added": {"spread_out": 0.5, "distill": 0.7, "distill_scores": 0.3},
    "ring gecko": {"form": "gecko", "mask": "positives", "margin": -0.1, "margin_rule": "relative"},
    "ring gemma": {"form": "embedding-gemma", "distill": 0.5, "distill_scores": 0.3},
    "ring unmasked": {"mask": "off", "dim_weights": {"3": 0.5}},
    "guided": {"guide": "absolute", "guide_margin": 0.1},
    "guided gecko": {"form": "gecko", "guide": "relative", "guide_margin": -0.1},
    "guided shared": {"form": "qwen3", "hard": "shared", "guide": "absolute", "guide_margin": 0.3},
    "guided alone": {"form": "conan", "guide": "absolute", "mask": "off"},
    "sts": {"distill": 0.7, "dim_weights": {"8": 0.25}},
}


def batch_of(case: str) -> Batch:
    return drawn(1, b=7, kind="sts" if case == "sts" else "retrieval", h=0 if case == "sts" else 3)


def dealt(world: int, rank: int) -> torch.Tensor:
    """Rows of a rank: counts that differ by one, in an order that is nobody's."""
    return torch.tensor([5, 0, 3, 6, 1, 4, 2])[rank::world]


def teacher_of(batch: Batch) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.randn(len(batch.e), 5, generator=g, dtype=torch.float64)


def found(case: str, args: tuple[Any, ...], share: Share | None) -> dict[str, np.ndarray]:
    out, gradient = value_and_grad(
        *args, dims=DIMS, config=CONFIG, loss=Loss(**SETTINGS[case]), share=share,
        teacher=teacher_of(batch_of(case)),
        temperature=torch.tensor(0.2, dtype=torch.float64),
    )  # fmt: skip
    assert out.d_temperature is not None
    return {
        "loss": out.loss.numpy(),
        "per_dim": out.per_dim.numpy(),
        "d_temperature": out.d_temperature.numpy(),
        "gradient": gradient.numpy(),
    }


def work(out: Path, world: int, rank: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meet-{world}", rank=rank, world_size=world,
        timeout=timedelta(seconds=30),
    )  # fmt: skip
    for case in SETTINGS:
        share = Share(Ranks(dist.group.WORLD), 7, ring=case.startswith("ring"))
        args = batch_of(case).rows(dealt(world, rank))
        np.savez(out / f"{case}-{world}-{rank}.npz", **found(case, args, share))  # type: ignore[arg-type]
    dist.destroy_process_group()


def main() -> None:
    out, worlds = Path(sys.argv[1]), [int(w) for w in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    for world in worlds:
        children = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    work(out, world, rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert codes == [0] * world, (world, codes)


if __name__ == "__main__":
    main()
