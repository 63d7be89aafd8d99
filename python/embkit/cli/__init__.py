"""The command line: `embkit VERB …`. Thin: each verb parses its words and calls one function.

Exit codes: 0 done, 1 a check failed, 2 usage or recipe, 3 corrupt input, 4 I/O or memory,
75 preempted after a clean checkpoint, 130 Ctrl-C. The set of verbs and options is frozen by
tests/meta/test_cli.py.
"""

from __future__ import annotations

import os
import sys

import typer

from embkit.cli import data, llm, models, runs, training
from embkit.errors import EmbkitError

app = typer.Typer(
    name="embkit",
    help="Train text-embedding models: from raw text to an exported, evaluated model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# In the order in which --help shows them.
for verb in (
    *(runs.demo, runs.run, runs.explain),
    *(data.dedup, data.filter_, llm.synth, llm.relabel, llm.judge, data.tokenize),
    *(training.prefinetune, training.mine, training.mix, training.finetune, training.soup),
    *(models.evaluate, models.plot, models.export, models.inspect, models.verify, models.bench),
):
    app.command(verb.__name__.rstrip("_"))(verb)

stores = typer.Typer(help="Make stores out of stores.", no_args_is_help=True)
app.add_typer(stores, name="store")
stores.command("merge")(data.store_merge)
stores.command("append")(data.store_append)
stores.command("subset")(data.store_subset)


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
