"""From the trained models to the exported one: soup, scores, result.json and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit.errors import CorruptError

if TYPE_CHECKING:
    import torch

    from embkit.model import Encoder
    from embkit.pipeline.running import Run


def finish(run: Run, start: Encoder, pre: Encoder, tuned: list[Path]) -> dict[str, Any]:
    """Soup, evaluate, export and report; what ``result.json`` holds.

    Args:
        start: before any training. pre: after pre-finetuning. tuned: the fine-tuning runs.

    Raises:
        CorruptError: the exported model differs from the encoder.
    """
    from embkit.model import Card, Encoder

    out, recipe = run.out, run.recipe
    run.stage("soup", "uniform and greedy, judged on dev")
    from embkit.soup import soup

    chosen = recipe.soup
    dev = run.data / "dev"
    soups = {
        "uniform": soup(tuned, out=out / "uniform", select="uniform"),
        "greedy": soup(tuned, out=out / "soup", select="greedy", on=dev),
    }
    if chosen.select not in soups:
        soups[chosen.select] = soup(
            tuned, out=out / chosen.select, select=chosen.select, search=chosen,
            on=dev if chosen.select == "search" else None,
        )  # fmt: skip
    kept = chosen.select
    if chosen.alpha != (1.0,):
        kept = "mixed with the start"
        soups[kept] = soup(
            tuned, out=out / "mixed", select=chosen.select, search=chosen, on=dev,
            base=out / "pre", alpha=chosen.alpha,
        )  # fmt: skip

    run.stage("evaluate", "every width from one encode")
    models = {"start" if recipe.model.path else "untrained": start, "pre-finetuned": pre}
    models |= {f"fine-tuned {i}": Encoder.from_pretrained(p) for i, p in enumerate(tuned)}
    models |= {f"soup, {name}": encoder for name, encoder in soups.items()}
    result = _scores(run, models, pre.device)

    run.stage("export", "sentence-transformers layout")
    final = soups[kept].cpu()  # its check compares with the CPU
    final.export(out / "model", card=Card.of_run(out, result=result, soup=kept))
    result["export"] = checked(final, out / "model", _sample_texts(run.data))
    _write(run, result)
    return result


def _scores(run: Run, models: Mapping[str, Encoder], device: torch.device) -> dict[str, Any]:
    from embkit.evaluate import evaluate

    scores: dict[str, Any] = {}
    for split in ("dev", "test"):
        scores[split] = {}
        for i, (name, encoder) in enumerate(models.items()):
            target = run.out / "scores" / f"{split}-{name.replace(', ', '-').replace(' ', '-')}"
            bm25 = run.recipe.evaluate.bm25 and i == 0
            found = evaluate(encoder.to(device), run.data / split, out=target, bm25=bm25)
            scores[split][name] = found
    return {
        "recipe": run.recipe.name,
        "dims": list(models["pre-finetuned"].dims),
        "scores": scores,
        "soup": {
            name: read_json(run.out / folder / "report.json")
            for name, folder in _soups(run).items()
        },
        "dedup": read_json(run.out / "clean" / "report.json"),
        "mine": read_json(run.out / "mined" / "report.json"),
        **(
            {"filter": read_json(run.out / "filtered" / "report.json")}
            if run.recipe.filter.enabled
            else {}
        ),
        **(run.asking.reports() if run.asking else {}),
    }


def _soups(run: Run) -> dict[str, str]:
    """Folders of the soups by what they are."""
    found = {"uniform": "uniform", "greedy": "soup"}
    chosen = run.recipe.soup
    found.setdefault(chosen.select, chosen.select)
    return found | ({"mixed": "mixed"} if chosen.alpha != (1.0,) else {})


def _write(run: Run, result: dict[str, Any]) -> None:
    from embkit import _rust
    from embkit.report import table, write_report

    run.close_stage()
    _publish_json(run.out / "result.json", result)
    _publish_json(run.out / "seconds.json", run.seconds)
    logs = {p.parent.name: p for p in sorted(run.out.glob("*/log.jsonl"))}
    settings = (run.out / "recipe.toml").read_text()
    usage = run.asking.spent.read() if run.asking else {}
    page = write_report(result, logs=logs, settings=settings, seconds=run.seconds, usage=usage)
    _rust.publish_file(str(run.out / "report.html"), page.encode())
    print()
    print(table(result))
    difference = result["export"]["max_abs_difference"]
    print()
    if difference is None:
        print("export: not reloaded (pip install 'embkit[st]' to check it)")
    else:
        print(f"export: sentence-transformers gives the same, max |difference| {difference:.1e}")
        if difference > result["export"]["limit"]:
            raise CorruptError(
                "The exported model differs from the encoder.",
                where=run.out / "model",
                fix="please report it with result.json",
            )
    kept = result["soup"]["greedy"]["kept"]
    runs = len(result["soup"]["greedy"]["candidates"])
    print(f"greedy soup: kept {len(kept)} of {runs} runs")
    print(f"report: {run.out / 'report.html'}")
    print("\nUse the model:\n")
    print("  from sentence_transformers import SentenceTransformer")
    print(f"  model = SentenceTransformer({str(run.out / 'model')!r})")
    print('  model.similarity(model.encode(["text editor"]), model.encode(["edits files"]))')


def checked(encoder: Encoder, exported: Path, texts: list[str]) -> dict[str, float | None]:
    """How much the exported model differs, and how much it may.

    That is 2e-6, or what the encoder differs from itself when it takes the texts one by one: in 30
    layers of a real language model the rounding of float32 comes to 3e-5.
    """
    import numpy as np

    from embkit.model import check_export

    difference, limit = check_export(encoder, exported, texts), 2e-6
    if difference is not None and difference > limit:
        prompt = encoder.prompts["passage"]
        longest = len(texts) * max(encoder.max_length.values())
        together = encoder.encode(texts, prompt=prompt, token_budget=longest)
        alone = np.concatenate([encoder.encode([text], prompt=prompt) for text in texts])
        limit = max(limit, float(np.abs(together - alone).max()))
    return {"max_abs_difference": difference, "limit": limit}


def _sample_texts(data: Path) -> list[str]:
    """Some real texts of several lengths, to compare the export on."""
    from embkit.evaluate.tasks import load_split

    columns = ("queries", "corpus", "first", "test")
    sets = load_split(data / "test")
    return [text for found in sets for name in columns for text in getattr(found, name, [])[:16]]


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _publish_json(path: Path, content: Mapping[str, Any]) -> None:
    from embkit import _rust

    _rust.publish_file(str(path), (json.dumps(content, indent=1) + "\n").encode())
