"""Training: the loop, checkpoints; `prefinetune` and `finetune`."""

from embkit.train.loop import finetune, prefinetune, train
from embkit.train.profile import Profile
from embkit.train.refresh import Miner

__all__ = ["Miner", "Profile", "finetune", "prefinetune", "train"]
