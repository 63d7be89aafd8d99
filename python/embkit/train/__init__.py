"""Training: the loop, checkpoints; `prefinetune` and `finetune`."""

from embkit.train.loop import Profile, finetune, prefinetune, train

__all__ = ["Profile", "finetune", "prefinetune", "train"]
