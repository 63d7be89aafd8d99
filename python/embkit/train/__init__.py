"""Training: the plan, the loop, checkpoints; `prefinetune` and `finetune`."""

from embkit.train.loop import Profile, finetune, prefinetune, train
from embkit.train.plan import Plan

__all__ = ["Plan", "Profile", "finetune", "prefinetune", "train"]
