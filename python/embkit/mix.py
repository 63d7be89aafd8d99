"""Search of a mixture: short runs on candidates, judged on the dev sets (docs/mixtures.md).

Each candidate is an ordinary fine-tuning run in a directory named by its weights, so a search that
was killed goes on where it stopped, and another search in the same place repeats no run.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import _rust, simplex
from embkit.data.loader import as_store
from embkit.data.mixture import weights_for
from embkit.errors import UsageError
from embkit.progress import say
from embkit.recipe import Mix, Train, Watch

if TYPE_CHECKING:
    from embkit.model import Encoder

Mixture = dict[str, float]
_LEAST = 0.01  # weight of a task in a mixture: less would need very long blocks of steps


def needs_one_process() -> None:
    """Each run of a search is one of a single process.

    Raises:
        UsageError: a launcher has started several.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            "The search of a mixture needs a single process.",
            where="mix",
            fix="find it with `embkit mix` alone, and put the mixture that it writes in the recipe",
        )


def search_mixture(
    encoder: Encoder,
    store: Any,
    *,
    out: Path | str,
    on: Path | str,
    config: Train | None = None,
    mix: Mix | None = None,
    negatives: Any = None,
) -> dict[str, Any]:
    """Try mixtures of a store's tasks by short fine-tuning runs, and rank them.

    Args:
        encoder: where each run starts. store: an ``embkit.data.Store`` or its directory.
        out: directory of the runs, ``result.json`` and ``mixture.toml``, a part of a recipe.
        on: split folder that judges; never the test split.
        config: settings of the runs; the tasks with a weight there (all, when there is none) are
            those that are mixed.
        mix: method and budget. negatives: as for :func:`embkit.train.finetune`.

    Returns:
        What ``result.json`` holds: ``first`` (the mixture that the search starts from), ``alone``
        (steps to converge by task, when asked for), and ``candidates``, the best first, each with
        ``weights``, ``dev`` (mean over the kinds of tasks at full width, percent), ``types`` and
        the directory of its ``run``.

    Raises:
        UsageError: nothing to mix or no budget; settings of parts; several processes.
    """
    config, mix = config or Train(), mix or Mix(candidates=16)
    store, out = as_store(store), Path(out)
    if not mix.on:
        raise UsageError("The search has no budget.", where="mix.candidates", fix="give e.g. 16")
    needs_one_process()
    if config.parts:
        raise UsageError(
            "A recipe with parts gives each its own tasks.",
            where="finetune.parts",
            fix="leave parts out for the search, or choose their tasks by hand",
        )
    asked = weights_for(
        store.task_sizes, config.tasks, temperature=config.mixture_temperature,
        cap=config.mixture_cap,
    )  # fmt: skip
    first = normalised({name: weight for name, weight in asked.items() if weight > 0})
    if len(first) < 2:
        raise UsageError(
            "There is one task, and so one mixture.", where="finetune.tasks", fix="name two or more"
        )

    # Negatives of a short run stay, and nobody looks on.
    short: dict[str, Any] = {"refresh_every": 0, "watch": Watch(spike=config.watch.spike)}

    def train(weights: Mixture, steps: int, run: Path) -> Encoder:
        from embkit.train import finetune

        settings = dataclasses.replace(config, **short, tasks=weights, steps=steps)
        return finetune(encoder, store, negatives=negatives, out=run, config=settings)

    result: dict[str, Any] = {"method": mix.method, "steps": mix.steps}
    if mix.alone:
        needed = {}
        for name in first:
            train({name: 1.0}, mix.alone, out / "alone" / name)
            needed[name] = steps_to_converge(_losses(out / "alone" / name / "log.jsonl"))
        result["alone"] = needed
        first = normalised({name: float(steps) for name, steps in needed.items()})
    result["first"] = first
    tried: list[dict[str, Any]] = []
    for weights in _candidates(first, mix, tried):
        from embkit.evaluate import evaluate

        run = out / "runs" / _rust.blake3(json.dumps(weights, sort_keys=True).encode())[:12]
        model = train(weights, mix.steps, run)
        scores = evaluate(model, on, out=out / "scores" / run.name, bm25=False)
        full = str(max(model.dims))
        types = {kind: widths[full] for kind, widths in scores["types"].items()}
        tried.append(
            {"weights": weights, "dev": scores["mean"][full], "types": types, "run": run.name}
        )
        say(f"mixture {len(tried)} of {mix.candidates}: {_words(weights)}: {tried[-1]['dev']:.2f}")
    order = sorted(range(len(tried)), key=lambda i: (-tried[i]["dev"], i))
    result["candidates"] = [{"tried": i + 1, **tried[i]} for i in order]
    _rust.publish_file(str(out / "result.json"), (json.dumps(result, indent=1) + "\n").encode())
    _rust.publish_file(str(out / "mixture.toml"), fragment(result, mix.keep).encode())
    return result


def best(result: Mapping[str, Any], count: int) -> list[Mixture]:
    """The best mixtures of a search, the best first."""
    return [dict(candidate["weights"]) for candidate in result["candidates"][:count]]


def fragment(result: Mapping[str, Any], keep: int) -> str:
    """The part of a recipe that trains on the best mixture, and one run on each of the best."""
    import tomli_w

    mixtures = best(result, keep)
    runs = [{"seed": i, "tasks": weights} for i, weights in enumerate(mixtures)]
    head = f"# The best of {len(result['candidates'])} mixtures; a run on each of the best.\n"
    return head + tomli_w.dumps({"finetune": {"tasks": mixtures[0]}, "runs": runs})


# ---------------------------------------------------------------- candidates


def _candidates(first: Mixture, mix: Mix, tried: Sequence[dict[str, Any]]) -> Iterator[Mixture]:
    """Mixtures to try, none twice; ``tried`` has the results of those before."""
    return simplex.candidates(first, mix, tried, least=_LEAST)


def normalised(weights: Mapping[str, float]) -> Mixture:
    """Weights that add up to 1, none too small to take part, with four digits."""
    return simplex.normalised(weights, least=_LEAST)


# ---------------------------------------------------------------- steps to converge


def steps_to_converge(losses: Sequence[float], *, share: float = 0.9) -> int:
    """The step at which a run has done ``share`` of its fall.

    The loss is the running mean of a tenth of the run (at least 5 steps); its fall goes from the
    first such mean to the lowest. A run that does not fall has converged with the first.

    Raises:
        UsageError: fewer than 10 steps.
    """
    if len(losses) < 10:
        raise UsageError(
            f"{len(losses)} steps show no convergence.",
            where="mix.alone",
            fix="give 10 or more, better 100",
        )
    window = max(5, len(losses) // 10)
    sums = np.cumsum([0.0, *losses])
    means = (sums[window:] - sums[:-window]) / window
    enough = means[0] - share * (means[0] - means.min())
    return window + int(np.argmax(means <= enough))


def _losses(log: Path) -> list[float]:
    lines = log.read_text(encoding="utf-8").splitlines()
    return [float(json.loads(line)["loss"]) for line in lines]


def _words(weights: Mixture) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
