"""Training: the loop, checkpoints; `prefinetune` and `finetune`."""

from embkit.train.callbacks import Callback
from embkit.train.profile import Profile
from embkit.train.refresh import Miner
from embkit.train.stages import finetune, prefinetune, train

__all__ = ["Callback", "Miner", "Profile", "finetune", "prefinetune", "train"]
