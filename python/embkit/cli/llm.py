"""The verbs that ask a language model: `embkit synth`, `relabel`, `judge` (docs/synth.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embkit.cli.words import Fresh, Out
from embkit.errors import UsageError

Model = Annotated[
    str | None,
    typer.Option("--llm", help="Address of an OpenAI-compatible server, or a model directory."),
]
Name = Annotated[str | None, typer.Option("--llm-name", help="The model's name on the server.")]
Gguf = Annotated[str | None, typer.Option("--gguf", help="A GGUF file inside the model directory.")]
Plain = Annotated[bool, typer.Option("--plain", help="Completions, without a chat template.")]
Concurrency = Annotated[int, typer.Option("--concurrency", help="Requests at a time.")]
CacheFile = Annotated[
    Path | None, typer.Option("--cache", help="File of answers: nothing is asked twice.")
]
Budget = Annotated[
    int | None, typer.Option("--token-budget", help="Tokens after which no request is sent.")
]
Rate = Annotated[
    float | None, typer.Option("--requests-per-minute", help="A rate that is not passed.")
]
Records = Annotated[list[str], typer.Argument(help="A records directory, or record files.")]


def synth(
    out: Out = Path("synth"),
    passages: Annotated[
        list[str] | None, typer.Argument(help="JSON lines with text, or a records directory.")
    ] = None,
    llm: Model = None,
    llm_name: Name = None,
    gguf: Gguf = None,
    plain: Plain = False,
    concurrency: Concurrency = 8,
    cache: CacheFile = None,
    token_budget: Budget = None,
    requests_per_minute: Rate = None,
    prompt: Annotated[
        str,
        typer.Option("--prompt", help="gecko, swim-ir, qwen3, reviews, ... or a TOML file."),
    ] = "gecko",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=A,B", help="Options of a control; repeatable."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", help="Passages drawn; 0 takes all.")] = 0,
    per_passage: Annotated[int, typer.Option("--per-passage", help="Queries each.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 is greedy (0.7; 0.9 for labelled texts)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of controls and sampling.")] = 0,
    rater: Annotated[
        str | None, typer.Option("--rater", help="Prompt that grades the queries, e.g. rater.")
    ] = None,
    min_rating: Annotated[float, typer.Option("--min-rating", help="Least grade.")] = 1.0,
    personas: Annotated[
        Path | None, typer.Option("--personas", help="File of characters, one a line.")
    ] = None,
    examples: Annotated[
        int, typer.Option("--examples", help="Labelled texts or pairs to ask for.")
    ] = 1000,
    share: Annotated[
        list[str] | None,
        typer.Option("--share", metavar="LABEL=X", help="Share of a label; repeatable."),
    ] = None,
    list_: Annotated[
        list[str] | None,
        typer.Option("--list", metavar="NAME=FILE", help="A list's entries, one a line."),
    ] = None,
    min_fit: Annotated[
        float, typer.Option("--min-fit", help="Least probability of a text's own label.")
    ] = 0.5,
    no_judge: Annotated[
        bool, typer.Option("--no-judge", help="Take labelled texts without judging them.")
    ] = False,
    task: Annotated[
        str | None, typer.Option("--task", help="Name of the task (synthetic, or the prompt's).")
    ] = None,
    max_rejected: Annotated[
        float, typer.Option("--max-rejected", help="Share of items left unanswered.")
    ] = 0.05,
    show_prompt: Annotated[
        bool, typer.Option("--show-prompt", help="Print the prompt file, to edit a copy; end.")
    ] = False,
    fresh: Fresh = False,
) -> None:
    """Let a language model write queries for passages, or labelled texts and pairs."""
    from embkit.synth import Labelled, Personas, Write, write_labelled, write_queries
    from embkit.synth.passages import read_lines
    from embkit.synth.prompts import load, source

    if show_prompt:
        print(source(prompt), end="")
        return
    chosen = load(prompt)
    if chosen.kind == "retrieval" and not passages:
        raise UsageError("There are no passages.", fix="embkit synth PASSAGES --llm URL --out DIR")
    if chosen.kind != "retrieval" and passages:
        raise UsageError(
            f"The prompt {chosen.name!r} writes {chosen.kind} data, and takes no passages.",
            fix="leave them out, or take a prompt for queries",
        )
    controls = {
        name: [option.strip() for option in options.split(",")]
        for name, options in _pairs("--set", set_, "language=German,French")
    }
    of_texts: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    of_texts |= {"seed": seed, "controls": controls, "max_rejected": max_rejected}
    backend = _backend(
        llm, llm_name, gguf, concurrency, cache, token_budget, requests_per_minute, plain=plain
    )
    if chosen.kind == "retrieval":
        how = Write(
            prompt=chosen, sample=sample, per_passage=per_passage, rater=rater,
            min_rating=min_rating, **of_texts,
        )  # fmt: skip
        done = write_queries(
            [Path(p) for p in passages or ()], llm=backend, out=out, how=how,
            task=task or "synthetic",
            personas=None if personas is None else Personas.read(personas), fresh=fresh,
        )  # fmt: skip
    else:
        labelled = Labelled(
            prompt=chosen, examples=examples, min_fit=min_fit, judge=not no_judge,
            shares={name: _number(x) for name, x in _pairs("--share", share, "positive=2")},
            lists={name: read_lines(f) for name, f in _pairs("--list", list_, "persona=FILE")},
            **of_texts,
        )  # fmt: skip
        done = write_labelled(llm=backend, out=out, how=labelled, task=task, fresh=fresh)
    report = done.report
    dropped = ", ".join(f"{n} x {why}" for why, n in report["dropped"].items()) or "none"
    what = "queries" if chosen.kind == "retrieval" else "examples"
    print(f"  {report['items']} items: {report['kept']} {what}; dropped: {dropped}")
    for name, counts in report.get("labels", {}).items():
        print(
            f"    {name}: {counts['kept']} ({counts['share']:.1%}, wanted {counts['wanted']:.1%})"
        )
    print(f"  wrote {out}")


def _pairs(option: str, given: list[str] | None, example: str) -> list[tuple[str, str]]:
    out = []
    for item in given or []:
        name, _, value = item.partition("=")
        if not name or not value:
            form = {"--set": "NAME=A,B", "--share": "LABEL=X"}.get(option, "NAME=FILE")
            raise UsageError(f"{item!r} is no {form}.", where=option, fix=f"e.g. {example}")
        out.append((name, value))
    return out


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{text!r} is no number.", where="--share") from None


def relabel(
    records: Records,
    out: Out,
    model: Annotated[str, typer.Option("--model", help="Embedder trained on these pairs.")],
    llm: Model = None,
    llm_name: Name = None,
    gguf: Gguf = None,
    concurrency: Concurrency = 8,
    cache: CacheFile = None,
    token_budget: Budget = None,
    requests_per_minute: Rate = None,
    candidates: Annotated[int, typer.Option("--candidates", help="Passages ranked.")] = 20,
    constant: Annotated[float, typer.Option("--constant", help="Of 1 / (c + rank).")] = 0.0,
    positive: Annotated[str, typer.Option("--positive", help="best, or seed.")] = "best",
    negative: Annotated[str, typer.Option("--negative", help="last, random or none.")] = "last",
    negatives: Annotated[int, typer.Option("--negatives", help="Of each query.")] = 1,
    likelihood: Annotated[str, typer.Option("--likelihood", help="Prompt.")] = "likelihood",
    relevance: Annotated[str, typer.Option("--relevance", help="Prompt.")] = "relevance",
    seed: Annotated[int, typer.Option("--seed", help="Of random negatives.")] = 0,
    fresh: Fresh = False,
) -> None:
    """Choose positives and hard negatives with a language model among the nearest passages."""
    from embkit import data
    from embkit.synth import Relabel
    from embkit.synth import relabel as run

    how = Relabel(
        candidates=candidates, constant=constant, positive=positive, negative=negative,
        negatives=negatives, likelihood=likelihood, relevance=relevance, seed=seed,
    )  # fmt: skip
    backend = _backend(llm, llm_name, gguf, concurrency, cache, token_budget, requests_per_minute)
    done = run(data.read(records), model=model, llm=backend, out=out, how=how, fresh=fresh)
    for name, counts in done.report["tasks"].items():
        print(
            f"  {name}: {counts['judged']} of {counts['examples']} judged, another positive for "
            f"{counts['share_best_is_not_seed']:.1%}, {counts['negatives']} negatives"
        )
    print(f"  wrote {out}")


def judge(
    records: Records,
    out: Out,
    llm: Model = None,
    llm_name: Name = None,
    gguf: Gguf = None,
    concurrency: Concurrency = 8,
    cache: CacheFile = None,
    token_budget: Budget = None,
    requests_per_minute: Rate = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt with grades; twice for two judges.")
    ] = None,
    min_positive: Annotated[float, typer.Option("--min-positive", help="Least grade.")] = 1.0,
    max_negative: Annotated[float, typer.Option("--max-negative", help="Highest grade.")] = 2.0,
    action: Annotated[str, typer.Option("--action", help="drop, or mark.")] = "drop",
    fresh: Fresh = False,
) -> None:
    """Grade pairs with a language model: weak positives and strong negatives go."""
    from embkit import data
    from embkit.synth import Judge
    from embkit.synth import judge as run

    how = Judge(
        prompts=tuple(prompt or ("relevance",)), min_positive=min_positive,
        max_negative=max_negative, action=action,
    )  # fmt: skip
    backend = _backend(llm, llm_name, gguf, concurrency, cache, token_budget, requests_per_minute)
    done = run(data.read(records), llm=backend, out=out, how=how, fresh=fresh)
    for name, counts in done.report["tasks"].items():
        print(
            f"  {name}: {counts['before']} examples, {counts['after']} pass; "
            f"{counts['weak_positives']} weak positives, {counts['strong_negatives']} strong "
            "negatives"
        )
    if "agreement" in done.report:
        print(f"  agreement of the judges: {done.report['agreement']}")
    print(f"  wrote {out}")


def _backend(
    llm: str | None, name: str | None, gguf: str | None, concurrency: int, cache: Path | None,
    token_budget: int | None, requests_per_minute: float | None, *, plain: bool = False,
) -> Any:  # fmt: skip
    """A server for an address, else a model in this process."""
    from embkit.recipe import Llm
    from embkit.synth import open_llm

    return open_llm(
        Llm(
            model=llm, name=name, gguf=gguf, plain=plain, concurrency=concurrency,
            cache=None if cache is None else str(cache), token_budget=token_budget,
            requests_per_minute=requests_per_minute,
        )
    )  # fmt: skip
