"""Promises of the token store: killed anywhere, raced, made with any number of threads or any hash
seed, it is the same bytes, and every damaged byte of it is noticed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from small import full_count
from tiny import build, make_source, strays, tree

from embkit import _rust, data
from embkit.errors import CorruptError

pytestmark = pytest.mark.promise
HERE = Path(__file__).parent


def python(*args: str | Path, **env: str) -> str:
    """Run a Python program of our tests; its standard output."""
    done = subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "off", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.timeout(900)
def test_kill_writers(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    """P1: whole or absent after each of 200 aimed SIGKILLs, and the same bytes in the end."""
    kills = full_count(200, 40)
    report = json.loads(
        python(HERE / "kill_store.py", source, tokenizer, tmp_path, str(kills), "3")
    )
    landed = Counter(report.pop("landed"))
    print(f"{kills} kills landed at {dict(landed)}; {report}")
    assert landed.total() == kills
    for place in ("tokenize", "write_tensors", "publish_dir"):
        assert sum(n for where, n in landed.items() if place in where) >= kills // 40, landed
    assert landed["tokenize"] >= kills // 8
    assert report["verified"] > 10 * kills
    assert report["temporary"] > 0, "no kill fell into the writing of a file"


# ---------------------------------------------------------------- P6: corruption is detected


@pytest.fixture(scope="module")
def one_shard(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one shard in which no file is larger than 16 KiB."""
    folder = tmp_path_factory.mktemp("one")
    store = build(make_source(folder / "source", rows=6), tokenizer, folder / "out")
    assert max(p.stat().st_size for p in store.rglob("*") if p.is_file()) <= 16384
    return store


def damaged(whole: bytes, rng: random.Random, share: float) -> Iterator[tuple[str, bytes]]:
    """Every flipped bit, truncation, and zeroed or swapped sector; ``share`` of them."""
    for at in range(len(whole)):
        for bit in range(8):
            # Headers are mostly padding, and one space is like another.
            if rng.random() < (share / 20 if whole[at] == 32 else share):
                flipped = bytes([whole[at] ^ 1 << bit])
                yield f"byte {at} bit {bit}", whole[:at] + flipped + whole[at + 1 :]
        if rng.random() < share:
            yield f"cut at {at}", whole[:at]
    sectors = [whole[i : i + 512] for i in range(0, len(whole), 512)]
    for i, sector in enumerate(sectors):
        rest = [*sectors[:i], bytes(len(sector)), *sectors[i + 1 :]]
        yield f"sector {i} zeroed", b"".join(rest)
        for j in range(i):
            if rng.random() < share:
                swapped = sectors[:]
                swapped[i], swapped[j] = swapped[j], swapped[i]
                yield f"sectors {j} and {i} swapped", b"".join(swapped)


@pytest.mark.timeout(1800)
def test_flip_every_byte(one_shard: Path, tmp_path: Path) -> None:
    """P6: with verify="open" any damage to any file of a store is an error of ours."""
    share = full_count(1000, 20) / 1000
    shutil.copytree(one_shard, tmp_path / "store")
    data.Store(tmp_path / "store", verify="open")
    rng, tried = random.Random(1), Counter[str]()
    for path in sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for what, bad in damaged(whole, rng, share):
            if bad == whole:
                continue
            path.write_bytes(bad)
            with pytest.raises(CorruptError):
                data.Store(tmp_path / "store", verify="open")
                pytest.fail(f"{path.name}: {what} was not noticed")
            tried[path.suffix] += 1
        path.write_bytes(whole)
    data.Store(tmp_path / "store", verify="open")
    print(f"{tried.total()} damaged files, none unnoticed: {dict(tried)}")
    assert tried.total() > full_count(100_000, 2000)


def test_a_sound_file_of_another_directory_is_noticed(
    built: Path, one_shard: Path, tmp_path: Path
) -> None:
    """P6: a manifest pins the content of its files, not just that they are sound."""
    other = one_shard.parent
    for stage, load in (("records", data.Records.open), ("store", data.Store)):
        for path in sorted((built / stage).glob("examples-*.safetensors")):
            copy = tmp_path / f"{stage}-{path.name}"
            shutil.copytree(built / stage, copy)
            load(copy)
            shutil.copy(other / stage / path.name, copy / path.name)
            with pytest.raises(CorruptError, match="not the one that was published"):
                load(copy)


# ---------------------------------------------------------------- P10, P13: the same bytes


def test_workers_do_not_show(
    source: Path, tokenizer: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P10: records, deduplication and tokens with 1, 2 and 7 threads."""
    want = tree(built)
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("EMBKIT_THREADS", threads)
        build(source, tokenizer, tmp_path / threads)
        assert tree(tmp_path / threads) == want, f"{threads} threads"


def test_order_and_split_do_not_show(built: Path) -> None:
    """P10: which texts are near-duplicates, and of which, does not depend on order or shards."""
    texts = data.Records.open(built / "records").texts
    all_texts = [t.encode() for t in texts]
    rng = random.Random(0)

    def clusters(order: list[int], pieces: int) -> dict[bytes, tuple[bytes, float]]:
        shards, ends = [], sorted(rng.sample(range(1, len(order)), pieces - 1))
        for a, b in zip([0, *ends], [*ends, len(order)], strict=True):
            part = [all_texts[i] for i in order[a:b]]
            offsets = np.cumsum([0, *map(len, part)]).astype(np.uint64)
            shards.append((np.frombuffer(b"".join(part), np.uint8), offsets))
        found, similarity, _ = _rust.near_duplicates(shards, threads=pieces)
        return {
            all_texts[row]: (all_texts[order[int(head)]], float(s))
            for row, head, s in zip(order, found, similarity, strict=True)
        }

    rows = list(range(len(all_texts)))
    want = clusters(rows, 1)
    assert sum(text != head for text, (head, _) in want.items()) >= 10
    for pieces in (1, 2, 7):
        rng.shuffle(rows)
        assert clusters(rows, pieces) == want


def test_two_processes_race(source: Path, tokenizer: Path, built: Path, tmp_path: Path) -> None:
    """P10: two executors of the same stages at once: one works, both succeed, the same bytes."""
    want = tree(built)
    for attempt in range(full_count(10, 3)):
        out = tmp_path / str(attempt)
        ready, go = os.pipe()
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                os.close(go)
                os.read(ready, 1)  # until the parent closes it: both begin together
                code = 1
                try:
                    build(source, tokenizer, out)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        os.close(ready)
        os.close(go)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0]
        assert tree(out) == want
        assert not strays(out)


def test_same_inputs_same_bits(source: Path, built: Path, tmp_path: Path) -> None:
    """P13: other processes, 1 and 2 threads, any hash seed; the tokenizer is trained, too."""
    code = (
        "import sys; from pathlib import Path; from tiny import build; "
        "build(Path(sys.argv[1]), None, Path(sys.argv[2]))"
    )
    found = []
    for threads in ("1", "2"):
        out = tmp_path / threads
        python("-c", code, source, out, EMBKIT_THREADS=threads, PYTHONHASHSEED="random",
               PYTHONPATH=os.pathsep.join([str(HERE.parent), *sys.path]))  # fmt: skip
        found.append(tree(out))
    assert found[0] == found[1]
    kept = {name: b for name, b in tree(built).items() if not name.startswith("store/")}
    assert {name: b for name, b in found[0].items() if not name.startswith("store/")} == kept


# ---------------------------------------------------------------- P3: exactly once


@pytest.mark.timeout(900)
def test_exactly_once(built: Path, tmp_path: Path) -> None:
    """P3: no example lost or repeated in two epochs with 200 kills, and the order is kept.

    Packed, with hard negatives, no-duplicate batches, and one data thread or two.
    """
    kills = full_count(200, 30)
    report = json.loads(
        python(HERE / "kill_batches.py", built / "store", tmp_path, str(kills), "5")
    )
    print(f"{kills} kills landed after steps {report['landed']}, {report['torn']} in a line")
    assert len(report["landed"]) == kills and len(set(report["landed"])) > kills // 10
    seen: Counter[tuple[str, int, int]] = Counter()
    for entry in report["entries"]:
        seen.update((entry["task"], entry["epoch"], example) for example in entry["examples"])
    assert set(seen.values()) == {1}
    for task, count in report["examples"].items():
        for epoch in (0, 1):
            taken = sum(1 for t, e, _ in seen if (t, e) == (task, epoch))
            assert taken == count // 6 * 6, (task, epoch)  # the rest of an epoch is dropped
