"""Batches: the Rust loader against numpy, exactly once, the same for any world, and bad input."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import naive_batches
import naive_plan
import numpy as np
import pytest

from embkit import _rust, container
from embkit.data import Batches, Store
from embkit.data.tables import Examples
from embkit.errors import CorruptError, UsageError
from embkit.stage import stage

SETTINGS: dict[str, Any] = {"batch_size": 13, "seed": 5, "hard_negatives": 2, "token_budget": 150}


def tokens_of(store: Store, row: int) -> list[int]:
    """Tokens of one row, by the plain gather."""
    rows = np.array([row], np.uint64)
    out = np.empty(int(store.lengths(rows)[0]), np.int64)
    store.gather(rows, out, np.empty(2, np.int32))
    return out.tolist()


def naive(
    store: Store, seed: int, step: int, own: dict[str, int] | None = None
) -> tuple[str, naive_batches.Sides]:
    """The global batch of a step by the references; ``own`` are sizes of single tasks' batches."""
    data = [naive_batches.TaskData.of(table) for table in store.tasks().values()]
    sizes = store.task_sizes
    named = [
        naive_plan.Task(
            name=t.name, examples=len(t), weight=float(sizes[t.name]),
            batch_size=(own or {}).get(t.name, 0),
        )
        for t in data
    ]  # fmt: skip
    part = naive_plan.Plan(seed=seed, tasks=named, batch_size=13)(step)
    task = data[part.task]
    sides = task.sides(part.examples, seed=seed, epoch=part.epoch, hard=2, store=store)
    return task.name, sides


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two lists of keys are equal in the same places."""
    return (
        len({*zip(a.tolist(), b.tolist(), strict=True)}) == len({*a.tolist()}) == len({*b.tolist()})
    )


def test_tasks_have_batches_of_their_own_size(make_store: Callable[..., Store]) -> None:
    store, own = make_store(3, 70, copies=3), {"sts": 30, "topics": 5}
    for rules in ({}, {"no_duplicates": True}):
        batches = Batches(store, layout="padded", batch_sizes=own, **{**SETTINGS, **rules})
        size = {}
        for step in range(25):
            batch = batches.batch(step)
            name, sides = naive(store, 5, step, own)
            size.setdefault(batch.task, set()).add(len(batch.examples))
            if not rules:
                assert batch.task == name
                assert np.array_equal(batch.rows[batch["query"]], sides.query)
            # Two ranks have it between them, ceil and floor.
            parts = [
                Batches(
                    store, layout="padded", batch_sizes=own, rank=r, world_size=2,
                    **{**SETTINGS, **rules},
                ).batch(step)
                for r in range(2)
            ]  # fmt: skip
            assert sorted(np.concatenate([p["position"] for p in parts]).tolist()) == list(
                range(len(batch.examples))
            )
        assert size == {"retrieval": {13}, "sts": {30}, "topics": {5}}
    with pytest.raises(UsageError, match="did you mean 'topics'"):
        Batches(store, batch_sizes={"topic": 3}, **SETTINGS)
    with pytest.raises(UsageError, match="fewer than a batch of 80"):
        Batches(store, batch_sizes={"sts": 80}, **SETTINGS)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_batches_equal_the_numpy_reference(
    make_store: Callable[..., Store], layout: str, dtype: str
) -> None:
    store = make_store(3, 70, copies=3)
    batches = Batches(store, layout=layout, dtype=dtype, pad_id=0, **SETTINGS)
    kinds = set()
    for step in range(25):
        batch = batches.batch(step)
        name, sides = naive(store, 5, step)
        kinds.add(batch.kind)
        assert (batch.task, batch.kind) == (name, sides.kind)
        rows = batch.rows
        assert (
            sorted(set(rows.tolist()))
            == np.unique(
                np.concatenate([sides.query, sides.positive, sides.hard.reshape(-1)])
            ).tolist()
        )
        for side in ("query", "positive", "hard"):
            assert np.array_equal(rows[batch[side]], getattr(sides, side)), side
        assert np.array_equal(batch["hard_mask"], sides.hard_mask)
        mine = np.concatenate(
            [batch[f"{s}_key"].reshape(-1) for s in ("query", "positive", "hard")]
        )
        theirs = (sides.query_key, sides.positive_key, sides.hard_key.reshape(-1))
        assert same_partition(mine, np.concatenate(theirs))
        assert np.array_equal(batch["score"], sides.score)
        assert np.array_equal(batch["weight"], sides.weight)
        assert np.array_equal(batch["role"], store.role(rows))
        assert np.array_equal(batch["prompt_len"], store.prompt_len(rows))
        lengths = store.lengths(rows).astype(int)
        assert (np.diff(lengths) <= 0).all() and batch.tokens == lengths.sum()
        covered = [r for m in batch.micro for r in range(m.rows.start, m.rows.stop)]
        assert covered == list(range(len(rows)))
        for micro in batch.micro:
            own = [tokens_of(store, int(r)) for r in rows[micro.rows]]
            assert micro.longest == max(map(len, own))
            if layout == "padded":
                ids, mask = batch.rectangle(micro)
                assert ids.dtype == mask.dtype == np.dtype(dtype)
                assert len(own) == 1 or ids.size <= 150
                for row, keep, want in zip(ids, mask, own, strict=True):
                    assert row.tolist() == want + [0] * (micro.longest - len(want))
                    assert keep.tolist() == [1] * len(want) + [0] * (micro.longest - len(want))
            else:
                flat = [t for row in own for t in row]
                assert len(own) == 1 or len(flat) <= 150
                assert batch["tokens"][micro.tokens].tolist() == flat
                assert batch.cu_seqlens(micro).tolist() == [0, *itertools.accumulate(map(len, own))]
                positions = [i for row in own for i in range(len(row))]
                assert batch["position_ids"][micro.tokens].tolist() == positions
                assert batch["position_ids"].dtype == np.dtype(dtype)
    assert kinds == {"retrieval", "sts", "classification"}


def test_ranks_share_the_global_batch(make_store: Callable[..., Store]) -> None:
    """The same examples, draws and keys for 1, 2 and 5 ranks; nearly equal work; equal counts."""
    store = make_store(4, 80, copies=4)
    settings = {**SETTINGS, "batch_size": 32}
    whole = Batches(store, **settings)
    for step in range(12):
        one = whole.batch(step)
        for world in (2, 5):
            parts = [
                Batches(store, rank=r, world_size=world, **settings).batch(step)
                for r in range(world)
            ]
            positions = np.concatenate([p["position"] for p in parts])
            assert sorted(positions.tolist()) == list(range(32))
            sizes = [len(p.examples) for p in parts]
            assert max(sizes) - min(sizes) <= 1
            for name in ("query_key", "positive_key", "hard_key", "hard_mask", "score", "weight"):
                joined = np.concatenate([p[name] for p in parts])[np.argsort(positions)]
                assert np.array_equal(joined, one[name]), name
            for name in ("query", "positive", "hard"):
                joined = np.concatenate([p.rows[p[name]] for p in parts])[np.argsort(positions)]
                assert np.array_equal(joined, one.rows[one[name]]), name
            assert {p.micro_count for p in parts} == {max(len(p.micro) for p in parts)}
            tokens = [int(_tokens(store, p).sum()) for p in parts]
            assert max(tokens) - min(tokens) <= 2 * _tokens(store, one).max()
    with pytest.raises(UsageError, match="Rank 2 of 2"):
        Batches(store, rank=2, world_size=2, **settings).batch(0)


def _tokens(store: Store, batch: Any) -> np.ndarray:
    """Tokens of all rows that each example names, int [b]."""
    sides = (batch["query"][:, None], batch["positive"][:, None], batch["hard"])
    places = np.concatenate(sides, axis=1)
    return store.lengths(batch.rows[places.reshape(-1)]).astype(int).reshape(places.shape).sum(1)


@pytest.mark.promise
def test_exactly_once(make_store: Callable[..., Store]) -> None:
    """P3: every example once an epoch and in one order: packed, mined negatives, any threads."""
    store = make_store(6, 64)
    for no_duplicates in (False, True):
        settings = {**SETTINGS, "batch_size": 8, "no_duplicates": no_duplicates}
        epochs = {"exhausted": "drop", "epochs": 2}
        batches = Batches(store, **settings, **epochs)
        steps = batches.plan.steps
        assert steps is not None
        alone = [batches.batch(s) for s in range(steps)]
        seen: Counter[tuple[str, int, int]] = Counter()
        for batch in alone:
            seen.update((batch.task, batch.epoch, int(e)) for e in batch.examples)
        expected = {
            (t, e, i) for t, n in batches.examples.items() for e in (0, 1) for i in range(n)
        }
        assert set(seen) == expected and set(seen.values()) == {1}
        for threads in (1, 2, 4):
            # A fresh run that starts in the middle sees what the first one saw.
            stream = Batches(store, **settings, **epochs).stream(7, steps, threads=threads)
            for batch, want in zip(stream, alone[7:], strict=True):
                assert batch.step == want.step and np.array_equal(batch.examples, want.examples)
                for name in want.fields:
                    assert np.array_equal(batch[name], want[name]), name


def test_no_duplicates_in_a_global_batch(make_store: Callable[..., Store]) -> None:
    store = make_store(7, 400, copies=8)
    settings = {**SETTINGS, "batch_size": 32, "weights": {"retrieval": 1.0}}

    def repeats(**more: Any) -> tuple[int, list[np.ndarray]]:
        batches = Batches(store, **settings, **more)
        found, examples = 0, []
        for step in range(2 * (400 // 32)):
            batch = batches.batch(step)
            examples.append(batch.examples)
            keys = [{a, b} for a, b in zip(batch["query_key"], batch["positive_key"], strict=True)]
            every = Counter(k for pair in keys for k in pair)
            found += sum(n - 1 for n in every.values())
        return found, examples

    plain, before = repeats()
    without, after = repeats(no_duplicates=True)
    assert plain > 100 and without == 0
    for epoch in (slice(0, 12), slice(12, 24)):
        sets = [set(np.concatenate(e[epoch]).tolist()) for e in (before, after)]
        assert sets[0] == sets[1]  # the same examples, in other batches


def test_top_takes_the_first_hard_negatives(make_store: Callable[..., Store]) -> None:
    store = make_store(8, 40)
    table = store.examples("retrieval")
    batch = Batches(store, **{**SETTINGS, "hard_rule": "top", "weights": {"retrieval": 1.0}}).batch(
        1
    )
    some = 0
    for example, rows, mask in zip(
        batch.examples, batch.rows[batch["hard"]], batch["hard_mask"], strict=True
    ):
        start, end = table.negative_offsets[int(example) : int(example) + 2].astype(int)
        want = table.negative[start:end][:2].tolist()
        assert rows[mask].tolist() == want
        some += len(want)
    assert some > 5


def test_a_stream_reuses_its_buffers(make_store: Callable[..., Store]) -> None:
    made: list[int] = []

    def allocate(size: int) -> np.ndarray:
        made.append(size)
        return np.empty(size, np.uint8)

    store = make_store(9, 60)
    batches = Batches(store, allocate=allocate, **SETTINGS)
    stream = batches.stream(0, 60, threads=2)
    first = next(stream)
    assert len(first["tokens"])
    for batch in stream:
        assert batch["tokens"].base is not None
    assert sum(size > 0 for size in made) < 16  # four slots that grow a little, not 60 buffers
    with pytest.raises(UsageError, match="buffer of 8 bytes"):
        batches.loader.batch(0).fill(np.empty(8, np.uint8))
    stream = batches.stream(0, 1000, threads=2)
    next(stream)
    stream.close()  # ends its threads


def test_threads_share_a_loader(make_store: Callable[..., Store]) -> None:
    batches = Batches(make_store(10, 60), no_duplicates=True, **SETTINGS)
    alone = [batches.batch(s).examples.tolist() for s in range(40)]
    order = np.random.default_rng(0).permutation(40).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda s: batches.batch(s).examples.tolist(), order))
    assert found == [alone[s] for s in order]


# ---------------------------------------------------------------- bad input


def rewrite(store: Store, to: Path, **columns: np.ndarray) -> Store:
    """A copy of a store whose retrieval table has other columns, sealed again."""
    shutil.copytree(store.path, to)
    path = to / Examples.file("retrieval")
    table = {**container.load(path, kind="embkit.examples"), **columns}
    container.save(path, table, kind="embkit.examples")
    manifest = container.read_manifest(to)
    manifest["files"][path.name] = _rust.file_info(str(path))
    manifest.pop("crc32c", None)
    container.write_manifest(to, manifest)
    return Store(to)


def test_examples_past_the_table(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store(11, 40)
    table = store.examples("retrieval")
    for name in ("query", "positive", "negative"):
        values = np.array(getattr(table, name))
        values[17] = store.rows
        bad = rewrite(store, tmp_path / name, **{name: values})
        match = rf"example \d+ of task 'retrieval' names row {store.rows}, the store has"
        with pytest.raises(CorruptError, match=match):
            Batches(bad, **SETTINGS)
    offsets = np.array(table.positive_offsets)
    offsets[9] = offsets[8] + 10**6
    with pytest.raises(CorruptError, match="do not ascend|disagree"):
        Batches(rewrite(store, tmp_path / "offsets", positive_offsets=offsets), **SETTINGS)
    with pytest.raises(CorruptError, match="'score'"):
        Batches(rewrite(store, tmp_path / "short", score=np.zeros(3, np.float32)), **SETTINGS)


def test_examples_without_a_positive_are_left_out(
    make_store: Callable[..., Store], tmp_path: Path
) -> None:
    store = make_store(12, 40)
    table = store.examples("retrieval")
    counts = np.ones(40, int)
    counts[[3, 20]] = 0
    offsets = np.cumsum([0, *counts]).astype(np.uint64)
    bad = rewrite(
        store, tmp_path / "bad", positive_offsets=offsets, positive=np.array(table.positive[:38])
    )
    batches = Batches(bad, **SETTINGS)
    assert batches.examples["retrieval"] == 38
    assert batches.skipped["retrieval"] == {"no positive": 2}
    none = np.zeros(41, np.uint64)
    empty = rewrite(
        store, tmp_path / "none", positive_offsets=none, positive=np.zeros(0, np.uint64)
    )
    with pytest.raises(UsageError, match="no usable example: no positive"):
        Batches(empty, **SETTINGS)


def test_bad_settings(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store(13, 40)
    for settings, match in (
        ({"layout": "ragged"}, "layout 'ragged'"),
        ({"hard_rule": "best"}, "Unknown rule 'best'"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"weights": {"retrieva": 1.0}}, "did you mean 'retrieval'"),
        ({"batch_size": 41}, "fewer than a batch"),
    ):
        with pytest.raises(UsageError, match=match):
            Batches(store, **{**SETTINGS, **settings})


def test_negatives_of_another_store(make_store: Callable[..., Store], tmp_path: Path) -> None:
    store = make_store(14, 40)

    def mined(name: str, task: str, examples: int, **manifest: str) -> Path:
        with stage(tmp_path / name, name="mine", params={}, kind="embkit.negatives") as work:
            columns = {
                "offsets": np.zeros(examples + 1, np.uint64), "row": np.zeros(0, np.uint64),
            }  # fmt: skip
            path = work.dir / f"negatives-{task}.safetensors"
            container.save(path, columns, kind="embkit.negatives")
            work.publish(manifest)
        return tmp_path / name

    with pytest.raises(CorruptError, match="are for 3 examples, the store has 40"):
        Batches(store, negatives=mined("short", "retrieval", 3), **SETTINGS)
    with pytest.raises(UsageError, match="task 'other', which the store does not have"):
        Batches(store, negatives=mined("task", "other", 40), **SETTINGS)
    with pytest.raises(UsageError, match="mined on another store"):
        Batches(store, negatives=mined("store", "retrieval", 40, store="0" * 64), **SETTINGS)
    digest = store.manifest["digest"]
    none = Batches(store, negatives=mined("fits", "retrieval", 40, store=digest), **SETTINGS)
    parts = [none.batch(s) for s in range(8)]
    assert not any(b["hard_mask"].any() for b in parts)  # they replace the table's own


def test_a_shard_that_is_missing_or_not_in_the_manifest(make_store: Callable[..., Store]) -> None:
    store = make_store(15, 40)
    shard = next(store.path.glob("texts-*"))
    away = shard.rename(shard.with_suffix(".away"))
    with pytest.raises(CorruptError, match="lists is missing"):
        Store(store.path)
    away.rename(shard)
    shutil.copy(shard, store.path / "texts-00001-of-00002.safetensors")
    with pytest.raises(CorruptError):
        Store(store.path)
