"""Samplers, mining and deduplication of datasets, beside sentence-transformers' own."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as some
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base import sampler as st
from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim
from torch.utils.data import ConcatDataset, SequentialSampler

from embkit.errors import UsageError
from embkit.integrations import sentence_transformers as ek

FULL = bool(os.environ.get("EMBKIT_TEST_FULL"))


# ---------------------------------------------------------------- no duplicates


def table(n: int, distinct: int, seed: int) -> Dataset:
    """Texts that repeat within and across columns, missing ones, numbers, a label."""
    draw = random.Random(seed)
    texts = [f"t{draw.randrange(distinct)}" for _ in range(2 * n)]
    return Dataset.from_dict(
        {
            "anchor": texts[:n],
            "positive": [t if draw.random() < 0.95 else None for t in texts[n:]],
            "year": [draw.randrange(4 * distinct) for _ in range(n)],
            "tags": [[f"t{draw.randrange(9 * distinct)}"] for _ in range(n)],
            "label": [1.0] * n,
            "dataset_name": ["the same"] * n,
        }
    )


def epochs(sampler: Any) -> list[list[list[int]]]:
    found = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


@settings(max_examples=60 if FULL else 6, deadline=None, derandomize=True)
@given(
    n=some.integers(1, 90),
    distinct=some.integers(1, 300),
    size=some.integers(1, 20),
    drop_last=some.booleans(),
    seed=some.integers(0, 5),
)
def test_batches_are_the_originals_row_for_row(
    n: int, distinct: int, size: int, drop_last: bool, seed: int
) -> None:
    data = table(n, distinct, seed).shuffle(seed=seed)  # an indices mapping
    theirs, ours = (
        m.NoDuplicatesBatchSampler(data, size, drop_last, ["label"], torch.Generator(), seed=seed)
        for m in (st, ek)
    )
    assert len(ours) == len(theirs)
    batches = epochs(ours)
    assert batches == epochs(theirs)
    keys = ("anchor", "positive", "year", "tags")
    rows = [{str(row[k]) for k in keys} for row in data]
    for epoch in batches:
        for batch in epoch:
            assert len(batch) <= size and not (drop_last and len(batch) < size)
            count = Counter(value for i in batch for value in rows[i])
            assert not count or max(count.values()) == 1
        if not drop_last:
            assert sorted(i for batch in epoch for i in batch) == list(range(n))


def test_a_column_that_is_not_compared_keeps_nothing_apart() -> None:
    data = Dataset.from_dict({"dataset_name": ["x"] * 3, "label": [0, 1, 0]})
    sampler = ek.NoDuplicatesBatchSampler(data, 2, False, ["label"], torch.Generator())
    assert sorted(map(len, sampler)) == [1, 2]


# ---------------------------------------------------------------- one task a step


def several(sizes: Sequence[int], batch: int, seed: int = 0, world: int | None = None) -> Any:
    samplers = [st.DefaultBatchSampler(SequentialSampler(range(n)), batch, False) for n in sizes]
    parts = ConcatDataset([range(n) for n in sizes])
    return ek.SingleTaskBatchSampler(parts, samplers, seed=seed, world_size=world)


@settings(max_examples=60 if FULL else 15, deadline=None, derandomize=True)
@given(
    sizes=some.lists(some.integers(1, 90), min_size=1, max_size=5),
    batch=some.integers(1, 9),
    world=some.integers(1, 4),
    seed=some.integers(0, 3),
)
def test_every_step_of_all_ranks_has_one_dataset(
    sizes: list[int], batch: int, world: int, seed: int
) -> None:
    sampler = several(sizes, batch, seed, world)
    ends = np.cumsum(sizes)
    dataset_of = lambda row: int(np.searchsorted(ends, row, side="right"))  # noqa: E731
    ranks = [list(BatchSamplerShard(sampler, world, rank)) for rank in range(world)]
    if world == 1:  # accelerate shards nothing
        ranks = [list(sampler)]
    assert {len(batches) for batches in ranks} == {len(sampler) // world}
    for step in zip(*ranks, strict=True):
        assert len({dataset_of(row) for rows in step for row in rows}) == 1
    rows = [row for batches in ranks for rows in batches for row in rows]
    assert len(rows) == len(set(rows))
    # Every batch of every dataset comes, but for the last that are no whole step.
    batches = Counter(dataset_of(rows[0]) for found in ranks for rows in found)
    for i, n in enumerate(sizes):
        assert batches[i] == (-(-n // batch) if world == 1 else n // batch // world * world)


def test_datasets_keep_their_share_all_along_and_epochs_differ() -> None:
    sampler = several([4000, 1000], 5)
    first = [rows[0] < 4000 for rows in sampler]
    shares = np.convolve(first[:-64], np.ones(64) / 64, "valid")  # the end has what is left
    assert abs(shares - 0.8).max() < 0.1
    assert list(sampler) == list(several([4000, 1000], 5))
    before = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != before and len(list(sampler)) == len(before) == len(sampler)
    tiny = several([30_000, 3], 3)  # a share below one in 4,096 steps
    assert sum(rows[0] >= 30_000 for rows in tiny) == 1


# ---------------------------------------------------------------- in the trainer


def test_a_run_with_both_samplers(make_model: Any, make_texts: Any, tmp_path: Path) -> None:
    """The single dataset's batches are the original's, so its loss curve is too."""
    curves = []
    one = {"a": make_texts(40, 0), "b": make_texts(40, 1)}
    for m, data in ((st, one), (ek, one), (ek, {"x": one, "y": one})):
        torch.manual_seed(0)
        model = make_model()
        many = {name: Dataset.from_dict(d) for name, d in data.items()} if "x" in data else None
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=1,
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, batch_sampler=m.NoDuplicatesBatchSampler,
            multi_dataset_batch_sampler=ek.SingleTaskBatchSampler,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=many or Dataset.from_dict(data),
            loss=ek.MultipleNegativesRankingLoss(model),
        )  # fmt: skip
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert curves[0] == curves[1] and len(curves[0]) == 5 and len(curves[2]) == 10


# ---------------------------------------------------------------- mining


class Hashed:
    """A model whose vectors are drawn from their texts: no two scores are equal."""

    similarity_fn_name = "cosine"
    device = torch.device("cpu")
    similarity = staticmethod(cos_sim)
    similarity_pairwise = staticmethod(pairwise_cos_sim)

    def encode_document(self, texts: list[str], prompt: str | None = None, **_: Any) -> Any:
        found = [np.random.default_rng([*f"{prompt}{t}".encode()]) for t in texts]
        vectors = np.stack([rng.standard_normal(24) for rng in found]).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    encode_query = encode_document

    def predict(self, pairs: Any, convert_to_tensor: bool = False, **_: Any) -> Any:
        found = [np.random.default_rng([*q.encode(), 0, *d.encode()]).random() for q, d in pairs]
        scores = np.array(found, np.float32)
        return torch.from_numpy(scores) if convert_to_tensor else scores


def pairs() -> Dataset:
    """Sixty pairs: queries of several positives, positives of several queries, repeats."""
    draw = random.Random(0)
    return Dataset.from_dict(
        {
            "id": list(range(60)),
            "query": [f"q{draw.randrange(45)}" for _ in range(60)],
            "answer": [f"d{draw.randrange(50)}" for _ in range(60)],
        }
    )


RULES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "range": {"range_min": 3, "num_negatives": 4},
    "absolute": {"absolute_margin": 0.1, "range_min": 1},
    "relative": {"relative_margin": 0.05, "max_score": 0.5},
    "least": {"min_score": 0.1, "num_negatives": 5},
    "drawn": {"sampling_strategy": "random", "range_max": 20},
    "drawn_few": {"sampling_strategy": "random", "absolute_margin": 0.6, "range_max": 9},
    "corpus": {
        "corpus": [f"x{i}" for i in range(99)],
        "relative_margin": 0.3,
        "query_prompt": "q:",
    },
    "rescored": {"cross_encoder": Hashed(), "relative_margin": 0.2},
    "rescored_least": {"cross_encoder": Hashed(), "min_score": 0.4, "range_min": 2},
    "beyond_corpus": {"range_max": 500, "num_negatives": 60},
    "ranking": {"include_positives": True},
    "deprecated": {"as_triplets": False, "margin": 0.1},
}
FORMATS = ("triplet", "n-tuple", "labeled-pair", "labeled-list")


EVERY = [(rules, output_format) for rules in RULES for output_format in FORMATS]
SOME = [*zip(RULES, 4 * FORMATS, strict=False), *[("relative", name) for name in FORMATS]]


@pytest.mark.parametrize(("rules", "output_format"), EVERY if FULL else SOME)
def test_negatives_are_the_originals(rules: str, output_format: str, capsys: Any) -> None:
    for output_scores in (False, True):
        made = []
        for function in (mine_hard_negatives, ek.mine_hard_negatives):
            random.seed(3)
            made.append(
                function(
                    pairs(), Hashed(), anchor_column_name="query", positive_column_name="answer",
                    output_format=output_format, output_scores=output_scores,
                    verbose=output_scores and function is ek.mine_hard_negatives, **RULES[rules],
                )
            )  # fmt: skip
        theirs, ours = made
        assert ours.column_names == theirs.column_names and len(ours) == len(theirs)
        assert ours.features == theirs.features or not len(theirs)
        for name in theirs.column_names:
            if name in ("score", "scores"):
                flat = [np.hstack([*made[name], 0.0]) for made in (theirs, ours)]
                np.testing.assert_allclose(flat[1], flat[0], atol=1e-6)
            else:
                assert list(ours[name]) == list(theirs[name])
    assert "positive" in capsys.readouterr().out


def test_embeddings_are_kept_where_the_original_finds_them(
    make_model: Any, make_texts: Any, tmp_path: Path
) -> None:
    model = make_model().eval()
    data = Dataset.from_dict({"q": make_texts(12, 0), "a": make_texts(12, 1)})
    options = {"cache_folder": str(tmp_path), "verbose": False, "query_prompt": "w1 "}
    ours = ek.mine_hard_negatives(data, model, **options)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    theirs = mine_hard_negatives(data, model, **options)
    assert len(files) == 2 and {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert ours.to_dict() == theirs.to_dict()


def test_a_distance_is_mined_by_the_original(make_model: Any, make_texts: Any) -> None:
    model = make_model().eval()
    model.similarity_fn_name = "euclidean"
    data = Dataset.from_dict({"q": make_texts(9, 0), "a": make_texts(9, 1)})
    both = [f(data, model, verbose=False) for f in (mine_hard_negatives, ek.mine_hard_negatives)]
    assert both[0].to_dict() == both[1].to_dict()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"output_format": "pairs"}, "labeled-list"),
        ({"sampling_strategy": "best"}, "top or random"),
        ({"num_negatives": 0}, "at least 1"),
        ({"range_min": 5, "range_max": 6}, "range_max - range_min"),
    ],
)
def test_mining_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ek.mine_hard_negatives(pairs().select_columns(["query", "answer"]), Hashed(), **options)
    with pytest.raises(UsageError, match="empty"):
        ek.mine_hard_negatives(pairs().select([]), Hashed())


# ---------------------------------------------------------------- deduplication


def prose(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"word{draw.randrange(400)}" for _ in range(30)) for _ in range(n)]


def test_rows_go_whose_texts_are_all_duplicates() -> None:
    passages = prose(40, 0)
    answers = [*passages, *[p + " tail" for p in passages[:10]], *[p.upper() for p in passages[:5]]]
    questions = [f"question {i % 40} of them" for i in range(len(answers))]
    questions[50:] = ["another question altogether"] * 5
    data = Dataset.from_dict({"q": questions, "a": answers, "label": list(range(len(answers)))})
    kept = lambda **options: ek.dedup(data, **options)["label"][:]  # noqa: E731
    assert kept() == [*range(40), *range(50, 55)]  # the pairs of 40 to 49 repeat those of 0 to 9
    assert kept(method="exact") == list(range(55))
    assert kept(columns=["a"]) == list(range(40))
    assert kept(columns=["a"], method="exact") == list(range(50))
    assert kept(columns=["q"]) == [*range(40), 50]
    assert kept(memory=1 << 20) == kept()
    mixed = data.shuffle(seed=1)
    again = ek.dedup(mixed)
    assert len(again) == 45 and again.column_names == data.column_names
    assert ek.dedup(data.select([])).num_rows == 0
    assert ek.dedup(again.flatten_indices()).num_rows == 45


def test_rows_go_that_leak_into_evaluation_data(tmp_path: Path) -> None:
    passages = prose(30, 1)
    held = tmp_path / "test.jsonl"
    held.write_text('{"query": "nothing like it", "positive": "' + passages[4] + '"}\n')
    data = Dataset.from_dict({"q": ["the same question"] * 30, "a": passages})
    left = ek.dedup(data, against=held)
    assert [row["a"] for row in left] == passages[:4] + passages[5:]
    # A text of many rows is one text: its runs are no fixed phrases.
    often = Dataset.from_dict({"q": prose(20, 2), "a": [passages[4]] * 20})
    assert len(ek.dedup(often, against=[held])) == 0


def test_dedup_refuses(tmp_path: Path) -> None:
    data = Dataset.from_dict({"a": ["x"], "n": [1]})
    with pytest.raises(UsageError, match="'n' is no column of texts"):
        ek.dedup(data, columns=["n"])
    with pytest.raises(UsageError, match="no column of texts"):
        ek.dedup(data.select_columns(["n"]))
    with pytest.raises(UsageError, match="threshold"):
        ek.dedup(data, threshold=0)
    with pytest.raises(UsageError, match="did you mean 'exact'"):
        ek.dedup(data, method="exakt")
    with pytest.raises(FileNotFoundError):
        ek.dedup(data, against=tmp_path / "none")


def test_an_old_sentence_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(vars(ek), "CoSENTLoss", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.3.0")
    with pytest.raises(UsageError, match="is 5.3.0.*for version 6"):
        _ = ek.CoSENTLoss
