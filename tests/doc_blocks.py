"""Code blocks of the documentation: found, with the comments that say how they are tested, and run.

A comment right before a fence says what is special; every other block runs as it stands:

    <!-- not run: why -->                 checked all the same: options, settings, imports, keywords
    <!-- run in full: why -->             the same, and run under EMBKIT_TEST_FULL=1
    <!-- tested with: A => B; C => D -->  text of the block that is replaced in the test
    <!-- file: my.toml -->                the block is that file for the blocks after it
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
LANGUAGES = ("python", "sh", "toml", "json", "text")
DIRECTIVES = ("not run", "run in full", "tested with", "file")
PROGRAMS = ("embkit", "make", "pip", "python", "torchrun", "pytest", "cargo", "cp", "$")
_FENCE = re.compile(
    r"(?P<above>(?:^<!--(?:(?!-->).)*-->\n)*)^```(?P<language>[^\n]*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!--\s*([a-z ]+):\s*(.*?)\s*-->", re.DOTALL)


@dataclass
class Block:
    """One fence: the page's name, the line of its first line, and its directives by name."""

    page: str
    line: int
    language: str
    code: str
    says: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        full = bool(os.environ.get("EMBKIT_TEST_FULL"))
        return "not run" not in self.says and (full or "run in full" not in self.says)

    def replaced(self) -> str:
        """The code with what `tested with` replaces; a text that is not there is an error."""
        code = self.code
        for item in re.split(r";\s+|\n", self.says.get("tested with", "")):
            if not item.strip():
                continue
            old, arrow, new = (part.strip() for part in item.partition("=>"))
            assert arrow and old in code, f"{self.where}: {old!r} is not in the block"
            code = code.replace(old, new)
        return code


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page below docs/."""
    return [
        REPO / "README.md",
        REPO / "CONTRIBUTING.md",
        *sorted((REPO / "docs").rglob("*.md")),
    ]


def blocks(page: Path) -> list[Block]:
    """The fences of a page, in order."""
    text = page.read_text("utf-8")
    found = []
    for match in _FENCE.finditer(text):
        says = dict(_COMMENT.findall(match["above"]))
        line = text.count("\n", 0, match.start("code")) + 1
        name = str(page.relative_to(REPO))
        found.append(Block(name, line, match["language"].strip(), match["code"], says))
    return found


def directives(page: Path) -> int:
    """Comments of a page that look like directives, in front of a fence or not."""
    names = "|".join(DIRECTIVES)
    return len(re.findall(rf"^<!--\s*(?:{names}):", page.read_text("utf-8"), re.MULTILINE))


def lines(code: str) -> Iterator[tuple[str, list[list[str]] | None]]:
    """Each line of shell and its commands in words; None where it needs a real shell."""
    for line in re.sub(r"\\\n\s*", " ", code).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words = list(lexer)
        commands: list[list[str]] = [[]]
        for word in words:
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append(word)
        if words:
            plain = not any(set(word) <= set(";&|<>") for c in commands for word in c)
            yield line, commands if plain and "$(" not in line else None


# Running ----------------------------------------------------------------------------------------


def run_shell(code: str, shims: Path) -> None:
    """Run shell lines in the current directory.

    Lines of embkit alone are called in this process, which has paid for torch; others, and all
    under EMBKIT_TEST_FULL=1, go to bash, where `embkit` and `python` are this interpreter's.
    """
    if os.environ.get("EMBKIT_TEST_FULL"):
        _bash(code, shims)
        return
    for line, commands in lines(code):
        if commands is not None and all(words[0] == "embkit" for words in commands):
            for words in commands:
                _embkit(_globbed(words[1:]))
        else:
            _bash(line, shims)


def _globbed(words: list[str]) -> list[str]:
    out: list[str] = []
    for word in words:
        out += sorted(map(str, Path().glob(word))) if "*" in word else [word]
    return out


def _embkit(words: list[str]) -> None:
    import typer.main

    from embkit.cli import app

    with warnings.catch_warnings():
        warnings.simplefilter("default")  # what a shell would show
        typer.main.get_command(app).main(words, prog_name="embkit", standalone_mode=False)


def _bash(code: str, shims: Path) -> None:
    env = {**os.environ, "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        capture_output=True, text=True, timeout=280, check=False, env=env,
    )  # fmt: skip
    assert done.returncode == 0, f"{code}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"


def make_shims(folder: Path) -> Path:
    """A folder for the PATH whose programs are this interpreter's; `pip` and `make` fail."""
    folder.mkdir(parents=True)
    for name in ("pip", "make"):
        (folder / name).write_text(f"#!/bin/sh\necho 'the tests run no {name}' >&2; exit 1\n")
        (folder / name).chmod(0o755)
    modules = {"embkit": "-m embkit", "torchrun": "-m torch.distributed.run", "python": ""}
    for name, words in modules.items():
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    return folder


def run_python(block: Block, code: str, names: dict[str, Any]) -> None:
    """Run a block in the page's namespace; tracebacks have the page's line numbers."""
    source = "\n" * (block.line - 1) + code
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(compile(source, str(REPO / block.page), "exec"), names)


# Checking what does not run ---------------------------------------------------------------------


def check_toml(block: Block) -> None:
    """A part of a recipe loads over quickstart; what extends another, as it is."""
    from embkit import recipe

    table = tomllib.loads(block.code)
    extends = {} if "extends" in table else {"extends": "quickstart"}
    text = "".join(f'{k} = "{v}"\n' for k, v in extends.items()) + block.code
    path = Path("a-part-of-a-recipe.toml")
    path.write_text(text)
    recipe.load(path)


def check_shell(code: str) -> None:
    """Verbs, options, extras and targets that a block names exist."""
    for line, commands in lines(code):
        for words in commands if commands is not None else [shlex.split(line, comments=True)]:
            check_command(words)


def check_command(words: list[str]) -> None:
    """Raises AssertionError or a usage error when a command has words that do not exist."""
    while re.match(r"\w+=", words[0]):
        words = words[1:]
    if words[0] == "embkit":
        check_verb(words[1:])
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[1:])
        assert given.training_script == "embkit" and given.module, words
        check_verb(given.training_script_args)
    elif words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert {w for w in words[1:] if "=" not in w} <= set(targets), words
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
        for extra in re.findall(r"embkit\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys(), words
    elif words[:2] == ["python", "-m"] and words[2].startswith("embkit"):
        assert importlib.util.find_spec(words[2]), words
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (REPO / words[1]).is_file(), words


def check_verb(words: list[str]) -> None:
    """The words behind `embkit` are parsed by the real parser, and settings by the recipes."""
    import typer.main

    from embkit import recipe
    from embkit.cli import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"embkit has no {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(command.name, list(words))
    if command.name not in ("filter", "synth"):
        recipe.load("quickstart", overrides=context.params.get("set_") or ())


def check_options(words: list[str]) -> None:
    """Of a command in running text, where arguments may be left out: its options exist."""
    import typer.main

    from embkit.cli import app

    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    known = {option for p in command.params for option in p.opts} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"{command.name} has no {word}"


def check_python(block: Block) -> None:
    """It compiles, what it imports from embkit exists, and so do the keywords of what it calls."""
    tree = ast.parse(block.code)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "embkit":
                    importlib.import_module(alias.name)
                    top = alias.name if alias.asname else "embkit"
                    names[alias.asname or "embkit"] = sys.modules[top]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "embkit":
            for alias in node.names:
                names[alias.asname or alias.name] = _member(str(node.module), alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (found := _resolve(node.func, names)) is not None:
            allowed = inspect.signature(found).parameters
            if not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
                wrong = {k.arg for k in node.keywords} - {*allowed, None}
                assert not wrong, f"{block.where}: {ast.unparse(node.func)} has no {wrong}"


def _member(module: str, name: str) -> Any:
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if hasattr(loaded, name) else importlib.import_module(
        f"{module}.{name}"
    )  # fmt: skip


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a dotted name of embkit's is, or None when it is somebody else's."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _resolve(node.value, names)) is not None:
        return getattr(owner, node.attr)
    return None
