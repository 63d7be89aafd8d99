"""``evaluate``: encode once, score every width, average over the kinds of tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embkit import _rust
from embkit.data.embeddings import after
from embkit.errors import UsageError
from embkit.evaluate import metrics
from embkit.evaluate.bm25 import bm25_rank
from embkit.evaluate.tasks import EvalSet, RetrievalSet, StsSet, load_split
from embkit.progress import Bar, bar
from embkit.stage import digest_of, stage

if TYPE_CHECKING:
    from embkit.model import Encoder

MAIN = {"retrieval": "ndcg@10", "sts": "spearman", "classification": "accuracy"}
_DEPTH = 100
_REMEMBER = 64  # models whose scores stay in memory, a few KB each
_remembered: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
ROLES = ("query", "passage")
Vectors = NDArray[np.float32]


def evaluate(
    encoder: Encoder | None,
    folder: Path | str,
    *,
    dims: Sequence[int] | None = None,
    out: Path | str | None = None,
    bm25: bool = True,
    fresh: bool = False,
) -> dict[str, Any]:
    """Score an encoder on every set of a split.

    Args:
        encoder: the model; None scores BM25 alone.
        folder: a split folder, e.g. ``data/dev``.
        dims: widths (the encoder's own by default); each is a prefix, normalised again.
        out: keep the result in this directory; free when it is already there.
        bm25: score BM25 on the retrieval sets beside the model.
        fresh: score again even when ``out`` has the result.

    Returns:
        ``{"tasks": {name: {"type", "widths": {"256": {"ndcg@10": ...}}, "bm25": {...}}},
        "types": {type: {"256": mean of the main measure}}, "mean": {"256": mean over types}}``,
        in percent; widths are strings, as JSON has them.

    Raises:
        UsageError: no sets in the folder, or a width the encoder does not have.
        CorruptError: a broken set.
    """
    folder = Path(folder)
    widths = widths_of(encoder, dims)
    if encoder is None and not bm25:
        raise UsageError("Nothing to evaluate.", fix="give an encoder, or bm25=True")
    sets = load_split(folder)
    if out is None:
        return _score(encoder, folder, sets, widths, bm25=bm25)
    params = {
        "model": encoder.digest() if encoder is not None else None,
        "dims": widths,
        "bm25": bm25,
    }
    with stage(out, name="evaluate", params=params, inputs=[folder], fresh=fresh) as work:
        if not work.done:
            result = _score(encoder, folder, sets, widths, bm25=bm25)
            text = json.dumps(result, indent=1, sort_keys=True, allow_nan=False)
            (work.dir / "result.json").write_text(text + "\n", encoding="utf-8")
            work.publish({"mean": result["mean"]})
    return dict(json.loads((Path(out) / "result.json").read_text(encoding="utf-8")))


def judge(encoder: Encoder, folder: Path | str) -> float:
    """The mean over the kinds of tasks at the full width, without a progress bar.

    What it scores is remembered in this process: :func:`evaluate` of the same model is then free.
    """
    folder = Path(folder)
    widths = widths_of(encoder, None)
    tasks = _model_scores(encoder, folder, load_split(folder), widths, Bar("", None, ""))
    return float(_means(tasks, widths)["mean"][str(max(widths))])


def widths_of(encoder: Encoder | None, dims: Sequence[int] | None) -> list[int]:
    """Widths to score, widest first; the encoder's own by default, none without an encoder."""
    if encoder is None:
        return []
    full = max(encoder.dims)
    wanted = sorted({int(d) for d in (encoder.dims if dims is None else dims)}, reverse=True)
    for width in wanted:
        if not 1 <= width <= full:
            raise UsageError(
                f"Width {width} is out of range.", where="dims", fix=f"give 1 to {full}"
            )
    if not wanted:
        raise UsageError("dims is empty.", fix="give at least one width")
    return wanted


def _score(
    encoder: Encoder | None, folder: Path, sets: list[EvalSet], widths: list[int], *, bm25: bool
) -> dict[str, Any]:
    tasks: dict[str, Any] = {found.name: {"type": found.type, "widths": {}} for found in sets}
    if encoder is not None:
        total = sum(len(texts) for found in sets for texts, _ in _texts(found))
        with bar("Evaluate", total=total, unit="texts") as progress:
            tasks = copy.deepcopy(_model_scores(encoder, folder, sets, widths, progress))
            progress.update(total)
    for found in sets:
        if bm25 and isinstance(found, RetrievalSet):
            ranked = bm25_rank(found.queries, found.corpus, k=_DEPTH)
            tasks[found.name]["bm25"] = metrics.retrieval_metrics(ranked, found.judged)
    return {"tasks": tasks, **_means(tasks, widths)}


def _model_scores(
    encoder: Encoder, folder: Path, sets: list[EvalSet], widths: list[int], progress: Bar
) -> dict[str, Any]:
    """Scores of every set and width; remembered, because a soup judges what is evaluated later."""
    key = (encoder.digest(), digest_of(folder), tuple(widths))
    if key not in _remembered:
        tasks = _encode_and_score(encoder, sets, widths, progress)
        while len(_remembered) >= _REMEMBER:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = tasks
    return _remembered[key]


def score_sets(encoder: Encoder, sets: Sequence[EvalSet]) -> dict[str, Any]:
    """What :func:`evaluate` returns, of sets that are loaded; remembers and prints nothing."""
    widths = widths_of(encoder, None)
    tasks = _encode_and_score(encoder, sets, widths, Bar("", None, ""))
    return {"tasks": tasks, **_means(tasks, widths)}


def _encode_and_score(
    encoder: Encoder, sets: Sequence[EvalSet], widths: list[int], progress: Bar
) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for found in sets:
        parts = [_encode(encoder, t, r, max(widths), progress) for t, r in _texts(found)]
        scores = {str(w): score_set(found, [prefix(p, w) for p in parts]) for w in widths}
        tasks[found.name] = {"type": found.type, "widths": scores}
    return tasks


def encode_set(encoder: Encoder, found: EvalSet, width: int) -> list[Vectors]:
    """Unit vectors [n, width] of the parts of a set, as :func:`evaluate` scores them."""
    silent = Bar("", None, "")
    return [prefix(_encode(encoder, t, r, width, silent), width) for t, r in _texts(found)]


def score_set(found: EvalSet, parts: Sequence[Vectors]) -> dict[str, float]:
    """The measures of one set from unit vectors of its texts, in the order of its parts.

    Args:
        found: the set.
        parts: queries and corpus; first and second sentences; or train and test texts, each [n, d].
    """
    a, b = parts
    if isinstance(found, RetrievalSet):
        rows, _ = _rust.topk(a, b, min(_DEPTH, len(b)))
        return metrics.retrieval_metrics(np.asarray(rows), found.judged)
    if isinstance(found, StsSet):
        cosine = np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
        return {"spearman": metrics.spearman(cosine, found.score)}
    return {"accuracy": metrics.accuracy(a, found.train_label, b, found.test_label)}


def prefix(vectors: Vectors, width: int) -> Vectors:
    """The first ``width`` columns, normalised again (a zero vector stays zero)."""
    cut = np.ascontiguousarray(vectors[:, :width], np.float32)
    norm = np.linalg.norm(cut, axis=1, keepdims=True)
    return cut / np.where(norm > 0, norm, 1)


def _texts(found: EvalSet) -> list[tuple[list[str], str]]:
    """The texts of a set with the prompt they are encoded with, by its name."""
    if isinstance(found, RetrievalSet):
        return [(found.queries, "query"), (found.corpus, "passage")]
    if isinstance(found, StsSet):
        return [(found.first, "sts"), (found.second, "sts")]
    return [(found.train, "classification"), (found.test, "classification")]


def _encode(encoder: Encoder, texts: list[str], name: str, width: int, progress: Bar) -> Vectors:
    """Vectors [n, width], not normalised; each distinct text is encoded once."""
    sides: dict[str, Any] = {"role": name}
    if name not in ROLES:  # a kind has a prompt where the model was trained with one
        sides = {"prompt": encoder.prompts.get(name)}
    distinct, inverse = np.unique(np.array(texts, dtype=object), return_inverse=True)
    start = progress.done
    report = after(progress, start, len(texts) / max(len(distinct), 1))
    vectors = encoder.encode(
        distinct.tolist(), dim=width, normalize=False, progress=report, **sides
    )
    progress.update(start + len(texts))
    return np.asarray(vectors, np.float32)[inverse.reshape(-1)]


def _means(tasks: dict[str, Any], widths: list[int]) -> dict[str, Any]:
    """Per width: the mean of each type's sets, and the mean over the types."""
    types: dict[str, dict[str, float]] = {}
    for kind, measure in MAIN.items():
        of_kind = [t["widths"] for t in tasks.values() if t["type"] == kind]
        if of_kind:
            types[kind] = {
                str(w): float(np.mean([t[str(w)][measure] for t in of_kind])) for w in widths
            }
    mean = {str(w): float(np.mean([types[kind][str(w)] for kind in types])) for w in widths}
    return {"types": types, "mean": mean}
