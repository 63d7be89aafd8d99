"""``evaluate_tasks``: tasks of `mteb` and folders of sets, with mteb's measures.

Every width and precision from one encode of each text, with intervals, a second model beside the
first, and scores without leaked examples.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit.errors import UsageError, nearest
from embkit.evaluate.examples import Examples, Recorder, examples_of
from embkit.evaluate.intervals import Replicates, bounds, replicates, whole
from embkit.evaluate.leaked import clean
from embkit.evaluate.named import find_tasks, installed
from embkit.evaluate.run import widths_of
from embkit.evaluate.vectors import PRECISIONS, TextVectors
from embkit.evaluate.wrapped import TYPES, WrappedEncoder
from embkit.progress import bar
from embkit.stage import stage

if TYPE_CHECKING:
    from embkit.model import Encoder

Variant = tuple[int, str]  # width and precision
_LOADER = 1024  # texts that mteb's loader hands over at once; the encoder makes its own batches
_EQUAL = 1e-4  # mteb rounds some means to five digits


@dataclass(kw_only=True)
class _Model:
    name: str
    vectors: TextVectors
    widths: list[int]
    drawn: dict[Variant, dict[str, Replicates]] = field(default_factory=dict)

    @property
    def full(self) -> int:
        return max(self.widths)


def evaluate_tasks(
    encoder: Encoder,
    tasks: Sequence[Any],
    *,
    name: str = "embkit/model",
    dims: Sequence[int] | None = None,
    precisions: Sequence[str] = ("float",),
    against: Encoder | None = None,
    against_name: str = "embkit/other",
    cache: Path | str | None = None,
    leaked: Collection[str] = (),
    out: Path | str | None = None,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    fresh: bool = False,
) -> dict[str, Any]:
    """Score an encoder with the measures of ``mteb`` (``pip install embkit[mteb]``).

    Args:
        encoder: the model.
        tasks: names of mteb's tasks and benchmarks, folders of sets (:mod:`embkit.evaluate.kinds`),
            or task objects of mteb, in any mixture.
        name: ``organisation/model``, under which mteb's result files are kept.
        dims: widths (the encoder's own by default); each is a prefix, normalised again.
        precisions: of ``"float"``, ``"int8"`` and ``"binary"``
            (:func:`embkit.evaluate.vectors.quantised`).
        against: a second model on the same tasks, at its full width; the result has the difference
            with its paired interval. ``against_name`` is its name.
        cache: directory that keeps vectors of texts, so that no later evaluation of the same model
            encodes them again; by default they live as long as their task.
        leaked: evaluation texts that training has seen (:func:`embkit.evaluate.leaked_texts`):
            tasks with examples of these get a second score without them.
        out: keep the result in this directory; free when it is already there.
        resamples, level, seed: of the bootstrap over examples; 0 resamples is none.
        fresh: score again even when ``out`` has the result.

    Returns:
        ``{"model", "digest", "mteb", "tasks": {name: {"type", "measure", "examples", "leaked",
        "scores": {"256": {"int8": {"score", "low", "high", "clean", "clean_low", "clean_high"}}}}},
        "types", "mean": {"256": {"float": ...}}, "against"}``, in percent. ``low`` and ``high`` are
        missing where the measure is one that embkit does not know; ``against`` has the other model
        and ``difference``, ``low``, ``high`` per task and over all, at full width.

    Raises:
        UsageError: no mteb, an unknown task, width or precision, a task that is not of text alone.
    """
    installed()
    if unknown := [p for p in precisions if p not in PRECISIONS]:
        raise UsageError(f"Unknown precision {unknown[0]!r}; {nearest(unknown[0], PRECISIONS)}")
    widths = widths_of(encoder, dims)
    chosen, folders = find_tasks(tasks)
    model = _Model(name=name, vectors=TextVectors(encoder, cache), widths=widths)
    models = [model]
    if against is not None:
        other = TextVectors(against, cache)
        other = model.vectors if other.model == model.vectors.model else other
        models.append(_Model(name=against_name, vectors=other, widths=[against.width]))
        if model.full != encoder.width or "float" not in precisions:
            raise UsageError(
                "Two models are compared at full width in float.",
                where="dims, precisions",
                fix=f"add {encoder.width} to dims and float to precisions",
            )
        if name == against_name:
            raise UsageError(f"Both models are called {name}.", fix="give two names")
    bootstrap = {"resamples": resamples, "level": level, "seed": seed}
    if out is None:
        return _score(models, chosen, precisions, leaked, None, bootstrap)
    import mteb

    from embkit.report.tasks_page import write_tasks_report

    params = {
        "models": [[m.name, m.vectors.model, m.widths] for m in models],
        "tasks": [[t.metadata.name, t.metadata.revision] for t in chosen],
        "precisions": list(precisions),
        "leaked": sorted(leaked),
        "mteb": mteb.__version__,
        **bootstrap,
    }
    with stage(
        out, name="evaluation", params=params, inputs=folders, kind="embkit.evaluation", fresh=fresh
    ) as work:
        if not work.done:
            result = _score(models, chosen, precisions, leaked, work.dir, bootstrap)
            text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
            (work.dir / "result.json").write_text(text + "\n", encoding="utf-8")
            page = write_tasks_report(json.loads(text))
            (work.dir / "report.html").write_text(page, encoding="utf-8")
            work.publish({"mean": result["mean"]})
    return dict(json.loads((Path(out) / "result.json").read_text(encoding="utf-8")))


def _score(
    models: list[_Model],
    tasks: list[Any],
    precisions: Sequence[str],
    leaked: Collection[str],
    out: Path | None,
    bootstrap: Mapping[str, Any],
) -> dict[str, Any]:
    import mteb

    results: list[dict[str, Any]] = [{} for _ in models]
    with bar("Evaluate", total=len(tasks), unit="tasks") as progress, _quiet():
        for done, task in enumerate(tasks):
            for model, found in zip(models, results, strict=True):
                of = precisions if model is models[0] else ["float"]
                found[task.metadata.name] = _task(model, task, of, leaked, out, bootstrap)
                model.vectors.forget()
            if getattr(task, "data_loaded", False):
                task.unload_data()
            progress.update(done + 1)
    first = models[0]
    result: dict[str, Any] = {
        "model": first.name,
        "digest": first.vectors.model,
        "mteb": mteb.__version__,
        "bootstrap": dict(bootstrap),
        "encoded": {m.name: m.vectors.encoded for m in models},
        "tasks": results[0],
        **_means(results[0], [(w, p) for w in first.widths for p in precisions]),
    }
    if len(models) > 1:
        result["against"] = _differences(models, results, bootstrap["level"])
    return result


def _task(
    model: _Model,
    task: Any,
    precisions: Sequence[str],
    leaked: Collection[str],
    out: Path | None,
    bootstrap: Mapping[str, Any],
) -> dict[str, Any]:
    """One task at every width and precision."""
    kind, name = str(task.metadata.type), task.metadata.name
    result: dict[str, Any] = {
        "type": TYPES.get(kind, kind),
        "measure": str(task.metadata.main_score),
        "scores": {str(w): {} for w in model.widths},
    }
    keep: list[Any] | None = None
    for width in model.widths:
        for precision in precisions:
            wrapped = WrappedEncoder(
                model.vectors, width=width, precision=precision, name=model.name
            )
            value, parts = _run(wrapped, task, out)
            cell: dict[str, Any] = {"score": 100 * value}
            result["scores"][str(width)][precision] = cell
            if not parts:
                continue
            result["examples"] = sum(part.n for part in parts)
            if bootstrap["resamples"]:
                drawn = _drawn(parts, name, bootstrap)
                model.drawn.setdefault((width, precision), {})[name] = drawn
                cell["low"], cell["high"] = bounds(cell["score"], drawn, bootstrap["level"])
            if not leaked:
                continue
            if keep is None:
                keep = clean(parts, leaked)
                result["leaked"] = int(sum((~k).sum() for k in keep))
            if result["leaked"] and all(k.any() for k in keep):
                cell["clean"] = 100 * whole(parts, keep)
                if bootstrap["resamples"]:
                    drawn = _drawn(parts, name, bootstrap, keep)
                    low, high = bounds(cell["clean"], drawn, bootstrap["level"])
                    cell["clean_low"], cell["clean_high"] = low, high
    return result


def _drawn(
    parts: list[Examples], name: str, bootstrap: Mapping[str, Any], keep: Sequence[Any] = ()
) -> Replicates:
    of = {"resamples": bootstrap["resamples"], "seed": bootstrap["seed"]}
    return 100 * replicates(parts, name, keep=keep, **of)


def _run(model: WrappedEncoder, task: Any, out: Path | None) -> tuple[float, list[Examples]]:
    """mteb's score, 0 to 1, and its examples; none where they do not give the same score."""
    import mteb

    single = hasattr(task, "load_data") and not hasattr(task.metadata, "tasks")
    if single:
        if not task.data_loaded:
            task.load_data()
        # Each model and width is to meet the same draws, as in an evaluation of its own.
        task.rng_state, task.np_rng = Recorder(task.seed), np.random.default_rng(task.seed)
    results = mteb.ResultCache(out) if out is not None else None
    with tempfile.TemporaryDirectory() as predictions:
        found = mteb.evaluate(
            model,
            task,
            cache=results,
            overwrite_strategy="always",
            prediction_folder=Path(predictions),
            encode_kwargs={"batch_size": _LOADER, "show_progress_bar": False},
            show_progress_bar=False,
            co2_tracker=False,
        ).task_results[0]
        path = Path(predictions) / f"{task.metadata.name}_predictions.json"
        made = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    value = float(found.get_score())
    parts = _parts(task, found.scores, made) if single else []
    if parts and abs(whole(parts) - value) > _EQUAL:
        parts = []
    return value, parts


def _parts(task: Any, scores: Mapping[str, Any], made: Mapping[str, Any]) -> list[Examples]:
    """Examples of every split and subset that was scored; none when one is not known here."""
    parts = []
    for split, subsets in scores.items():
        for entry in subsets:
            subset = entry["hf_subset"]
            data = task.dataset.get(subset, task.dataset)
            if str(task.metadata.type) not in ("Classification", "MultilabelClassification"):
                data = data[split]
            found = made.get(subset, made.get("parallel", {})).get(split)
            if found is not None and "parallel" in made:
                found = {subset: found[subset]}
            part = examples_of(task, data, found, split=split) if found is not None else None
            if part is None or not part.n:
                return []
            parts.append(part)
    return parts


def _means(tasks: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """Per width and precision: the mean of each type's tasks, and the mean over the types."""
    types: dict[str, Any] = {}
    mean: dict[str, Any] = {}
    for width, precision in variants:
        each: dict[str, list[float]] = {}
        for of in tasks.values():
            each.setdefault(of["type"], []).append(of["scores"][str(width)][precision]["score"])
        for kind, values in each.items():
            types.setdefault(kind, {}).setdefault(str(width), {})[precision] = float(
                np.mean(values)
            )
        mean.setdefault(str(width), {})[precision] = float(
            np.mean([types[kind][str(width)][precision] for kind in each])
        )
    return {"types": types, "mean": mean}


def _differences(
    models: list[_Model], results: list[dict[str, Any]], level: float
) -> dict[str, Any]:
    """The first model minus the second, task by task and over all, at full width in float."""
    a, b = models
    places = [(a.full, "float"), (b.full, "float")]
    tasks: dict[str, Any] = {}
    total: list[Replicates] = []
    for name in results[0]:
        one, two = (
            results[i][name]["scores"][str(width)][precision]
            for i, (width, precision) in enumerate(places)
        )
        cell = {"score": two["score"], "difference": one["score"] - two["score"]}
        drawn = [m.drawn.get(at, {}).get(name) for m, at in zip(models, places, strict=True)]
        if drawn[0] is not None and drawn[1] is not None:
            total.append(drawn[0] - drawn[1])
            cell["low"], cell["high"] = bounds(cell["difference"], total[-1], level)
        tasks[name] = cell
    over = {"difference": float(np.mean([cell["difference"] for cell in tasks.values()]))}
    if total and len(total) == len(tasks):
        drawn = np.mean(total, axis=0)
        over["low"], over["high"] = bounds(over["difference"], drawn, level)
    return {"model": b.name, "digest": b.vectors.model, "tasks": tasks, "mean": over}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of mteb and datasets and the warnings of mteb and scikit-learn:
    what they warn of (superseded tasks, a probe that stops at mteb's number of steps) is as mteb
    has it."""
    from functools import partialmethod

    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from tqdm.auto import tqdm

    shown, begin = not are_progress_bars_disabled(), tqdm.__init__
    disable_progress_bars()
    tqdm.__init__ = partialmethod(begin, disable=True)  # mteb has bars without a switch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = begin
        if shown:
            enable_progress_bars()
