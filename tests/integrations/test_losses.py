"""Losses for sentence-transformers' trainer: the original's value, gradients and loss curve."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses as st
from sentence_transformers.util import dot_score, pairwise_dot_score
from torch import Tensor, nn

from embkit.integrations import sentence_transformers as ek
from embkit.integrations.sentence_transformers import dense

FULL = bool(os.environ.get("EMBKIT_TEST_FULL"))
OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
MODES = ((None, 0.0), ("in_batch_negatives", 9.0), ("hard_negatives", 5.0), ("all_negatives", 3.0))
DIMS = [32, 16, 7]


def directions() -> list[tuple[str, ...]]:
    """Every set of directions, from the queries' alone to all four."""
    chosen = chain.from_iterable(combinations(OTHERS, k) for k in range(4))
    return [("query_to_doc", *others) for others in chosen]


def randn(n: int, rows: int, seed: int = 0, width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, width, dtype=torch.float64, generator=generator) for _ in range(n)]
    return [made[0], *[column + made[0] for column in made[1:]]]


def compared(losses: list[Any], columns: list[Tensor], labels: Any = None) -> None:
    """Values and all gradients of `compute_loss_from_embeddings` are equal."""
    found = []
    for loss in losses:
        leaves = [column.clone().requires_grad_() for column in columns]
        value = loss.compute_loss_from_embeddings(leaves, labels)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.fixture(params=["auto", "ref"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One width the short way of a CPU, and by the kernel as several widths are."""
    monkeypatch.setenv("EMBKIT_KERNELS", request.param)


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_ranking_in_every_direction_and_hardness(
    negatives: int, partition: str, kernels: None
) -> None:
    for rows in (1, 6):
        columns = randn(2 + negatives, rows, width=8)
        for chosen in directions() if FULL else [*directions()[:2], *directions()[-2:]]:
            if partition == "per_direction" and set(chosen) & {"query_to_query", "doc_to_doc"}:
                continue
            for mode, strength in MODES:
                options = dict(
                    scale=20.0, directions=chosen, partition_mode=partition, hardness_mode=mode,
                    hardness_strength=strength,
                )  # fmt: skip
                made = (m.MultipleNegativesRankingLoss for m in (st, ek))
                compared([loss(nn.Module(), **options) for loss in made], columns)


@pytest.fixture
def second_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two ranks; what the first one has is made of its own."""

    def gather(x: Tensor) -> Tensor:
        return torch.cat([x.detach().flip(0) * 0.5 + 0.1 * x.detach().roll(1, -1), x])

    originals = "sentence_transformers.sentence_transformer.losses"
    ours = "embkit.integrations.sentence_transformers"
    for module in (
        f"{originals}.multiple_negatives_ranking", f"{originals}.gist_embed",
        f"{originals}.cached_multiple_negatives_ranking", f"{ours}.ranking", f"{ours}.guided",
    ):  # fmt: skip
        monkeypatch.setattr(f"{module}.all_gather_with_grad", gather)
        monkeypatch.setattr(f"{module}.get_rank", lambda: 1)


@pytest.mark.parametrize("partition", ["joint", "per_direction"])
def test_ranking_gathered_over_devices(partition: str, second_rank: None, kernels: None) -> None:
    columns = randn(4, 5, width=8)
    for chosen in directions():
        if partition == "per_direction" and set(chosen) & {"query_to_query", "doc_to_doc"}:
            continue
        for mode, strength in MODES:
            options = dict(
                directions=chosen, partition_mode=partition, hardness_mode=mode,
                hardness_strength=strength, gather_across_devices=True,
            )  # fmt: skip
            made = (m.MultipleNegativesRankingLoss for m in (st, ek))
            compared([loss(nn.Module(), **options) for loss in made], columns)


def test_guided_and_cached_gathered_over_devices(
    second_rank: None, make_model: Any, make_texts: Any, guides: list[Any]
) -> None:
    for cache in (False, True):
        values = []
        for m in (st, ek):
            model = make_model()
            if cache:
                loss = m.CachedMultipleNegativesRankingLoss(
                    model, mini_batch_size=3, gather_across_devices=True
                )
            else:
                loss = m.GISTEmbedLoss(model, guides[0], 0.05, gather_across_devices=True)
            value = loss([model.preprocess(make_texts(7, seed)) for seed in (0, 1, 2)], None)
            value.backward()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            values.append((value.item(), torch.cat(grads)))
        (theirs, their_grad), (ours, our_grad) = values
        assert ours == pytest.approx(theirs, rel=2e-5)
        assert (our_grad - their_grad).norm() <= 2e-5 * their_grad.norm()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode[0])
def test_ranking_in_chunks_of_rows(
    mode: tuple[str | None, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 rows the chunks have 16 and 4."""
    monkeypatch.setattr(dense, "_CHUNK", 1)
    columns = randn(4, 20, width=8)
    options = dict(
        directions=("query_to_doc", *OTHERS), hardness_mode=mode[0], hardness_strength=mode[1]
    )
    made = (m.MultipleNegativesRankingLoss for m in (st, ek))
    compared([loss(nn.Module(), **options) for loss in made], columns)


def test_ranking_keeps_the_loss_of_easy_rows(kernels: None) -> None:
    """log-sum-exp less logit, as in the original, has nothing left of it in float32."""
    q = torch.eye(6)[:5]
    columns = [q, q + 0.01 * torch.arange(30.0).reshape(5, 6).sin()]
    loss = ek.MultipleNegativesRankingLoss(nn.Module(), scale=20.0)
    exact = loss.compute_loss_from_embeddings([c.double() for c in columns], None).item()
    assert 0 < exact < 1e-7
    assert loss.compute_loss_from_embeddings(columns, None).item() == pytest.approx(exact, rel=1e-4)


def test_ranking_of_zero_vectors_and_other_dtypes(kernels: None) -> None:
    columns = [column.bfloat16() for column in randn(3, 6)]
    columns[1][2] = 0
    loss = ek.MultipleNegativesRankingLoss(nn.Module(), directions=("query_to_doc", *OTHERS))
    leaves = [column.clone().requires_grad_() for column in columns]
    value = loss.compute_loss_from_embeddings(leaves, None)
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    (2 * value).backward()
    assert value.dtype == torch.float32 and torch.isfinite(value)
    for leaf, first in zip(leaves, once, strict=True):
        assert leaf.grad.dtype == torch.bfloat16 and torch.isfinite(first).all()
        torch.testing.assert_close(leaf.grad, 3 * first, rtol=2e-2, atol=1e-6)
    assert not leaves[1].grad[2].any()
    with torch.no_grad():
        assert loss.compute_loss_from_embeddings(columns, None).item() == value.item()


def test_ranking_of_columns_of_other_lengths_is_refused() -> None:
    q, p = randn(2, 6)
    loss = ek.MultipleNegativesRankingLoss(nn.Module())
    with pytest.raises(ValueError, match="6, 6, 4"):
        loss.compute_loss_from_embeddings([q, p, p[:4]], None)


def test_ranking_with_a_similarity_of_its_own() -> None:
    losses = [
        m.MultipleNegativesRankingLoss(nn.Module(), similarity_fct=dot_score, scale=1.0)
        for m in (st, ek)
    ]
    assert not losses[1].fused
    compared(losses, randn(3, 5))


def test_ranking_of_halves_is_computed_in_float32() -> None:
    columns = [column.float() for column in randn(2, 40)]
    loss = ek.MultipleNegativesRankingLoss(nn.Module(), scale=50.0)
    whole = loss.compute_loss_from_embeddings(columns, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss.compute_loss_from_embeddings(columns, None).item() == whole.item()


@pytest.mark.parametrize("own", [False, True])
def test_cosent(own: bool, kernels: None) -> None:
    columns = randn(2, 30)
    labels = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(1)) / 4
    options = {"similarity_fct": pairwise_dot_score} if own else {}
    compared([m.CoSENTLoss(nn.Module(), **options) for m in (st, ek)], columns, labels)
    with pytest.raises(ValueError, match="30 labels"):
        ek.CoSENTLoss(nn.Module()).compute_loss_from_embeddings(columns, labels[:4])


def test_cosent_of_booleans_and_of_one_grade(kernels: None) -> None:
    labels = torch.arange(8) % 2 == 0
    compared([m.CoSENTLoss(nn.Module()) for m in (st, ek)], randn(2, 8), labels)
    compared([m.CoSENTLoss(nn.Module()) for m in (st, ek)], randn(2, 8), torch.ones(8))


@pytest.mark.parametrize("scale", [1.0, 290.0, 2000.0])
def test_cosent_of_any_scale(scale: float) -> None:
    columns, labels = randn(2, 30), torch.arange(30) % 7
    compared([m.CoSENTLoss(nn.Module(), scale=scale) for m in (st, ek)], columns, labels)


Made = Callable[[Any, Any, Any], Any]


def ranking(m: Any, model: Any, guide: Any) -> Any:
    return m.MultipleNegativesRankingLoss(model)


def symmetric(m: Any, model: Any, guide: Any) -> Any:
    return m.MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )


def gte(m: Any, model: Any, guide: Any) -> Any:
    return m.MultipleNegativesRankingLoss(model, directions=("query_to_doc", *OTHERS))


def cached(m: Any, model: Any, guide: Any) -> Any:
    return m.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=5, hardness_mode="hard_negatives", hardness_strength=5.0
    )


def guided(m: Any, model: Any, guide: Any) -> Any:
    return m.GISTEmbedLoss(model, guide, temperature=0.05, margin=0.02)


def guided_relative(m: Any, model: Any, guide: Any) -> Any:
    return m.GISTEmbedLoss(
        model, guide, margin=0.1, margin_strategy="relative", contrast_anchors=False,
        contrast_positives=False,
    )  # fmt: skip


def cached_guided(m: Any, model: Any, guide: Any) -> Any:
    return m.CachedGISTEmbedLoss(model, guide, temperature=0.05, mini_batch_size=5)


def graded(m: Any, model: Any, guide: Any) -> Any:
    return m.CoSENTLoss(model)


LOSSES = (ranking, symmetric, gte, cached, guided, guided_relative, cached_guided, graded)


@pytest.fixture(scope="module")
def guides(make_model: Any) -> list[Any]:
    """A guide with the model's tokenizer, and one with another."""
    return [make_model(seed=3).eval(), make_model(order=7, seed=4).eval()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["one", "matryoshka"])
@pytest.mark.parametrize("make", LOSSES, ids=lambda make: make.__name__)
def test_value_and_gradients_through_a_model(
    make: Made, wrapped: bool, make_model: Any, make_texts: Any, guides: list[Any]
) -> None:
    """Texts repeat: a positive as its row's negative, and as another row's positive."""
    columns = [make_texts(12, seed) for seed in (0, 1, 2)]
    columns[2][3], columns[1][6] = columns[1][3], columns[1][5]
    if make is graded:
        columns = columns[:2]
    labels = torch.arange(12) % 4 / 4
    other = make in (guided, cached_guided)
    for guide in guides if other else guides[:1]:
        found = []
        for m in (st, ek):
            model = make_model()
            loss = make(m, model, guide)
            if wrapped:
                loss = m.MatryoshkaLoss(model, loss, DIMS, [1.0, 0.5, 2.0])
            value = loss([model.preprocess(texts) for texts in columns], labels)
            (3 * value).backward()  # as a scaler or accumulated gradients would
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            with torch.no_grad():  # as in evaluation
                again = loss([model.preprocess(texts) for texts in columns], labels)
            assert again.item() == pytest.approx(value.item(), rel=1e-5)
            found.append((value.detach(), torch.cat([g.flatten() for g in grads])))
        (theirs, their_grad), (ours, our_grad) = found
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
        assert (our_grad - their_grad).norm() <= 2e-5 * their_grad.norm()


@pytest.mark.parametrize("make", [ranking, cached], ids=["plain", "cached"])
def test_matryoshka_draws_the_widths_that_the_original_draws(
    make: Made, make_model: Any, make_texts: Any
) -> None:
    columns = [make_texts(6, seed) for seed in (0, 1)]
    model, values = make_model(), []
    for m in (st, ek):
        loss = m.MatryoshkaLoss(model, make(m, model, None), [32, 16, 8, 4], n_dims_per_step=2)
        random.seed(5)
        drawn = [loss([model.preprocess(c) for c in columns], None).item() for _ in range(6)]
        values.append(drawn)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert len({round(v, 4) for v in values[0]}) > 1


def test_matryoshka_around_a_loss_of_the_original_runs_the_original(
    make_model: Any, make_texts: Any
) -> None:
    model = make_model()
    features = [model.preprocess(make_texts(6, seed)) for seed in (0, 1)]
    values = [
        m.MatryoshkaLoss(model, st.MultipleNegativesRankingLoss(model), DIMS)(features, None)
        for m in (st, ek)
    ]
    assert values[0].item() == values[1].item()


def test_matryoshka_of_the_original_around_our_losses(make_model: Any, make_texts: Any) -> None:
    model = make_model()
    features = [model.preprocess(make_texts(6, seed)) for seed in (0, 1)]
    for make in (ranking, cached):
        values = [
            st.MatryoshkaLoss(model, make(m, model, None), DIMS)(features, None).item()
            for m in (st, ek)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-5)


def curve(
    m: Any, make: Made, wrapped: bool, make_model: Any, make_texts: Any, guide: Any, out: Any
) -> list[float]:
    """The losses of a few steps of a training run, dropout on."""
    torch.manual_seed(0)
    model = make_model(dropout=0.1)
    columns = {"anchor": make_texts(32, 0), "positive": make_texts(32, 1)}
    if make is graded:
        columns["score"] = (torch.arange(32) % 5 / 4).tolist()
    else:
        columns["negative"] = make_texts(32, 2)
    loss = make(m, model, guide)
    if wrapped:
        loss = m.MatryoshkaLoss(model, loss, DIMS)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(out), per_device_train_batch_size=8, max_steps=4, learning_rate=1e-3,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, seed=3,
        disable_tqdm=True, dataloader_pin_memory=False, max_grad_norm=0.0,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


RUNS = [(ranking, True), (cached, True), (guided, False), (cached_guided, False), (graded, False)]


@pytest.mark.parametrize(
    ("make", "wrapped"),
    [(make, wrapped) for make in LOSSES for wrapped in (False, True)] if FULL else RUNS,
    ids=lambda x: getattr(x, "__name__", "matryoshka" if x else "one"),
)
def test_a_training_run_has_the_originals_loss_curve(
    make: Made, wrapped: bool, make_model: Any, make_texts: Any, guides: list[Any], tmp_path: Any
) -> None:
    theirs, ours = (
        curve(m, make, wrapped, make_model, make_texts, guides[0], tmp_path) for m in (st, ek)
    )
    assert len(theirs) == 4 and theirs[0] != theirs[-1]
    assert ours == pytest.approx(theirs, rel=1e-5)
