"""What a run would do, without doing it: `embkit run --dry-run` and `embkit explain`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import recipe as recipes
from embkit.errors import UsageError
from embkit.pipeline.costs import costs
from embkit.pipeline.llm import asking, written_tasks
from embkit.pipeline.options import data_folder, training_files
from embkit.pipeline.order import OUTPUTS, stages_of
from embkit.recipe import Recipe, Task

if TYPE_CHECKING:
    from embkit.losses import Known


def describe(recipe: Recipe, *, out: Path) -> str:
    """The stages with what is there already and their sizes, for ``--dry-run``."""
    data = data_folder(recipe)
    size = sum(p.stat().st_size for p in data.rglob("*") if p.is_file())
    m, t = recipe.model, recipe.tokenizer
    lines = [f"recipe {recipe.name}, data {data} ({size / 1e6:.1f} MB), run directory {out}"]
    parameters = None
    if m.path is None:
        body = m.layers * (4 * m.hidden**2 + 2 * m.hidden * m.intermediate) + m.hidden * max(m.dims)
        parameters = body + t.vocab_size * m.hidden
        lines.append(f"model: BERT, about {parameters / 1e6:.1f} M parameters")
        rate = _measured_flops()
        for name, config, times in (
            ("prefinetune", recipe.prefinetune, 1),
            ("finetune", recipe.finetune, len(recipe.runs)),
        ):
            tokens = config.batch_size * (t.max_length_query + t.max_length_passage)
            flops = 6 * body * tokens * config.steps
            states = 4 * (4 * parameters + tokens * m.hidden * (14 * m.layers + 4))
            lines.append(
                f"{name}: {times} x {config.steps} steps of {config.batch_size} rows, at most "
                f"{times * flops / rate:.0f} s of arithmetic here, {states / 2**30:.1f} GiB"
            )
    if asking(recipe):
        lines += costs(recipe, training_files(data, needed=not recipe.synth.on), out)
    for name in stages_of(recipe):
        there = any(any(out.glob(pattern)) for pattern in OUTPUTS[name])
        lines.append(f"  {name:<12} {', '.join(OUTPUTS[name]):<16} {'there' if there else 'to do'}")
    return "\n".join(lines)


def explain(source: Path | str, *, overrides: Sequence[str] = (), ranks: int = 1) -> str:
    """The resolved recipe with the origin of each value, and who is a negative of whom.

    Args:
        source: a recipe's file, or the name of a built-in one. overrides: as for `--set`.
        ranks: processes that train together.

    Raises:
        UsageError: ranks that are none.
    """
    from embkit.losses import explain as candidates

    if ranks < 1:
        raise UsageError(f"--ranks {ranks}.", fix="give the number of processes, from 1")

    file = recipes.read_table(source)
    table: dict[str, Any] = {}
    for item in overrides:
        recipes.apply_override(table, item)
    resolved = recipes.load(source, overrides=overrides)
    lines = []
    for section, value in recipes.to_table(resolved).items():
        if not isinstance(value, dict):
            lines.append(f"{section} = {json.dumps(value)}  # {_origin((section,), table, file)}")
            continue
        lines.append(f"[{section}]")
        for key, item in value.items():
            origin = _origin((section, key), table, file)
            lines.append(f"{key} = {json.dumps(item)}  # {origin}")
    tasks, complete = known_tasks(resolved)
    lines += ["", "Who is a negative of whom:"]
    for stage_name, config in (
        ("prefinetune", resolved.prefinetune),
        ("finetune", resolved.finetune),
    ):
        mined = stage_name == "finetune"  # comes after mining
        about = {n: dataclasses.replace(t, mined=t.mined and mined) for n, t in tasks.items()}
        told = candidates(config, about, complete=complete, ranks=ranks)
        lines += [f"[{stage_name}]", told]
    return "\n".join(lines)


def known_tasks(recipe: Recipe) -> tuple[dict[str, Known], bool]:
    """The tasks of a recipe as `embkit explain` tells of them, and whether there are no others.

    Those of its data folder, whose kinds the first rows say; without one, those that it names.
    """
    from embkit.data.sources import find, kind_of, of_tasks
    from embkit.losses import Known

    def about(name: str, kind: str) -> Known:
        task = recipe.tasks.get(name, Task())
        return Known(kind=kind, rule=task.convert.rule, mined=task.mined)

    try:
        files = training_files(data_folder(recipe), needed=not recipe.synth.on)
    except (UsageError, OSError):
        named = {n: recipes.RULES.get(t.convert.rule, t.kind) for n, t in recipe.tasks.items()}
        return {n: about(n, kind) for n, kind in named.items() if kind != "auto"}, False
    made = written_tasks(recipe)
    own = {name: task for name, task in recipe.tasks.items() if name not in made}
    sources = of_tasks(find(files, task=None, kind="auto"), own) if files else []
    found = {s.task: about(s.task, kind_of(s)) for s in sources}
    return found | {name: about(name, kind) for name, kind in made.items()}, True


def _origin(keys: tuple[str, ...], overrides: Mapping[str, Any], file: Mapping[str, Any]) -> str:
    for table, name in ((overrides, "--set"), (file, "recipe")):
        at: Any = table
        for key in keys:
            at = at.get(key) if isinstance(at, Mapping) else None
        if at is not None:
            return name
    return "default"


def _measured_flops() -> float:
    """float32 matrix-product rate of this machine, FLOP/s, in a fraction of a second."""
    import torch

    a = torch.randn(1024, 1024)
    a @ a
    started = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 1024**3 / (time.perf_counter() - started)
