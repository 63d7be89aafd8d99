"""`embkit run`: all stages of a recipe, and what the single verbs share with it.

running.py   run(): the stages in order, over ranks
order.py     which stages there are, and what each publishes
options.py   what a recipe says, as the arguments of the stages
llm.py       synth, judge and relabel; costs.py is what they will ask
results.py   soup, scores, export, result.json, report.html
telling.py   --dry-run and `embkit explain`
"""

from embkit.pipeline.options import (
    data_folder,
    dedup_options,
    filter_options,
    kinds_of,
    mined_classes,
    mined_tasks,
    miner,
    read_options,
    relabelled_tasks,
    start_encoder,
    tokenizer_options,
    training_files,
)
from embkit.pipeline.order import STAGES, stages_of
from embkit.pipeline.running import run
from embkit.pipeline.telling import describe, explain, known_tasks

__all__ = [
    "STAGES",
    "data_folder",
    "dedup_options",
    "describe",
    "explain",
    "filter_options",
    "kinds_of",
    "known_tasks",
    "mined_classes",
    "mined_tasks",
    "miner",
    "read_options",
    "relabelled_tasks",
    "run",
    "stages_of",
    "start_encoder",
    "tokenizer_options",
    "training_files",
]
