"""Training data written, graded and relabelled by a language model (docs/synth.md)."""

from __future__ import annotations

from embkit.synth.backend import open_llm
from embkit.synth.cache import Cache
from embkit.synth.judging import Judge, judge
from embkit.synth.labelled import write_labelled
from embkit.synth.labelled_plan import Labelled
from embkit.synth.llm import LLM, BackendError, Completion, Likelihood, Usage
from embkit.synth.passages import Personas
from embkit.synth.prompts import Prompt
from embkit.synth.relabelling import Relabel, fuse, relabel
from embkit.synth.server import Server
from embkit.synth.writing import Write, write_queries

__all__ = [
    "LLM",
    "BackendError",
    "Cache",
    "Completion",
    "Judge",
    "Labelled",
    "Likelihood",
    "Personas",
    "Prompt",
    "Relabel",
    "Server",
    "Usage",
    "Write",
    "fuse",
    "judge",
    "open_llm",
    "relabel",
    "write_labelled",
    "write_queries",
]
