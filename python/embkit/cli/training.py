"""What trains: `embkit prefinetune`, `mine`, `mix`, `finetune`, `soup`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from embkit.cli.words import Fresh, Out, Set, Settings, numbers_of, settings_of, size_of, wrote
from embkit.errors import UsageError


def prefinetune(
    store: Annotated[Path, typer.Argument(help="A store that `embkit tokenize` wrote.")],
    out: Out,
    model: Annotated[str | None, typer.Option("--model", help="Model to start from.")] = None,
    settings: Settings = "quickstart",
    set_: Set = None,
    fresh: Fresh = False,
) -> None:
    """Train on in-batch negatives."""
    from embkit import pipeline, train
    from embkit.data import Store

    chosen = settings_of(settings, set_)
    opened = Store(store)
    encoder = pipeline.start_encoder(chosen, opened, model=model)
    train.prefinetune(encoder, opened, out=out, config=chosen.prefinetune, fresh=fresh)
    wrote(out)


def mine(
    out: Out,
    model: Annotated[
        str | None,
        typer.Argument(help="A model directory or training run; several by commas; - for none."),
    ] = None,
    store: Annotated[
        Path | None, typer.Argument(help="A store that `embkit tokenize` wrote.")
    ] = None,
    embeddings: Annotated[
        list[Path] | None,
        typer.Option("--embeddings", help="Vectors of the store's rows; repeatable."),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory beside mapped files, e.g. 2G.")
    ] = "0",
    settings: Settings = "quickstart",
    set_: Set = None,
    explain_: Annotated[
        int | None, typer.Option("--explain", help="Show why each candidate of an example went.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="Of --explain.")] = None,
    fresh: Fresh = False,
) -> None:
    """Find hard negatives with a model: search, then rules that are counted."""
    from embkit import pipeline
    from embkit.data import Store
    from embkit.mine import audit_table
    from embkit.mine import explain as explain_query
    from embkit.mine import mine as mine_negatives

    if explain_ is None or not (out / "manifest.json").is_file():
        if store is None:
            raise UsageError("There is no store.", fix="embkit mine MODEL STORE --out DIR")
        models = [name for name in (model or "-").split(",") if name != "-"]
        chosen, limit = settings_of(settings, set_), size_of(memory)
        wanted = pipeline.mined_tasks(chosen, Store(store))
        mine_negatives(
            models, store, out=out, rules=chosen.mine, embeddings=embeddings, memory=limit,
            tasks=wanted, classes=pipeline.mined_classes(chosen, wanted), fresh=fresh,
        )  # fmt: skip
        print(audit_table(json.loads((out / "report.json").read_text("utf-8"))))
    if explain_ is not None:
        given = embeddings[0] if embeddings else None
        print(explain_query(out, explain_, task=task, store=store, embeddings=given))
        return
    wrote(out)


def mix(
    model: Annotated[Path, typer.Argument(help="The model directory or run to start from.")],
    store: Annotated[Path, typer.Argument(help="A store that `embkit tokenize` wrote.")],
    out: Out,
    on: Annotated[Path, typer.Option("--on", help="Dev sets that judge a mixture.")],
    negatives: Annotated[
        Path | None, typer.Option("--negatives", help="What `embkit mine` wrote.")
    ] = None,
    settings: Settings = "quickstart",
    set_: Set = None,
) -> None:
    """Search the weights of the tasks by short fine-tuning runs."""
    from embkit.mix import search_mixture
    from embkit.model import Encoder

    chosen = settings_of(settings, set_)
    found = search_mixture(
        Encoder.from_pretrained(model),
        store,
        out=out,
        on=on,
        config=chosen.finetune,
        mix=chosen.mix,
        negatives=negatives,
    )
    for candidate in found["candidates"]:
        weights = ", ".join(f"{name} {w:.3f}" for name, w in candidate["weights"].items())
        print(f"  {candidate['dev']:6.2f}  {weights}")
    print(f"  the best as a part of a recipe: {out / 'mixture.toml'}")
    wrote(out)


def finetune(
    model: Annotated[Path, typer.Argument(help="The model directory or run to start from.")],
    store: Annotated[Path, typer.Argument(help="A store that `embkit tokenize` wrote.")],
    out: Out,
    negatives: Annotated[
        Path | None, typer.Option("--negatives", help="What `embkit mine` wrote.")
    ] = None,
    settings: Settings = "quickstart",
    set_: Set = None,
    fresh: Fresh = False,
) -> None:
    """Train on single-task batches, with mined hard negatives when given."""
    from embkit import pipeline, train
    from embkit.data import Store
    from embkit.model import Encoder

    chosen = settings_of(settings, set_)
    encoder = Encoder.from_pretrained(model)
    train.finetune(
        encoder,
        Store(store),
        negatives=negatives,
        refresh=pipeline.miner(chosen, store),
        out=out,
        config=chosen.finetune,
        fresh=fresh,
    )
    wrote(out)


def soup(
    runs: Annotated[list[Path], typer.Argument(help="Training runs or model directories.")],
    out: Out,
    on: Annotated[Path | None, typer.Option("--on", help="Dev sets that judge a soup.")] = None,
    select: Annotated[
        str, typer.Option("--select", help="greedy, uniform, slerp, search or best.")
    ] = "greedy",
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of the runs, e.g. 2,1,1: uniform and slerp.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Model to mix the soup with, see --alpha.")
    ] = None,
    alpha: Annotated[
        str, typer.Option("--alpha", help="Way from --base to the soup; of several the best.")
    ] = "1",
    checkpoints: Annotated[
        str | None,
        typer.Option("--checkpoints", help="Of each run in its place: last:5, all, or steps."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Of search: grid, dirichlet or bayes.")
    ] = "bayes",
    candidates: Annotated[int, typer.Option("--candidates", help="That search tries.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of search.")] = 0,
    fresh: Fresh = False,
) -> None:
    """Average the weights of several runs (docs/soup.md)."""
    from embkit.recipe import Soup
    from embkit.soup import soup as make_soup

    make_soup(
        runs,
        out=out,
        select=select,
        on=on,
        weights=numbers_of(weights, "--weights") if weights is not None else None,
        base=base,
        alpha=numbers_of(alpha, "--alpha"),
        search=Soup(method=method, candidates=candidates, seed=seed),
        checkpoints=checkpoints,
        fresh=fresh,
    )
    report = json.loads((out / "report.json").read_text("utf-8"))
    for parent in report["parents"]:
        score = "" if parent["dev"] is None else f"  dev {parent['dev']:.2f}"
        print(f"  {parent['weight']:.4f}  {parent['run']}{score}")
    if "alpha" in report:
        print(f"  alpha {report['alpha']:g} of the way from {report['base']['run']}")
    if report["dev"] is not None:
        print(f"  the soup: dev {report['dev']:.2f}")
    wrote(out)
