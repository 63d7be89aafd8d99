"""The command line: `embkit VERB …`. Thin: each verb parses its words and calls one function.

Exit codes: 0 done, 1 a check failed, 2 usage or recipe, 3 corrupt input, 4 I/O or memory,
75 preempted after a clean checkpoint, 130 Ctrl-C. The set of verbs and options is frozen by
tests/meta/test_cli.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from embkit import cli_llm
from embkit.errors import EmbkitError, UsageError

app = typer.Typer(
    name="embkit",
    help="Train text-embedding models: from raw text to an exported, evaluated model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The quickstart's learning rates are for random weights; trained ones would not survive them.
_GENTLE = (
    "prefinetune.lr=5e-5",
    "finetune.lr=2e-5",
    "runs=[{seed = 0}, {seed = 1, lr = 3e-5}, {seed = 2, cosent_scale = 5.0}]",
)

Out = Annotated[Path, typer.Option("--out", help="Directory to publish.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe value; repeatable."),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Forget finished stages and redo them.")]
Settings = Annotated[
    str,
    typer.Option("--recipe", help="Recipe file or built-in name that gives the settings."),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Run directory.")] = Path("runs/quickstart"),
    data: Annotated[
        Path | None, typer.Option("--data", help="A data folder in place of the bundled one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Start from this model, not from scratch.")
    ] = None,
    set_: Set = None,
    fresh: Fresh = False,
) -> None:
    """The main job on bundled data: a laptop needs about six minutes."""
    overrides = []
    if data is not None:
        overrides.append(f"data.path={json.dumps(str(data))}")
    if model is not None:
        overrides += [f"model.path={json.dumps(model)}", *_GENTLE]
    overrides += set_ or []
    run("quickstart", out=out, set_=overrides, from_=None, fresh=fresh, dry_run=False)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a built-in one.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run directory (default runs/NAME).")
    ] = None,
    set_: Set = None,
    from_: Annotated[
        str | None, typer.Option("--from", help="Redo this stage and the ones after it.")
    ] = None,
    fresh: Fresh = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and sizes; do nothing.")
    ] = False,
) -> None:
    """All stages of a recipe; finished ones are skipped, a killed one resumes."""
    from embkit import pipeline
    from embkit import recipe as recipes

    loaded = recipes.load(recipe, overrides=set_ or ())
    target = out or Path("runs") / loaded.name
    if dry_run:
        print(pipeline.describe(loaded, out=target))
        return
    try:
        pipeline.run(loaded, out=target, from_stage=from_, fresh=fresh)
    except KeyboardInterrupt:  # Typer ends with 130 and says nothing
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        raise


@app.command()
def explain(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a built-in one.")],
    ranks: Annotated[int, typer.Option("--ranks", help="Processes that train together.")] = 1,
    set_: Set = None,
) -> None:
    """The resolved recipe with the origin of each value, and who is a negative of whom."""
    from embkit import pipeline

    print(pipeline.explain(recipe, overrides=set_ or (), ranks=ranks))


@app.command()
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

    limit = _bytes(memory)
    chosen = _settings(settings, set_)
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
    _done(out)


@app.command("filter")
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
    _done(out)


cli_llm.register(app)


@app.command()
def tokenize(
    records: Annotated[list[str], typer.Argument(help="A dedup output, or record files.")],
    out: Out,
    settings: Settings = "quickstart",
    set_: Set = None,
) -> None:
    """Turn records into a store of token shards and example tables."""
    from embkit import data, pipeline
    from embkit.data.records import as_directory

    chosen = _settings(settings, set_)
    source = as_directory(data.read(records, **pipeline.read_options(chosen)), out)
    options = pipeline.tokenizer_options(chosen, pipeline.kinds_of(source))
    data.tokenize(source, out=out, **options)
    _done(out)


stores = typer.Typer(help="Make stores out of stores.", no_args_is_help=True)
app.add_typer(stores, name="store")


@stores.command("merge")
def store_merge(
    inputs: Annotated[list[Path], typer.Argument(help="Stores, the first of which keeps rows.")],
    out: Out,
) -> None:
    """Join stores that were tokenized alike; every text once, the first one's rows in place."""
    from embkit import data

    data.merge(inputs, out=out)
    _done(out)


@stores.command("append")
def store_append(
    store: Annotated[Path, typer.Argument(help="A store; its rows keep their numbers.")],
    more: Annotated[list[str], typer.Argument(help="Record files, or one store.")],
    out: Out,
) -> None:
    """Add records to a store, tokenized as it was."""
    from embkit import data

    data.append(store, more[0] if len(more) == 1 else more, out=out)
    _done(out)


@stores.command("subset")
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
    _done(out)


@app.command()
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

    chosen = _settings(settings, set_)
    opened = Store(store)
    encoder = pipeline.start_encoder(chosen, opened, model=model)
    train.prefinetune(encoder, opened, out=out, config=chosen.prefinetune, fresh=fresh)
    _done(out)


@app.command()
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
        chosen, limit = _settings(settings, set_), _bytes(memory)
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
    _done(out)


@app.command()
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

    chosen = _settings(settings, set_)
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
    _done(out)


@app.command()
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

    chosen = _settings(settings, set_)
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
    _done(out)


@app.command()
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
        weights=_numbers(weights, "--weights") if weights is not None else None,
        base=base,
        alpha=_numbers(alpha, "--alpha"),
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
    _done(out)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A model directory or training run.")],
    on: Annotated[
        Path | None, typer.Argument(help="Folder of sets, scored with embkit's own measures.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Tasks or benchmarks of mteb, or folders; with commas."),
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="A second model, compared in pairs.")
    ] = None,
    dims: Annotated[str | None, typer.Option("--dims", help="Widths, e.g. 768,256.")] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of float, int8 and binary; with commas.")
    ] = "float",
    leaks: Annotated[
        Path | None, typer.Option("--leaks", help="Dedup stage that has found leaks.")
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="What that stage compared with; repeatable."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Directory that keeps vectors of texts.")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Encode in bfloat16: faster where a processor has it.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Directory to publish.")] = None,
    fresh: Fresh = False,
) -> None:
    """Score every MRL width from one encode of each text."""
    from embkit.evaluate import words

    print(
        words.evaluate(
            model, on, tasks=tasks, against=against, dims=dims, precision=precision, leaks=leaks,
            held_out=held_out or [], cache=cache, out=out, fresh=fresh, bf16=bf16,
        )
    )  # fmt: skip


@app.command()
def plot(
    results: Annotated[
        list[Path], typer.Argument(help="A run, or directories that evaluate --out wrote.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory of the PNG files.")],
) -> None:
    """Draw scores over widths, by kind of task and by stage, as PNG."""
    from embkit.report import load_results, save_plots

    for path in save_plots(load_results(results), out):
        print(f"  {path}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model directory or training run.")],
    out: Out,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the model: USER/MODEL on the hub.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="TOML: base_model, language, license, [[data]].")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write onnx/model.onnx too.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="And one of 8-bit weights.")] = False,
    push: Annotated[bool, typer.Option("--push", help="To the hub, as --name.")] = False,
    private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
) -> None:
    """Write the sentence-transformers layout, and check it when that library is there."""
    from embkit.model import Card, Encoder, check_export, check_serving
    from embkit.model import export as write
    from embkit.model.card import find
    from embkit.model.hub import push_to_hub

    if push and not name:
        raise UsageError("--push needs the name of a repository.", fix="--name USER/MODEL")
    encoder = Encoder.from_pretrained(model)
    about = find(model)
    if card is not None:
        about = Card.read(card, base=about)
    write(encoder, out, name=name, card=about, onnx=onnx, int8=int8)
    difference = check_export(encoder, out, ["a first text", "and a second, somewhat longer one"])
    if difference is not None:
        print(f"  reloaded with sentence-transformers: max |difference| {difference:.1e}")
    for server, notes in check_serving(out).items():
        for note in notes:
            print(f"  {server}: {note}")
    _done(out)
    if push and name:
        print(f"  {push_to_hub(out, name, private=private)}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Any file or directory that embkit wrote.")],
) -> None:
    """What a file or directory holds."""
    from embkit import inspection

    print(inspection.describe(path))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Any file or directory that embkit wrote.")],
) -> None:
    """Check every checksum; exit code 3 names the first damaged file."""
    from embkit import inspection

    files, size = inspection.verify(path)
    print(f"{path}: {files} files, {size:,} bytes, all checksums match")


@app.command()
def bench(
    group: Annotated[str, typer.Argument(help="One of the groups in docs/benchmarks.md.")],
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the rows to this file too.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, few rounds.")] = False,
    only: Annotated[str, typer.Option("--only", help="Cases with this in their name.")] = "",
) -> None:
    """Measure beside rivals, results asserted equal first."""
    from embkit import bench as harness

    rows: list[Any] = []
    for row in harness.run_group(group, quick=quick, only=only):
        if isinstance(row, str):
            print(row, flush=True)
        else:
            rows.append(row)
            print(f"{row.name}: {row.value:.4g} {row.unit}", flush=True)
    print(harness.table(rows))
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(harness.to_json(rows))


def _settings(recipe: str, overrides: list[str] | None) -> Any:
    from embkit import recipe as recipes

    return recipes.load(recipe, overrides=overrides or ())


def _bytes(text: str) -> int:
    """A size such as 500M or 2G."""
    unit = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(text[-1:].upper(), 0)
    try:
        return int(float(text[:-1]) * unit) if unit else int(text)
    except (ValueError, OverflowError):
        raise UsageError(f"{text!r} is no size.", fix="write for example 500M or 2G") from None


def _numbers(text: str, option: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{text!r} is no list of numbers.", where=option, fix="2,1,1") from None


def _done(out: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"  wrote {out}")


def main() -> None:
    """Run the command line and turn errors into one screen of text and an exit code."""
    try:
        app()
    except EmbkitError as error:
        _fail(error, error.exit_code)
    except MemoryError:
        _fail("out of memory\n  fix:   lower token_budget or batch_size", 4)
    except OSError as error:
        where = f"\n  where: {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}", 4)


def _fail(what: object, code: int) -> None:
    if os.environ.get("EMBKIT_TRACEBACK"):
        raise
    print(f"error: {what}", file=sys.stderr)
    sys.exit(code)
