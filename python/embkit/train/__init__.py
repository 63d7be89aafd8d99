"""Training: the loop, checkpoints; `prefinetune` and `finetune`."""

from embkit.train.callbacks import Callback
from embkit.train.loop import finetune, prefinetune, train
from embkit.train.profile import Profile
from embkit.train.refresh import Miner

__all__ = ["Callback", "Miner", "Profile", "finetune", "prefinetune", "train"]
