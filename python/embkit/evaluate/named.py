"""Tasks of `mteb` by name, of benchmarks and of folders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embkit.errors import UsageError
from embkit.evaluate.local import local_tasks


def installed() -> None:
    """Raise UsageError without mteb."""
    try:
        import mteb  # noqa: F401
    except ImportError:
        raise UsageError(
            "The measures are those of mteb, which is not installed.",
            fix="pip install 'embkit[mteb]'",
        ) from None


def find_tasks(names: Sequence[Any]) -> tuple[list[Any], list[Path]]:
    """Tasks of mteb by name, of benchmarks and of folders; and those folders.

    Raises:
        UsageError: a name that is none of these, a task that is not of text alone, the same name
            twice, no task at all.
    """
    import mteb

    found: list[Any] = []
    folders: list[Path] = []
    for name in names:
        if hasattr(name, "metadata"):
            found.append(name)
        elif Path(name).is_dir():
            folders.append(Path(name))
            found += local_tasks(name)
        else:
            found += _by_name(mteb, str(name))
    for task in found:
        if list(task.metadata.modalities) != ["text"]:
            raise UsageError(
                f"{task.metadata.name} is a task of {', '.join(task.metadata.modalities)}; embkit "
                "embeds text.",
                fix="leave it out",
            )
    unique = {task.metadata.name: task for task in found}
    if not unique:
        raise UsageError("No task to evaluate.", fix="give names of mteb's tasks, or folders")
    if len(unique) < len(found) and folders:
        every = [task.metadata.name for task in found]
        twice = next(n for n in every if every.count(n) > 1)
        raise UsageError(f"Two tasks are called {twice}.", fix="rename a set, or evaluate it apart")
    return list(unique.values()), folders


def _by_name(mteb: Any, name: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return list(mteb.get_benchmark(name).tasks)
        except KeyError:
            pass
        try:
            return [mteb.get_task(name)]
        except KeyError as error:
            raise UsageError(
                f"{name!r} is no folder and no task or benchmark of mteb.",
                fix=str(error.args[0]) if error.args else "see mteb's list of tasks",
            ) from None
