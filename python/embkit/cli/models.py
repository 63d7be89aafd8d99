"""Models and files: `embkit evaluate`, `plot`, `export`, `inspect`, `verify`, `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from embkit.cli.words import Fresh, Out, wrote
from embkit.errors import UsageError


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
    wrote(out)
    if push and name:
        print(f"  {push_to_hub(out, name, private=private)}")


def inspect(
    path: Annotated[Path, typer.Argument(help="Any file or directory that embkit wrote.")],
) -> None:
    """What a file or directory holds."""
    from embkit import inspection

    print(inspection.describe(path))


def verify(
    path: Annotated[Path, typer.Argument(help="Any file or directory that embkit wrote.")],
) -> None:
    """Check every checksum; exit code 3 names the first damaged file."""
    from embkit import inspection

    files, size = inspection.verify(path)
    print(f"{path}: {files} files, {size:,} bytes, all checksums match")


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
