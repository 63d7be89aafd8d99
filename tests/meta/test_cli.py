"""The command line is frozen: a new verb or option is a decision, made here and in the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from embkit.cli import app

LLM = ("--llm", "--llm-name", "--gguf", "--concurrency", "--cache", "--token-budget") + (
    "--requests-per-minute",
)
# verb -> its options and arguments
FROZEN = {
    "demo": {"--out", "--data", "--model", "--set", "--fresh"},
    "run": {"recipe", "--out", "--set", "--from", "--fresh", "--dry-run"},
    "explain": {"recipe", "--ranks", "--set"},
    "dedup": {"sources", "--out", "--against", "--memory", "--recipe", "--set", "--fresh"},
    "filter": {"records", "--out", "--preset", "--set", "--languages", "--action", "--score-model"}
    | {"--min-score", "--fresh"},
    "synth": {"passages", "--out", "--prompt", "--set", "--per-passage", "--temperature", "--seed"}
    | {"--rater", "--min-rating", "--personas", "--task", "--max-rejected", "--show-prompt"}
    | {"--sample", "--examples", "--share", "--list", "--min-fit", "--no-judge"}
    | {"--plain", "--fresh", *LLM},
    "relabel": {"records", "--out", "--model", "--candidates", "--constant", "--positive"}
    | {"--negative", "--negatives", "--likelihood", "--relevance", "--seed", "--fresh", *LLM},
    "judge": {"records", "--out", "--prompt", "--min-positive", "--max-negative", "--action"}
    | {"--fresh", *LLM},
    "tokenize": {"records", "--out", "--recipe", "--set"},
    "store merge": {"inputs", "--out"},
    "store append": {"store", "more", "--out"},
    "store subset": {"store", "--out", "--task", "--max-examples", "--seed"},
    "prefinetune": {"store", "--out", "--model", "--recipe", "--set", "--fresh"},
    "mine": {"model", "store", "--out", "--embeddings", "--memory", "--recipe", "--set"}
    | {"--explain", "--task", "--fresh"},
    "mix": {"model", "store", "--out", "--on", "--negatives", "--recipe", "--set"},
    "finetune": {"model", "store", "--out", "--negatives", "--recipe", "--set", "--fresh"},
    "soup": {
        "runs",
        "--out",
        "--on",
        "--select",
        "--weights",
        "--base",
        "--alpha",
        "--checkpoints",
        "--method",
        "--candidates",
        "--seed",
        "--fresh",
    },
    "evaluate": {"model", "on", "--out", "--tasks", "--against", "--dims", "--precision"}
    | {"--leaks", "--held-out", "--cache", "--fresh", "--bf16"},
    "plot": {"results", "--out"},
    "export": {"model", "--out", "--name", "--card", "--onnx", "--int8", "--push", "--private"},
    "inspect": {"path"},
    "verify": {"path"},
    "bench": {"group", "--json", "--quick", "--only"},
}


def test_verbs_and_options_are_the_frozen_ones() -> None:
    group = typer.main.get_command(app)
    found = {
        name: {
            option
            for parameter in command.params
            for option in (
                parameter.opts if parameter.opts[0].startswith("-") else [parameter.name]
            )
        }
        for name, command in leaves("", group)
    }
    assert found == FROZEN


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every verb of a group, with the words that lead to it."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for verb, below in (inner or {}).items():
        yield from leaves(f"{name} {verb}".strip(), below)


def embkit(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embkit", *words],
        capture_output=True, text=True, timeout=120, env={**os.environ, "TERM": "dumb", **env},
        check=False,
    )  # fmt: skip


def test_help_names_every_verb_and_exits_0() -> None:
    done = embkit("--help")
    assert done.returncode == 0
    assert all(verb.split()[0] in done.stdout for verb in FROZEN)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["dedup", "x.jsonl", "--out", "y", "--memory", "infG"], 2, "write for example 500M"),
        (["dedup", "x.jsonl", "--out", "y", "--memory", "much"], 2, "write for example 500M"),
        (["run", "quickstrat"], 4, "quickstart"),
        (["run", "quickstart", "--set", "finetune.lrr=1"], 2, "did you mean 'lr'"),
        (["run", "quickstart", "--set", "finetune.lr=fast"], 2, "Expected float"),
        (["run", "quickstart", "--set", "dedup.threshold=1.5"], 2, "out of range"),
        (["run", "quickstart", "--set", "nonsense"], 2, "KEY=VALUE"),
        (["run", "quickstart", "--from", "minee", "--out", "{tmp}/x"], 2, "did you mean 'mine'"),
        (["run", "quickstart", "--set", "data.path=/no/such", "--out", "{tmp}/x"], 4, "/no/such"),
        (["inspect", "/no/such/path"], 4, "/no/such/path"),
        (["verify", "/no/such/path"], 4, "/no/such/path"),
        (["synth", "x.jsonl"], 2, "--llm http"),
        (["synth", "--show-prompt", "--prompt", "gekko"], 2, "did you mean 'gecko'"),
        (["evaluate", "m"], 2, "Give a folder of sets or --tasks"),
        (["evaluate", "m", "d", "--against", "n"], 2, "write --tasks d"),
        (
            ["evaluate", "m", "--tasks", "d", "--leaks", "x"],
            2,
            "--leaks and --held-out go together",
        ),
        (["evaluate", "m", "--tasks", "d", "--dims", "wide"], 2, "write for example 768,256"),
        (["bench", "kernel"], 2, "did you mean 'kernels'"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_wrong_words_give_one_screen_and_the_documented_code(
    words: list[str], code: int, says: str, tmp_path: object
) -> None:
    done = embkit(*(w.replace("{tmp}", str(tmp_path)) for w in words))
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 20


def test_explain_names_the_origin_of_each_value() -> None:
    done = embkit("explain", "quickstart", "--set", "finetune.lr=0.125")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("lr = 0.125") and line.endswith("# --set") for line in lines)
    assert any(line.endswith("# default") for line in lines)
    assert any(line.endswith("# recipe") for line in lines)
    assert "negative" in done.stdout.split("Who is a negative of whom:")[1]
