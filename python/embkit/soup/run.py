"""``soup``: choose ingredients and weights on evidence, merge, and say where they came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import simplex
from embkit.errors import UsageError, nearest
from embkit.progress import Bar, bar, say
from embkit.recipe import Soup
from embkit.soup import checkpoints as of_run
from embkit.soup.checks import check_compatible, model_of, same_start, start_of
from embkit.soup.merge import merge, shares, write_json
from embkit.soup.trials import Trials
from embkit.stage import digest_of, stage

if TYPE_CHECKING:
    from embkit.model import Encoder

ALL = ("uniform", "slerp")  # what takes every run
SELECT = ("greedy", *ALL, "search", "best")
_VERSION = 2  # 2: greedy keeps a run only when the score rises


@dataclass(frozen=True, kw_only=True)
class _Ingredient:
    """A model, or the checkpoint of a run that is written as one when the soup is made."""

    name: str
    model: Path
    run: Path
    checkpoint: Path | None = None

    @property
    def source(self) -> Path:
        """What its digest is of."""
        return self.model if self.checkpoint is None else self.checkpoint / "state.json"


def soup(
    runs: Sequence[Any],
    *,
    out: Path | str,
    select: str = "greedy",
    on: Path | str | None = None,
    weights: Sequence[float] | None = None,
    base: Any = None,
    alpha: float | Sequence[float] = 1.0,
    search: simplex.Budget | None = None,
    checkpoints: str | None = None,
    fresh: bool = False,
) -> Encoder:
    """Average the weights of several fine-tuned models.

    Greedy: the runs in order of their score on ``on``; each is added to the average when the score
    rises. So the soup is never worse there than its best ingredient.

    Args:
        runs: training run or model directories (or objects with a ``path``), all from one start.
        out: the directory to publish: ``model/`` and ``report.json``.
        select: ``"greedy"``, ``"uniform"`` (all of them), ``"slerp"`` (all, on the arc between
            them, tensor by tensor and run by run in their order), ``"search"`` (weights that
            ``search`` finds) or ``"best"`` (one run, no average).
        on: split folder that judges; never the test split. Greedy, search, best and a choice of
            alphas need it, the score of the others is reported when it is given.
        weights: for uniform and slerp, a weight per run in place of equal ones; divided by their
            sum.
        base, alpha: write base + alpha * (soup - base), say the model that fine-tuning began with;
            of several alphas the best one on ``on``.
        search: budget and method, as in a recipe's ``[soup]``; 16 candidates by "bayes" by default.
        checkpoints: take these checkpoints of each run in its place: ``"last:5"``, ``"all"`` or
            steps, ``"800,900"``.
        fresh: do it again even when it is done.

    Returns:
        The merged encoder.

    Raises:
        UsageError: unknown ``select``, no runs, runs of different architecture or tokenizer, no
            such checkpoint, or nothing to judge on. CorruptError: a run without a model.
    """
    from embkit.model import Encoder

    search = search or Soup()
    alphas = [float(a) for a in ([alpha] if isinstance(alpha, (int, float)) else alpha)]
    _check(select, on, weights, base, alphas)
    found = _ingredients(runs, checkpoints)
    share = shares(weights, len(found))
    rest = model_of(base) if base is not None else None
    check_compatible([i.model for i in found] + ([rest] if rest is not None else []))
    params: dict[str, Any] = {"select": select, "weights": share}
    if select == "search":
        names = ("method", "candidates", "factors", "initial", "concentration", "seed")
        params["search"] = {name: getattr(search, name) for name in names}
    inputs = [i.source for i in found]
    inputs += [Path(on)] if on is not None else []
    if rest is not None:
        params["alpha"] = alphas
        inputs.append(rest)
    with stage(
        out, name="soup", version=_VERSION, params=params, inputs=inputs, fresh=fresh
    ) as work:
        if not work.done:
            report = _make(found, share, select, on, rest, alphas, search, work.dir)
            text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False)
            (work.dir / "report.json").write_text(text + "\n", encoding="utf-8")
            work.publish({key: report[key] for key in ("kept", "weights", "parents")})
    return Encoder.from_pretrained(Path(out) / "model")


def _check(
    select: str,
    on: Path | str | None,
    weights: Sequence[float] | None,
    base: Any,
    alphas: Sequence[float],
) -> None:
    if select not in SELECT:
        raise UsageError(f"Unknown select {select!r}; {nearest(select, SELECT)}")
    if on is None and (select not in ALL or len(alphas) > 1):
        what = f"select={select!r}" if select not in ALL else "A choice of alphas"
        raise UsageError(f"{what} needs sets to judge on.", fix="give on=DEV_FOLDER")
    if weights is not None and select not in ALL:
        raise UsageError("weights go with select='uniform' and 'slerp'.")
    if not alphas or (base is None and alphas != [1.0]):
        raise UsageError(
            "alpha says how far from a base the soup is, and there is none.", fix="give base=MODEL"
        )


def _ingredients(runs: Sequence[Any], checkpoints: str | None) -> list[_Ingredient]:
    """What is averaged, under names that differ."""
    found = []
    for run in runs:
        model = model_of(run)
        folder = model.parent if model.name == "model" else model
        if checkpoints is None:
            found.append(_Ingredient(name=folder.name, model=model, run=folder))
            continue
        for path in of_run.chosen(folder, checkpoints):
            name = f"{folder.name}-{path.name}"
            found.append(_Ingredient(name=name, model=model, run=folder, checkpoint=path))
    if not found:
        raise UsageError("There are no runs to average.")
    names = [i.name for i in found]
    return [
        _Ingredient(
            name=i.name if names.count(i.name) == 1 else f"{i.name} ({at + 1})",
            model=i.model, run=i.run, checkpoint=i.checkpoint,
        )
        for at, i in enumerate(found)
    ]  # fmt: skip


def _make(
    found: list[_Ingredient],
    share: list[float],
    select: str,
    on: Path | str | None,
    base: Path | None,
    alphas: list[float],
    search: simplex.Budget,
    directory: Path,
) -> dict[str, Any]:
    """Choose, write ``model/``, and say what was tried."""
    names = [i.name for i in found]
    alike = same_start({i.name: start_of(i.model) for i in found})
    if alike is False:
        say(
            "warning: these runs started from different weights, so their average may be no model "
            "at all; look at its score"
        )
    models = []
    for i, part in enumerate(found):
        model = part.model
        if part.checkpoint is not None:
            model = directory / "ingredients" / str(i)
            if not model.is_dir():
                of_run.write_model(part.run, part.checkpoint, model)
        models.append(model)
    report: dict[str, Any] = {"select": select, "candidates": [], "steps": []}
    kept, weights, score, alpha = list(range(len(found))), share, None, alphas[0]
    how = "slerp" if select == "slerp" else "mean"
    if on is not None:
        trials = Trials(models, base, on, directory)
        with bar("Soup", total=_rounds(select, len(found), search, alphas), unit="candidates") as b:
            kept, weights, score = _choose(trials, names, share, select, search, report, b)
            if base is not None:
                alpha, score = _choose_alpha(trials, kept, weights, how, alphas, report, b)
        trials.close()
    final = merge(
        [models[i] for i in kept], directory / "model", weights=weights, how=how,
        base=base, alpha=alpha,
    )  # fmt: skip
    shutil.rmtree(directory / "ingredients", ignore_errors=True)
    report |= {
        "kept": [names[i] for i in kept],
        "weights": weights,
        "dev": score,
        "same_start": alike,
        "parents": _parents(found, dict(zip(kept, weights, strict=True)), report),
    }
    if base is not None:
        report |= {"base": {"run": _named(base), "digest": digest_of(base)}, "alpha": alpha}
    _seal(final, report)
    return report


def _rounds(select: str, n: int, search: simplex.Budget, alphas: Sequence[float]) -> int:
    more = {"greedy": n - 1, "search": search.candidates, "slerp": 1}.get(select, 0)
    return n + 1 + more + (len(alphas) if len(alphas) > 1 else 0)


def _choose(
    trials: Trials,
    names: list[str],
    share: list[float],
    select: str,
    search: simplex.Budget,
    report: dict[str, Any],
    progress: Bar,
) -> tuple[list[int], list[float], float]:
    """Ingredients in the order in which they are added, their weights, and the score."""
    everyone = list(range(len(names)))
    singles = []
    for i in everyone:
        singles.append(trials.score([i]))
        report["candidates"].append({"run": names[i], "dev": singles[i]})
        progress.advance()
    uniform = trials.score(everyone, share)
    report["uniform"] = {"dev": uniform, "weights": share}
    progress.advance(uniform=uniform)
    order = sorted(everyone, key=lambda i: (-singles[i], i))
    kept, score = [order[0]], singles[order[0]]
    if select == "uniform":
        return everyone, share, uniform
    if select == "slerp":
        return everyone, share, trials.score(everyone, share, how="slerp")
    if select == "search":
        return _search(trials, names, singles, uniform, search, report, progress)
    if select == "greedy":
        for i in order[1:]:
            tried = trials.score([*kept, i])
            report["steps"].append({"run": names[i], "dev": tried, "kept": tried > score})
            if tried > score:
                kept, score = [*kept, i], tried
            progress.advance(best=score)
    return kept, [1 / len(kept)] * len(kept), score


def _search(
    trials: Trials,
    names: list[str],
    singles: list[float],
    uniform: float,
    search: simplex.Budget,
    report: dict[str, Any],
    progress: Bar,
) -> tuple[list[int], list[float], float]:
    """The best weights of a budget, or a run alone or the mean where none is better."""
    n = len(names)
    tried: list[dict[str, Any]] = [
        {"weights": {name: float(name == alone) for name in names}, "dev": score}
        for alone, score in zip(names, singles, strict=True)
    ]
    equal = dict.fromkeys(names, 1 / n)
    if n > 1:
        tried.append({"weights": equal, "dev": uniform})
        for weights in simplex.candidates(equal, search, tried, least=0.0):
            score = trials.score(list(range(n)), list(weights.values()))
            tried.append({"weights": weights, "dev": score})
            progress.advance(best=max(t["dev"] for t in tried))
    ranked = sorted(range(len(tried)), key=lambda i: (-tried[i]["dev"], i))
    report["search"] = {
        "method": search.method,
        "candidates": [{"tried": i + 1, **tried[i]} for i in ranked],
    }
    best = tried[ranked[0]]
    kept = [i for i in range(n) if best["weights"][names[i]] > 0]
    chosen = shares([best["weights"][names[i]] for i in kept], len(kept))
    return kept, chosen, float(best["dev"])


def _choose_alpha(
    trials: Trials,
    kept: list[int],
    weights: list[float],
    how: str,
    alphas: list[float],
    report: dict[str, Any],
    progress: Bar,
) -> tuple[float, float]:
    """The alpha with the best score; of equal ones the first."""
    tried = []
    for alpha in alphas:
        score = trials.score(kept, weights, how=how, alpha=alpha)
        tried.append({"alpha": alpha, "dev": score})
        progress.advance(best=max(t["dev"] for t in tried))
    report["alphas"] = tried
    best = max(tried, key=lambda t: t["dev"])
    return best["alpha"], best["dev"]


def _parents(
    found: list[_Ingredient], weights: dict[int, float], report: dict[str, Any]
) -> list[dict[str, Any]]:
    """Where the weights come from: every run that was looked at, with its share."""
    scores = {c["run"]: c["dev"] for c in report["candidates"]}
    return [
        {
            "run": part.name,
            "digest": digest_of(part.source),
            "init_sha256": start_of(part.model),
            "weight": weights.get(i, 0.0),
            "dev": scores.get(part.name),
        }
        for i, part in enumerate(found)
    ]


def _named(model: Path) -> str:
    return model.parent.name if model.name == "model" else model.name


def _seal(model: Path, report: dict[str, Any]) -> None:
    """Record the digest of the merged weights, as an export does, and what they were made of."""
    from embkit.model import Encoder

    path = model / "embkit.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    before = dict(content)
    content["digest"] = Encoder.from_pretrained(model).digest()
    used = [p for p in report["parents"] if p["weight"] > 0]
    if len(used) > 1 or "base" in report:
        said = [key for key in ("select", "dev", "base", "alpha") if key in report]
        content["soup"] = {key: report[key] for key in said} | {"parents": used}
    if content != before:
        write_json(path, content)
