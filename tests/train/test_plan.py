"""The plan: exact mixtures, exactly-once epochs, and nothing but a function of (seed, step)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embkit.errors import UsageError
from embkit.losses.draw import draws, key_of, permute, permute_naive, sample
from embkit.train.plan import Plan, Task, block_counts, weights_for


def tasks(*sizes_and_weights: tuple[int, float]) -> list[Task]:
    return [Task(name=f"t{i}", examples=n, weight=w) for i, (n, w) in enumerate(sizes_and_weights)]


def plan_of(seed: int = 0) -> Plan:
    return Plan(seed=seed, tasks=tasks((103, 5), (64, 2), (17, 1)), batch_size=8)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 127, 129, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_equals_its_numpy_twin(n: int, key: int) -> None:
    whole = permute(n, key, 0, n)
    assert sorted(whole.tolist()) == list(range(n))
    assert np.array_equal(whole, permute_naive(n, key, 0, n))
    middle = permute(n, key, n // 3, n - n // 3)
    assert np.array_equal(middle, whole[n // 3 :])


def test_each_epoch_takes_each_example_at_most_once_and_drops_the_rest() -> None:
    plan = plan_of()
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(400):
        part = plan(step)
        seen.setdefault((part.task, part.epoch), []).extend(part.examples.tolist())
    for (task, epoch), examples in seen.items():
        size = plan.tasks[task].examples
        whole = size // 8 * 8
        assert len(set(examples)) == len(examples) and max(examples) < size
        if (task, epoch + 1) in seen:
            assert len(examples) == whole, (task, epoch)
    epochs = {t: max(e for task, e in seen if task == t) for t in range(3)}
    assert epochs[0] >= 10 and epochs[2] >= 20  # many epoch ends were crossed
    dropped = {e: set(range(17)) - set(x) for (t, e), x in seen.items() if t == 2}
    assert len({frozenset(d) for d in dropped.values()}) > 5  # another rest each epoch


def test_counts_are_the_mixture_in_every_block() -> None:
    plan = plan_of()
    assert plan.counts.tolist() == [20, 8, 4] and plan.block == 32
    names = [plan(step).task for step in range(320)]
    for block in range(10):
        assert np.bincount(names[32 * block : 32 * block + 32]).tolist() == [20, 8, 4]
    assert len({tuple(names[32 * b : 32 * b + 32]) for b in range(10)}) == 10
    for step in (0, 1, 31, 32, 33, 319):
        assert plan.count_before(step) == np.bincount(names[:step], minlength=3).tolist()


def test_plan_is_a_function_of_seed_and_step() -> None:
    steps = [0, 5, 77, 31, 32, 400, 5]
    alone = [plan_of()(s) for s in steps]
    shared = plan_of()
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(shared, steps))
    for a, b in zip(alone, threaded, strict=True):
        assert (a.task, a.ordinal, a.epoch) == (b.task, b.ordinal, b.epoch)
        assert np.array_equal(a.examples, b.examples)
    other = [plan_of(1)(s) for s in range(64)]
    same = [plan_of(0)(s) for s in range(64)]
    assert [p.task for p in other] != [p.task for p in same]


def test_rows_do_not_depend_on_the_other_tasks() -> None:
    alone = Plan(seed=0, tasks=tasks((103, 1)), batch_size=8)
    mixed = plan_of()
    first = {p.ordinal: p.examples for p in map(mixed, range(200)) if p.task == 0}
    for ordinal, examples in first.items():
        assert np.array_equal(alone(ordinal).examples, examples)


@settings(max_examples=200)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8))
def test_block_counts_round_to_the_nearest(weights: list[float]) -> None:
    share = np.array(weights) / sum(weights)
    try:
        counts = block_counts(share.tolist())
    except UsageError:
        assert share.min() < 2 / 4096
        return
    block = int(counts.sum())
    assert block % 32 == 0 and counts.min() >= 1
    assert (np.abs(counts - share * block) < 1).all()


def test_block_counts_by_hand() -> None:
    assert block_counts([0.5, 0.3, 0.2]).tolist() == [16, 10, 6]  # 16, 9.6, 6.4
    assert block_counts([1 / 3, 1 / 3, 1 / 3]).tolist() == [11, 11, 10]
    assert block_counts([1.0, 0.0]).tolist() == [32, 0]
    assert block_counts([0.99, 0.01]).tolist() == [63, 1]  # 32 would leave the second out


@pytest.mark.parametrize(
    ("sizes", "batch", "match"),
    [
        ([(7, 1.0)], 8, "fewer than a batch"),
        ([(100, -1.0)], 8, "nothing to train on"),
        ([(100, 0.0)], 8, "nothing to train on"),
        ([(100, 1.0), (100, 1e-6)], 8, "4096 steps"),
    ],
)
def test_impossible_plans(sizes: list[tuple[int, float]], batch: int, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Plan(seed=0, tasks=tasks(*sizes), batch_size=batch)


def test_a_small_task_of_weight_zero_is_no_trouble() -> None:
    plan = Plan(seed=0, tasks=tasks((100, 1), (3, 0)), batch_size=8)
    assert {plan(s).task for s in range(64)} == {0}


def test_weights() -> None:
    sizes = {"pairs": 300, "sts": 100}
    assert weights_for(sizes, {}) == {"pairs": 300.0, "sts": 100.0}
    assert weights_for(sizes, {"sts": 2}) == {"pairs": 0.0, "sts": 2.0}
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        weights_for(sizes, {"pair": 1})


def test_draws_are_uniform_and_keyed() -> None:
    counters = np.arange(40_000, dtype=np.uint64)
    bins = np.bincount((draws(7, counters) % 10).astype(int), minlength=10)
    chi2 = ((bins - 4000) ** 2 / 4000).sum()
    assert chi2 < 40  # 9 degrees of freedom
    assert not np.array_equal(draws(7, counters), draws(8, counters))
    assert np.array_equal(draws(7, counters)[123:125], draws(7, counters[123:125]))
    assert key_of(1, "a") != key_of("1", "a") != key_of(1, "a", "") != key_of("a", 1)


def test_sample_draws_without_replacement() -> None:
    items = np.arange(3000, dtype=np.uint64)
    sizes = items.astype(np.int64) % 7
    chosen = sample(3, items, sizes, 4)
    for row, size in zip(chosen, sizes, strict=True):
        real = row[row >= 0].tolist()
        assert len(real) == min(int(size), 4) == len(set(real))
        assert all(v < size for v in real) and (row[len(real) :] == -1).all()
    fives = chosen[sizes == 5]
    share = np.bincount(fives.reshape(-1), minlength=5) / len(fives)
    assert np.abs(share - 0.8).max() < 0.08
    assert sample(3, items[:5], np.zeros(5, np.int64), 4).tolist() == [[-1] * 4] * 5
    assert sample(3, items, sizes, 0).shape == (3000, 0)
