"""The plan: exact mixtures, exactly-once epochs, and nothing but a function of (seed, step)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import naive_plan
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_draws import draws, key_of, permute, permute_naive, sample

from embkit import _rust
from embkit.data.mixture import weights_for
from embkit.errors import UsageError

Tasks = list[tuple[str, int, float]]


def tasks(*sizes_and_weights: tuple[int, float]) -> Tasks:
    return [(f"t{i}", n, float(w)) for i, (n, w) in enumerate(sizes_and_weights)]


def plan_of(seed: int = 0, **rules: object) -> _rust.Plan:
    return _rust.Plan(seed, tasks((103, 5), (64, 2), (17, 1)), 8, **rules)


@pytest.mark.parametrize("n", [1, 2, 3, 31, 127, 129, 1000, 4097])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permutation_equals_its_numpy_twin(n: int, key: int) -> None:
    whole = permute(n, key, 0, n)
    assert sorted(whole.tolist()) == list(range(n))
    assert np.array_equal(whole, permute_naive(n, key, 0, n))
    middle = permute(n, key, n // 3, n - n // 3)
    assert np.array_equal(middle, whole[n // 3 :])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(8, 500), st.floats(0.05, 5)), min_size=1, max_size=5),
    st.integers(-(2**63), 2**63 - 1),
    st.lists(st.integers(0, 2000), min_size=1, max_size=8),
    st.dictionaries(st.sampled_from(["t0", "t1", "t3"]), st.integers(1, 8)),
)
def test_plan_equals_its_numpy_twin(
    sizes: list[tuple[int, float]], seed: int, steps: list[int], own: dict[str, int]
) -> None:
    ours = _rust.Plan(seed, tasks(*sizes), 8, batch_sizes=list(own.items()))
    named = [
        naive_plan.Task(name=n, examples=m, weight=w, batch_size=own.get(n, 0))
        for n, m, w in tasks(*sizes)
    ]
    twin = naive_plan.Plan(seed=seed, tasks=named, batch_size=8)
    assert ours.counts == twin.counts.tolist() and ours.steps is None
    for step in steps:
        part = twin(step)
        assert ours.part(step)[:3] == (part.task, part.ordinal, part.epoch)
        assert np.array_equal(ours.examples(step), part.examples)
        assert ours.count_before(step) == twin.count_before(step)


def test_each_epoch_takes_each_example_at_most_once_and_drops_the_rest() -> None:
    plan, sizes = plan_of(), (103, 64, 17)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in range(400):
        task, _, epoch, _ = plan.part(step)
        seen.setdefault((task, epoch), []).extend(plan.examples(step).tolist())
    for (task, epoch), examples in seen.items():
        whole = sizes[task] // 8 * 8
        assert len(set(examples)) == len(examples) and max(examples) < sizes[task]
        if (task, epoch + 1) in seen:
            assert len(examples) == whole, (task, epoch)
    epochs = {t: max(e for task, e in seen if task == t) for t in range(3)}
    assert epochs[0] >= 10 and epochs[2] >= 20  # many epoch ends were crossed
    dropped = {e: set(range(17)) - set(x) for (t, e), x in seen.items() if t == 2}
    assert len({frozenset(d) for d in dropped.values()}) > 5  # another rest each epoch


def test_counts_are_the_mixture_in_every_block() -> None:
    plan = plan_of()
    assert plan.counts == [20, 8, 4]
    names = [plan.part(step)[0] for step in range(320)]
    for block in range(10):
        assert np.bincount(names[32 * block : 32 * block + 32]).tolist() == [20, 8, 4]
    assert len({tuple(names[32 * b : 32 * b + 32]) for b in range(10)}) == 10
    for step in (0, 1, 31, 32, 33, 319):
        assert plan.count_before(step) == np.bincount(names[:step], minlength=3).tolist()


def test_plan_is_a_function_of_seed_and_step() -> None:
    steps = [0, 5, 77, 31, 32, 400, 5]
    shared = plan_of()
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(shared.examples, steps))
    for step, examples in zip(steps, threaded, strict=True):
        assert np.array_equal(plan_of().examples(step), examples)
    assert [plan_of(1).part(s) for s in range(64)] != [plan_of(0).part(s) for s in range(64)]


@pytest.mark.parametrize("rules", [{}, {"exhausted": "drop", "epochs": 2}])
def test_tasks_of_many_steps_are_those_of_each(rules: dict[str, object]) -> None:
    """Over ends of blocks and mixtures, and of the plan."""
    plan = plan_of(**rules)
    end = plan.steps or 100
    each = [plan.part(step)[0] for step in range(end)]
    for first, count in ((0, end), (5, 7), (31, 40), (end - 3, 3)):
        assert plan.tasks_of(first, count).tolist() == each[first : first + count]
    if plan.steps is not None:
        assert plan.tasks_of(end - 2, 50).tolist() == each[-2:]
        assert plan.tasks_of(end + 1, 5).tolist() == []


def test_rows_do_not_depend_on_the_other_tasks() -> None:
    alone, mixed = _rust.Plan(0, tasks((103, 1)), 8), plan_of()
    ordinals = [(s, mixed.part(s)[1]) for s in range(200) if mixed.part(s)[0] == 0]
    for step, ordinal in ordinals:
        assert np.array_equal(alone.examples(ordinal), mixed.examples(step))


@pytest.mark.parametrize("epochs", [1, 2, 5])
def test_dropped_tasks_take_all_their_batches_and_no_more(epochs: int) -> None:
    plan = plan_of(exhausted="drop", epochs=epochs)
    whole = [13 * epochs - epochs, 8 * epochs, 2 * epochs]  # 103 // 8 = 12, 64 // 8, 17 // 8
    assert plan.steps == sum(whole)
    parts = [plan.part(step) for step in range(plan.steps)]
    for task, count in enumerate(whole):
        assert [p[1] for p in parts if p[0] == task] == list(range(count))
        assert {p[2] for p in parts if p[0] == task} == set(range(epochs))
    for step in range(plan.steps + 1):
        before = [sum(p[0] == t for p in parts[:step]) for t in range(3)]
        assert plan.count_before(step) == before
    for step in (plan.steps, 10**9):
        with pytest.raises(UsageError, match=f"ends after {plan.steps} steps"):
            plan.part(step)


def test_stopped_plans_end_before_a_task_would_repeat() -> None:
    plan = plan_of(exhausted="stop", epochs=40)
    assert plan.counts == [20, 8, 4]
    assert plan.steps == 32 * 20  # the third task has 80 batches, 4 in a block
    assert max(plan.part(s)[2] for s in range(plan.steps) if plan.part(s)[0] == 2) == 39
    with pytest.raises(UsageError, match="do not fill one block"):
        plan_of(exhausted="stop", epochs=1)
    with pytest.raises(UsageError, match="Unknown rule 'wait'"):
        plan_of(exhausted="wait")


@settings(max_examples=200)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=8))
def test_block_counts_round_to_the_nearest(weights: list[float]) -> None:
    share = np.array(weights) / sum(weights)
    try:
        counts = np.array(_rust.Plan(0, tasks(*((8, w) for w in weights)), 8).counts)
    except UsageError:
        assert share.min() < 2 / 4096
        return
    block = int(counts.sum())
    assert block % 32 == 0 and counts.min() >= 1
    assert (np.abs(counts - share * block) < 1).all()


def test_block_counts_by_hand() -> None:
    def counts(*weights: float) -> list[int]:
        return _rust.Plan(0, tasks(*((8, w) for w in weights)), 8).counts

    assert counts(0.5, 0.3, 0.2) == [16, 10, 6]  # 16, 9.6, 6.4
    assert counts(1, 1, 1) == [11, 11, 10]
    assert counts(1.0, 0.0) == [32, 0]
    assert counts(0.99, 0.01) == [63, 1]  # 32 would leave the second out


@pytest.mark.parametrize(
    ("sizes", "batch", "match"),
    [
        ([(7, 1.0)], 8, "fewer than a batch"),
        ([(100, -1.0)], 8, "nothing to train on"),
        ([(100, 0.0)], 8, "nothing to train on"),
        ([(100, float("nan"))], 8, "nothing to train on"),
        ([(100, 1.0), (100, 1e-6)], 8, "4096 steps"),
        ([(100, 1.0)], 0, "batch_size is 0"),
    ],
)
def test_impossible_plans(sizes: list[tuple[int, float]], batch: int, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        _rust.Plan(0, tasks(*sizes), batch)


def test_a_small_task_of_weight_zero_is_no_trouble() -> None:
    plan = _rust.Plan(0, tasks((100, 1), (3, 0)), 8)
    assert {plan.part(s)[0] for s in range(64)} == {0}


def test_weights() -> None:
    sizes = {"pairs": 300, "sts": 100}
    assert weights_for(sizes, {}) == {"pairs": 300.0, "sts": 100.0}
    assert weights_for(sizes, {"sts": 2}) == {"pairs": 0.0, "sts": 2.0}
    assert weights_for(sizes, {}, cap=150) == {"pairs": 150.0, "sts": 100.0}
    assert weights_for(sizes, {}, temperature=2)["pairs"] == pytest.approx(300**0.5)
    flat = weights_for(sizes, {}, temperature=1e9)
    assert flat["pairs"] == pytest.approx(flat["sts"], rel=1e-6)
    with pytest.raises(UsageError, match="did you mean 'pairs'"):
        weights_for(sizes, {"pair": 1})
    with pytest.raises(UsageError, match="temperature 0"):
        weights_for(sizes, {}, temperature=0)


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
