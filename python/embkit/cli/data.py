"""From records to stores: `embkit dedup`, `filter`, `tokenize`, `store`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embkit.cli.words import Fresh, Out, Set, Settings, settings_of, size_of, wrote


def dedup(
    sources: Annotated[list[str], typer.Argument(help="A records directory, or record files.")],
    out: Out,
    against: Annotated[
        list[Path] | None, typer.Option("--against", help="Evaluation folder; repeatable.")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory beside the texts, e.g. 2G; beyond it, files.")
    ] = "0",
    settings: Settings = "quickstart",
    set_: Set = None,
    fresh: Fresh = False,
) -> None:
    """Remove duplicates, and training rows that leak into evaluation sets."""
    from embkit import data
    from embkit.data.dedup import summary
    from embkit.pipeline import dedup_options, read_options

    limit = size_of(memory)
    chosen = settings_of(settings, set_)
    records = data.read(sources, **read_options(chosen))
    done = data.dedup(
        records,
        out=out,
        against=against or [],
        memory=limit,
        fresh=fresh,
        **dedup_options(chosen),
    )
    print(summary(done.report))
    wrote(out)


def filter_(
    records: Annotated[list[str], typer.Argument(help="A records directory, or record files.")],
    out: Out,
    preset: Annotated[str, typer.Option("--preset", help="default, gopher or off.")] = "default",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="RULE=VALUE", help="Set a rule's bound; repeatable."),
    ] = None,
    languages: Annotated[
        str | None, typer.Option("--languages", help="Languages that stay, e.g. en,de.")
    ] = None,
    action: Annotated[str, typer.Option("--action", help="drop, or mark.")] = "drop",
    score_model: Annotated[
        str | None, typer.Option("--score-model", help="Model that compares query and positive.")
    ] = None,
    min_score: Annotated[float, typer.Option("--min-score", help="Least cosine of a pair.")] = 0.4,
    fresh: Fresh = False,
) -> None:
    """Remove texts that break rules, and pairs that a model finds unlike (docs/filters.md)."""
    from embkit import data
    from embkit.recipe import apply_override

    settings: dict[str, Any] = {}
    for item in set_ or []:
        apply_override(settings, item)
    done = data.filter(
        data.read(records),
        out=out,
        rules=data.FilterRules.preset(preset, settings),
        languages=languages.split(",") if languages else None,
        action=action,
        score=data.ScoreFilter(model=score_model, threshold=min_score) if score_model else None,
        fresh=fresh,
    )
    for task, counts in done.report["examples"].items():
        print(f"  {task}: {counts['before']} examples, {counts['after']} pass")
    wrote(out)


def tokenize(
    records: Annotated[list[str], typer.Argument(help="A dedup output, or record files.")],
    out: Out,
    settings: Settings = "quickstart",
    set_: Set = None,
) -> None:
    """Turn records into a store of token shards and example tables."""
    from embkit import data, pipeline
    from embkit.data.records import as_directory
    from embkit.data.sources import written_in

    chosen = settings_of(settings, set_)
    source = as_directory(data.read(records, **pipeline.read_options(chosen)), out)
    written = written_in(source.dir)
    options = pipeline.tokenizer_options(chosen, pipeline.kinds_of(source), written)
    data.tokenize(source, out=out, **options)
    wrote(out)


def store_merge(
    inputs: Annotated[list[Path], typer.Argument(help="Stores, the first of which keeps rows.")],
    out: Out,
) -> None:
    """Join stores that were tokenized alike; every text once, the first one's rows in place."""
    from embkit import data

    data.merge(inputs, out=out)
    wrote(out)


def store_append(
    store: Annotated[Path, typer.Argument(help="A store; its rows keep their numbers.")],
    more: Annotated[list[str], typer.Argument(help="Record files, or one store.")],
    out: Out,
) -> None:
    """Add records to a store, tokenized as it was."""
    from embkit import data

    data.append(store, more[0] if len(more) == 1 else more, out=out)
    wrote(out)


def store_subset(
    store: Annotated[Path, typer.Argument(help="A store that `embkit tokenize` wrote.")],
    out: Out,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Task to keep; repeatable. All by default.")
    ] = None,
    max_examples: Annotated[
        int | None, typer.Option("--max-examples", help="At most so many per task.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
) -> None:
    """Keep some tasks or examples of a store, and the rows that they name."""
    from embkit import data

    data.subset(store, out=out, tasks=task, max_examples=max_examples, seed=seed)
    wrote(out)
