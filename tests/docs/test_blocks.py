"""Every code block of the documentation runs, or says why not and is checked as far as possible."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_blocks
import pytest
import torch
from doc_blocks import REPO, Block, blocks, pages
from small import TINY, make_small_data

PAGES = [p for p in pages() if blocks(p)]
sys.path.insert(0, str(REPO / "tests" / "synth"))  # the small language model and its server


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' commands run: `data`, and `runs/quickstart` as `embkit demo` leaves it."""
    import zstandard

    from embkit import pipeline, recipe

    folder = tmp_path_factory.mktemp("docs")
    small = make_small_data(folder / "data", rows=240)
    for path in sorted(small.rglob("*.jsonl")):  # named as the bundled files are
        packed = path.with_name(path.name + ".zst")
        packed.write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("EMBKIT_PROGRESS", "plain")
        made = recipe.load("quickstart", overrides=['data.path="data"', *TINY])
        pipeline.run(made, out=Path("runs/quickstart"))
    return folder


@pytest.fixture
def page_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world for one page, as the current directory; one compute thread."""
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("EMBKIT_PROGRESS", "plain")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    return folder


@pytest.fixture(scope="module")
def llm(world: Path) -> Iterator[str]:
    """Address of a language model; the same one is in `models/some-llm`."""
    from lm import make_lm
    from loopback import Loopback

    def answer(prompt: str) -> str:
        passage = ["", *re.findall(r"<passage>\n(.*?)\n</passage>", prompt, re.DOTALL)][-1]
        query = f"where is it said that {' '.join(passage.split()[:6]).lower()}"
        return json.dumps({"task": "Given a question, find its answer.", "query": query})

    model, tokenizer = make_lm(longest=16384)
    model.save_pretrained(world / "models" / "some-llm")
    tokenizer.save_pretrained(world / "models" / "some-llm")
    with Loopback(model, tokenizer, answer=answer, longest=16384) as server:
        yield server.url


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
@pytest.mark.timeout(600)
def test_the_blocks_of_a_page_run(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    url = request.getfixturevalue("llm") if "{llm}" in page.read_text("utf-8") else ""
    request.getfixturevalue("page_folder")
    shims = doc_blocks.make_shims(tmp_path / "bin")
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        try:
            run_or_check(block, block.replaced().replace("{llm}", url), names, shims)
        except BaseException as error:
            error.add_note(f"in the block at {block.where}")
            raise


WRONG = [
    ("sh", "embkit run quickstart --fro mine\n", "No such option"),
    ("sh", "embkit run quickstart --set finetune.lrr=1\n", "did you mean 'lr'"),
    ("sh", "embkit store join a b --out c\n", "no join"),
    ("sh", "embkit mine a \\\n    b\n", "Missing parameter: out"),
    ("sh", "torchrun --nproc-per-node=2 -m embkit prefinetun s --out o\n", "no prefinetun"),
    ("sh", "make demos\n", "demos"),
    ("sh", "pip install 'embkit[sts]'\n", "sts"),
    ("sh", "python benches/nothing.py\n", "nothing"),
    ("python", "import embkit as ek\nek.soup(runs, out='o', selects='best')\n", "selects"),
    ("python", "from embkit.data import Stor\n", "Stor"),
    ("toml", "[finetune]\nstep = 3\n", "did you mean 'steps'"),
    ("toml", "[finetune\n", "Expected"),
]


@pytest.mark.parametrize(("language", "code", "says"), WRONG)
def test_what_is_wrong_in_a_block_that_does_not_run_is_found(
    language: str, code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    block = Block("docs/x.md", 1, language, code, {"not run": "a test"})
    with pytest.raises(Exception, match=re.escape(says)):
        run_or_check(block, code, {}, tmp_path)


def test_a_replacement_that_is_not_there_and_a_failing_block_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="steps=3"):
        Block("docs/x.md", 7, "sh", "embkit demo", {"tested with": "steps=3 => steps=1"}).replaced()
    failing = Block("docs/x.md", 7, "python", "a = 1\nassert a == 2\n")
    with pytest.raises(AssertionError) as found:
        run_or_check(failing, failing.code, {}, tmp_path)
    assert found.traceback[-1].lineno == 7, "the line on the page, counted from 0"
    with pytest.raises(AssertionError, match="No such file"):
        doc_blocks.run_shell(
            "embkit inspect nothing | cat\n", doc_blocks.make_shims(tmp_path / "b")
        )


def run_or_check(block: Block, code: str, names: dict[str, Any], shims: Path) -> None:
    if "file" in block.says:
        path = Path(block.says["file"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    if block.language == "toml" and "file" not in block.says:
        doc_blocks.check_toml(block)
    elif block.language == "json":
        for line in code.splitlines():
            json.loads(line)
    elif block.language == "sh":
        doc_blocks.check_shell(code)
        if block.runs:
            doc_blocks.run_shell(code, shims)
    elif block.language == "python":
        doc_blocks.check_python(block)
        if block.runs:
            doc_blocks.run_python(block, code, names)


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(REPO)))
def test_fences_say_what_they_are(page: Path) -> None:
    text = page.read_text("utf-8")
    found = blocks(page)
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(found), "a fence is not read"
    programs = "|".join(map(re.escape, doc_blocks.PROGRAMS))
    assert not re.findall(rf"^ {{4,}}(?:{programs}) .*", text, re.MULTILINE), "shell without fence"
    assert doc_blocks.directives(page) == sum(len(b.says) for b in found), "not before a fence"
    for block in found:
        assert block.language in doc_blocks.LANGUAGES, block.where
        assert block.says.keys() <= set(doc_blocks.DIRECTIVES), block.where
        assert all(block.says.values()), f"{block.where}: no reason"
        if block.language == "text":
            first = {line.split()[0] for line in block.code.splitlines() if line.split()}
            assert not first & set(doc_blocks.PROGRAMS), f"{block.where} is shell"


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(REPO)))
def test_options_in_running_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(embkit [^`]+)`", text):
        words = shlex.split(re.sub(r"[\[\]]", " ", code.replace("\n", " ")).replace("'", " "))
        doc_blocks.check_options(words[1:])


def test_every_public_package_has_a_page_of_the_reference() -> None:
    package = REPO / "python" / "embkit"
    public = {
        ".".join(("embkit", *path.parent.relative_to(package).parts))
        for path in package.rglob("__init__.py")
        if "__all__" in path.read_text("utf-8") and "bench" not in path.parts
    }
    public.add("embkit.kernels")  # behind a link
    assert {"embkit", "embkit.data", "embkit.train"} <= public
    pages = "".join(p.read_text("utf-8") for p in (REPO / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)) | {"embkit"}
    assert public <= shown
