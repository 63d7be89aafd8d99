"""Recipes: the dataclasses are the schema, TOML is the interchange.

A recipe says everything that decides a run's numbers. `load` reads TOML over the defaults, `save`
writes the resolved recipe, and that file reproduces the run. Values that only change speed
(threads, progress) are not part of it.
"""

from embkit.recipe.data import Data, Dedup, Filter, Tokenizer
from embkit.recipe.files import (
    apply_override,
    builtin,
    from_table,
    load,
    read_table,
    save,
    to_table,
)
from embkit.recipe.llm import JudgeStage, LabelledTask, Llm, RelabelStage, Synth
from embkit.recipe.loss import Loss
from embkit.recipe.mine import Dynamic, Rules
from embkit.recipe.mix import Mix
from embkit.recipe.model import Model
from embkit.recipe.prompts import FORMATS, Format
from embkit.recipe.tasks import RULES, Conversion, Task
from embkit.recipe.train import Part, Train, Watch
from embkit.recipe.whole import Evaluate, Recipe, Soup

__all__ = [
    "Synth",
    "RelabelStage",
    "Llm",
    "LabelledTask",
    "JudgeStage",
    "FORMATS",
    "RULES",
    "Conversion",
    "Data",
    "Dedup",
    "Dynamic",
    "Evaluate",
    "Filter",
    "Format",
    "Loss",
    "Mix",
    "Model",
    "Part",
    "Recipe",
    "Rules",
    "Soup",
    "Task",
    "Tokenizer",
    "Train",
    "Watch",
    "apply_override",
    "builtin",
    "from_table",
    "load",
    "read_table",
    "save",
    "to_table",
]
