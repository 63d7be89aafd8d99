"""Stores that are composed: killed on the way, and given what does not fit."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embkit import _rust, data
from embkit.data import Store, compose
from embkit.errors import CorruptError, UsageError

from .composed import LENGTHS, PROMPTS, examples, make, shards
from .conftest import RETRIEVAL, STS
from .test_records import files


@pytest.mark.promise
def test_a_killed_merge_resumes_to_the_same_bytes(
    tmp_path: Path, tokenizer: Path, small_shards: None
) -> None:
    long = [{"query": f"one {i}", "positive": f"two {i} {i + 1}"} for i in range(150)]
    make(tmp_path / "a", {"t": long[:100]}, tokenizer)
    make(tmp_path / "b", {"t": long[50:]}, tokenizer)
    want = data.merge([tmp_path / "a" / "store", tmp_path / "b" / "store"], out=tmp_path / "want")
    driver = textwrap.dedent(
        """
        import os, signal, sys, threading
        from pathlib import Path
        from embkit import _rust, data
        from embkit.stage import Stage
        folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
        whole = _rust.compose_store
        _rust.compose_store = lambda *a, **k: whole(*a, **{**k, "shard_bytes": 64})
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        def watch():
            while len(list(folder.glob(".partial-got-*/texts-*"))) < kill_at:
                pass
            die()
        if kill_at:
            threading.Thread(target=watch, daemon=True).start()
        else:
            Stage.publish = die
        data.merge([folder / "a" / "store", folder / "b" / "store"], out=folder / "got")
        """
    )
    total, seen = len(shards(want)), []
    for kill_at in (total // 3, 2 * total // 3, 0):  # twice in the work, once before publishing
        done = subprocess.run(
            [sys.executable, "-c", driver, str(tmp_path), str(kill_at)], check=False, timeout=60
        )
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "got").exists()
        seen.append(len(list(tmp_path.glob(".partial-got-*/texts-*"))))
    assert total // 3 <= seen[0] < total and seen[2] == total
    left = next(tmp_path.glob(".partial-got-*"))
    for path in sorted(left.glob("texts-*"))[-3:]:  # one lost, one damaged, one of other work
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    sorted(left.glob("raw-*"))[-5].unlink()
    told: list[dict[str, int]] = []
    whole: Callable[..., Any] = _rust.compose_store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _rust, "compose_store", lambda *a, **k: told.append(whole(*a, **k)) or told[-1]
        )
        got = data.merge([tmp_path / "a" / "store", tmp_path / "b" / "store"], out=tmp_path / "got")
    assert files(got.path) == files(want.path)
    assert 0 < told[0]["adopted"] < told[0]["rows"]


def test_stores_that_do_not_fit_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    table = {"t": [{"query": "one", "positive": "two"}]}
    first = make(tmp_path / "a", table, tokenizer)

    def refused(match: str, other: Store) -> None:
        with pytest.raises(UsageError, match=match):
            data.merge([first, other], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("prompts is", make(tmp_path / "b", table, tokenizer, prompts=PROMPTS))
    shorter = {"max_length_query": 4, "max_length_passage": 9}
    records = data.read(tmp_path / "a" / "in")
    refused(
        "max_length is",
        data.tokenize(records, out=tmp_path / "c", tokenizer=tokenizer, **shorter),
    )
    refused("tokenizer is", data.tokenize(records, out=tmp_path / "d", vocab_size=60, **LENGTHS))
    other_kind = make(tmp_path / "e", {"t": STS}, tokenizer)
    refused("holds sts examples here and retrieval examples", other_kind)
    with pytest.raises(UsageError, match="two stores or more"):
        data.merge([first], out=tmp_path / "out")
    with pytest.raises(UsageError, match="one of the inputs"):
        data.append(first, other_kind, out=first.path)
    with pytest.raises(CorruptError, match=r"embkit\.records, not embkit\.store"):
        data.merge([first, tmp_path / "b" / "store.records"], out=tmp_path / "out")


def test_wrong_subsets_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    whole = make(tmp_path, {"facts": RETRIEVAL, "pairs": STS}, tokenizer)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("did you mean 'facts'", {"tasks": ["fact"]}),
        ("did you mean 'pairs'", {"max_examples": {"pair": 1}}),
        (r"shape \(3,\), the task 4", {"examples": {"facts": [True, False, True]}}),
        ("names example 4", {"examples": {"facts": [0, 4]}}),
        ("names example -1", {"examples": {"facts": [-1]}}),
        ("twice", {"examples": {"facts": [1, 1]}}),
        ("neither a bool mask", {"examples": {"facts": [0.5]}}),
        ("No example is left", {"tasks": []}),
        ("leaves nothing", {"max_examples": 0}),
        ("one of the inputs", {"out": whole.path}),
    ]
    for match, how in wrong:
        with pytest.raises(UsageError, match=match):
            data.subset(whole, **{"out": tmp_path / "out", **how})
    assert not (tmp_path / "out").exists()


def test_damage_in_an_input_is_found(tmp_path: Path, tokenizer: Path, small_shards: None) -> None:
    table = [{"query": f"one {i}", "positive": f"two {i}"} for i in range(40)]
    a = make(tmp_path / "a", {"t": table[:20]}, tokenizer)
    b = make(tmp_path / "b", {"t": table[20:]}, tokenizer)
    path = shards(b)[0]
    raw = bytearray(path.read_bytes())
    raw[4096 + 8 * 30] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match="do not match their checksum"):
        data.merge([a, b], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_sources_count_on(tmp_path: Path) -> None:
    class Fake:
        def __init__(self, *names: str) -> None:
            self.manifest = {"sources": [{"name": n} for n in names]}

    stores: Any = [Fake("x", "x#2", "y"), Fake("x", "y#7"), Fake("x#2")]
    merged, numbers = compose._sources(stores)
    assert [s["name"] for s in merged] == ["x", "x#2", "y", "x#3", "y#7", "x#4"]
    assert [n.tolist() for n in numbers] == [[0, 1, 2], [3, 4], [5]]


def test_the_verbs(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from embkit.cli import app

    make(tmp_path / "a", {"facts": RETRIEVAL}, tokenizer)
    make(tmp_path / "b", {"pairs": STS}, tokenizer)
    monkeypatch.chdir(tmp_path)
    for words in (
        "store merge a/store b/store --out ab",
        "store append a/store b/in/pairs.jsonl --out more",
        "store subset ab --out part --task facts --max-examples 2",
    ):
        done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
    assert examples(Store("more")) == examples(Store("ab"))
    assert Store("part").manifest["counts"]["examples"] == 2
