"""The examples for clusters parse, and every flag and setting in them exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from embkit import recipe
from embkit.cli import app

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def check_words(words: list[str]) -> None:
    """The words behind `embkit`: a verb, its options and settings."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    takes = {option: p for p in command.params for option in p.opts}
    at, positional = 1, 0
    while at < len(words):
        word = words[at]
        if not word.startswith("-"):
            positional += 1
            at += 1
            continue
        assert word in takes, f"embkit {words[0]} has no {word}"
        if word == "--set":
            recipe.load("quickstart", overrides=[words[at + 1]])
        at += 1 if getattr(takes[word], "is_flag", False) else 2
    assert positional == sum(p.param_type_name == "argument" for p in command.params)


def test_slurm() -> None:
    from torch.distributed.run import get_args_parser

    script = EXAMPLES / "slurm.sh"
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    text = script.read_text().replace("\\\n", " ")
    (line,) = [x for x in text.splitlines() if "torchrun" in x and not x.startswith("#")]
    plain = re.sub(r'"?\$\{?(\w+)\}?', "1", line).replace('"', "").rstrip("& ")
    words = shlex.split(plain)
    given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert given.training_script == "embkit" and given.module
    check_words(given.training_script_args)
    options = dict(re.findall(r"#SBATCH --([\w-]+)=?(\S*)", text))
    assert options["signal"].startswith("TERM@") and "requeue" in options
    assert '"preempted":true' in text, (
        "what embkit writes, as tests/train/test_preemption.py has it"
    )


def test_kubernetes() -> None:
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["PersistentVolumeClaim", "Job"]
    claim, job = documents
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "embkit"]
    check_words(container["args"])
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {c: r["action"] for r in rules for c in r.get("onExitCodes", {}).get("values", [])}
    assert codes == {75: "Ignore", 2: "FailJob", 3: "FailJob"}
    assert pod["restartPolicy"] == "Never", "pod failure policies need it"
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
