"""Model soups: average the weights of runs that started from the same initialisation.

Weights are merged tensor by tensor, read from safetensors and summed in fp32, so that memory holds
one tensor of the sum and one of an ingredient at a time, however many runs there are.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import _rust
from embkit.errors import CorruptError, UsageError, nearest
from embkit.progress import bar
from embkit.stage import stage

if TYPE_CHECKING:
    import torch

    from embkit.model import Encoder

ALL = ("uniform", "slerp")  # what takes every run
SELECT = ("greedy", *ALL, "best")
_SAME = ("config.json", "embkit.json", "modules.json", "tokenizer.json")


def soup(
    runs: Sequence[Any],
    *,
    out: Path | str,
    select: str = "greedy",
    on: Path | str | None = None,
    weights: Sequence[float] | None = None,
    fresh: bool = False,
) -> Encoder:
    """Average the weights of several fine-tuned models.

    Greedy: the runs in order of their score on ``on``; each is added to the average when the score
    does not fall. So the soup is never worse there than its best ingredient.

    Args:
        runs: training run or model directories (or objects with a ``path``), all from one start.
        out: the directory to publish: ``model/`` and ``report.json``.
        select: ``"greedy"``, ``"uniform"`` (all of them), ``"slerp"`` (all, on the arc between
            them, tensor by tensor and run by run) or ``"best"`` (one run, no average).
        on: split folder that judges; never the test split. Greedy and best need it, the score of
            the others is reported when it is given.
        weights: for uniform, a weight per run in place of equal ones; divided by their sum.
        fresh: do it again even when it is done.

    Returns:
        The merged encoder.

    Raises:
        UsageError: unknown ``select``, no runs, runs of different architecture, tokenizer or
            initialisation, or nothing to judge on. CorruptError: a run without a model.
    """
    from embkit.model import Encoder

    if select not in SELECT:
        raise UsageError(f"Unknown select {select!r}; {nearest(select, SELECT)}")
    if select not in ALL and on is None:
        raise UsageError(f"select={select!r} needs sets to judge on.", fix="give on=DEV_FOLDER")
    models = [model_of(run) for run in runs]
    if not models:
        raise UsageError("There are no runs to average.")
    share = _weights(weights, len(models), select)
    check_compatible(models)
    params = {"select": select, "weights": share}
    inputs = [*models, *([Path(on)] if on is not None else [])]
    with stage(out, name="soup", params=params, inputs=inputs, fresh=fresh) as work:
        if not work.done:
            names = [_name(model) for model in models]
            report = _choose(models, names, share, select, on, work.dir)
            text = json.dumps(report, indent=1, sort_keys=True, allow_nan=False)
            (work.dir / "report.json").write_text(text + "\n", encoding="utf-8")
            work.publish({"kept": report["kept"], "weights": report["weights"]})
    return Encoder.from_pretrained(Path(out) / "model")


def _choose(
    models: list[Path],
    names: list[str],
    share: list[float],
    select: str,
    on: Path | str | None,
    directory: Path,
) -> dict[str, Any]:
    """Pick the ingredients, write ``model/``, and say what was tried."""
    report: dict[str, Any] = {"select": select, "candidates": [], "steps": []}
    trial, final = directory / "trial", directory / "model"
    everyone = list(range(len(models)))
    if on is None:
        kept, score = everyone, None
    else:
        rounds = len(models) + 1 + (len(models) - 1 if select == "greedy" else 0)
        with bar("Soup", total=rounds, unit="candidates") as progress:
            singles = []
            for i in everyone:
                singles.append(_judge(models[i], on))
                report["candidates"].append({"run": names[i], "dev": singles[i]})
                progress.advance()
            merge([models[i] for i in everyone], trial, weights=share)
            uniform = _judge(trial, on)
            report["uniform"] = {"dev": uniform, "weights": share}
            progress.advance(uniform=uniform)
            order = sorted(everyone, key=lambda i: (-singles[i], i))
            kept, score = [order[0]], singles[order[0]]
            if select == "uniform":
                kept, score = everyone, uniform
            elif select == "slerp":
                merge(models, trial, weights=share, how="slerp")
                kept, score = everyone, _judge(trial, on)
            elif select == "greedy":
                for i in order[1:]:
                    merge([models[j] for j in [*kept, i]], trial)
                    tried = _judge(trial, on)
                    keep = tried >= score
                    report["steps"].append({"run": names[i], "dev": tried, "kept": keep})
                    if keep:
                        kept, score = [*kept, i], tried
                    progress.advance(best=score)
        shutil.rmtree(trial, ignore_errors=True)
    final_weights = share if select in ALL else [1 / len(kept)] * len(kept)
    how = "slerp" if select == "slerp" else "mean"
    merge([models[i] for i in kept], final, weights=final_weights, how=how)
    _seal(final)
    report["kept"] = [names[i] for i in kept]
    report["weights"] = final_weights
    report["dev"] = score
    return report


def _judge(model: Path, on: Path | str) -> float:
    """Mean over the kinds of tasks at the full width."""
    from embkit.evaluate import judge
    from embkit.model import Encoder

    return judge(Encoder.from_pretrained(model), on)


def _seal(model: Path) -> None:
    """Record the digest of the merged weights, as an export does."""
    from embkit.model import Encoder

    path = model / "embkit.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = Encoder.from_pretrained(model).digest()
        if content.get("digest") != digest:
            _write_json(path, {**content, "digest": digest})


# ---------------------------------------------------------------- merging


def merge(
    models: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    how: str = "mean",
) -> Path:
    """Write the weighted average of model directories, one tensor at a time.

    Args:
        models: directories of the same layout; files other than weights come from the first.
        out: replaced when it exists.
        weights: one per model, equal by default; divided by their sum.
        how: ``"mean"``, or ``"slerp"``, which takes weight w of the k-th model as the place
            w / (w_1 + ... + w_k) on the arc from what the models before it gave.

    Raises:
        UsageError: tensors differ in name, shape or dtype, or integer tensors in value.
    """
    share = _weights(weights, len(models), "uniform")
    shutil.rmtree(out, ignore_errors=True)
    first = models[0]
    for path in sorted(p for p in first.rglob("*") if p.is_file()):
        name = path.relative_to(first)
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _merge_file([m / name for m in models], target, share, how)
        elif path.name == "embkit.json" and len(models) > 1:  # its digest is of other weights
            content = json.loads(path.read_text(encoding="utf-8"))
            _write_json(target, {k: v for k, v in content.items() if k != "digest"})
        elif path.name != "manifest.json":
            shutil.copyfile(path, target)
    return out


def _merge_file(paths: list[Path], out: Path, share: list[float], how: str) -> None:
    from safetensors import safe_open

    with ExitStack() as stack:
        for path in paths:
            if not path.is_file():
                raise CorruptError("The run has no such weights.", where=path, fix="train it again")
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        names = list(files[0].keys())
        for path, file in zip(paths, files, strict=True):
            if set(file.keys()) != set(names):
                odd = sorted(set(file.keys()) ^ set(names))[0]
                raise UsageError(f"The runs have different tensors, first {odd!r}.", where=path)
        header, order = _header(paths[0])
        with out.open("wb") as target:
            target.write(header)
            for name in order:
                tensors = (file.get_tensor(name) for file in files)
                target.write(_bytes(_average(name, tensors, share, paths, how)))
            target.flush()
            os.fsync(target.fileno())


def _header(path: Path) -> tuple[bytes, list[str]]:
    """The header of a safetensors file and its tensors in file order: the merge has the same."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        raw = file.read(length)
    entries = {k: v for k, v in json.loads(raw).items() if k != "__metadata__"}
    order = sorted(entries, key=lambda name: (entries[name]["data_offsets"], name))
    return struct.pack("<Q", length) + raw, order


def _average(
    name: str, tensors: Any, share: list[float], paths: list[Path], how: str
) -> torch.Tensor:
    """Weighted mean of one tensor over the models, summed in fp32, in the first one's dtype."""
    import torch

    first, total, before = None, None, 0.0
    for tensor, weight, path in zip(tensors, share, paths, strict=True):
        if first is None:
            first = tensor
            if len(share) == 1 or not tensor.is_floating_point():
                total = tensor
                continue
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            total = tensor.to(wide) * (weight if how == "mean" else 1.0)
            before = weight
            continue
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise UsageError(
                f"Tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, in the first run "
                f"{first.dtype} {list(first.shape)}.",
                where=path,
                fix="average runs of the same architecture",
            )
        if not tensor.is_floating_point():
            if not torch.equal(tensor, first):
                raise UsageError(f"The integer tensor {name!r} differs between runs.", where=path)
            continue
        assert total is not None
        if how == "mean":
            total.add_(tensor.to(total.dtype), alpha=weight)
        elif before + weight > 0:
            before += weight
            total = slerp(total, tensor.to(total.dtype), weight / before)
    assert first is not None and total is not None
    return total.to(first.dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """The place ``t`` of the arc from ``a`` to ``b``, each taken as one vector.

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between them; a straight line where
    they are almost parallel, opposite, or one is zero.
    """
    import torch

    x, y = a.double().reshape(-1), b.double().reshape(-1)
    lengths = float(x.norm() * y.norm())
    cosine = float(x @ y) / lengths if lengths > 0 else 1.0
    if abs(cosine) > 1 - 1e-9:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    wa, wb = (math.sin(u * angle) / math.sin(angle) for u in (1 - t, t))
    return a * wa + b * wb


def _bytes(tensor: torch.Tensor) -> Any:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


# ---------------------------------------------------------------- checks


def model_of(run: Any) -> Path:
    """The model directory of a run.

    Raises:
        CorruptError: it has no weights. FileNotFoundError: no such directory.
    """
    path = Path(getattr(run, "path", None) or run)
    if not path.is_dir():
        raise FileNotFoundError(2, "No such training run or model", str(path))
    model = path / "model" if (path / "model" / "config.json").is_file() else path
    if not (model / "model.safetensors").is_file():
        raise CorruptError(
            "The run has no finished model (model.safetensors).",
            where=model,
            fix="finish the training run, or leave it out",
        )
    return model


def check_compatible(models: Sequence[Path]) -> None:
    """Refuse models that cannot be averaged: another architecture, tokenizer or initialisation."""
    first = models[0]
    for model in models[1:]:
        for name in _SAME:
            if _content(first / name) != _content(model / name):
                what = "tokenizers" if name == "tokenizer.json" else "architectures"
                raise UsageError(
                    f"The runs have different {what}: {name} differs.",
                    where=f"{first} and {model}",
                    fix="average runs that were fine-tuned from the same model",
                )
    starts = {start for model in models if (start := _init(model)) is not None}
    if len(starts) > 1:
        raise UsageError(
            "The runs started from different weights, so their average means nothing.",
            where=", ".join(str(m) for m in models),
            fix="average runs that were fine-tuned from the same model",
        )


def _content(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.name == "tokenizer.json":
        return _rust.blake3_file(str(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content, dict):
        content.pop("digest", None)  # of the weights, which differ on purpose
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _init(model: Path) -> str | None:
    """``init_sha256`` of the run that made a model, when it is recorded."""
    for directory in (model.parent, model):
        manifest = directory / "manifest.json"
        if manifest.is_file():
            found = json.loads(_rust.read_manifest(str(manifest))).get("init_sha256")
            if found is not None:
                return str(found)
    return None


def _name(model: Path) -> str:
    return model.parent.name if model.name == "model" else model.name


def _weights(weights: Sequence[float] | None, n: int, select: str) -> list[float]:
    if weights is None:
        return [1 / n] * n
    if select not in ALL:
        raise UsageError("weights go with select='uniform' and 'slerp'.")
    if len(weights) != n or min(weights) < 0 or sum(weights) <= 0:
        raise UsageError(
            f"{len(weights)} weights for {n} runs, or a negative one.", fix="one weight per run"
        )
    total = float(sum(weights))
    return [float(w) / total for w in weights]
