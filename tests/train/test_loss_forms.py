"""Every form of the loss that a recipe can ask for: golden values, gradients, masks, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_forms import N2, Batch, N, P, Q, drawn, formula, gradient_of, unit

from embkit import kernels
from embkit.errors import UsageError
from embkit.losses import compute, value_and_grad
from embkit.losses.tasks import dim_weights
from embkit.recipe import Loss, Part, Train, from_table
from embkit.recipe.loss import FORMS

TAU = 0.05


def loss_of(batch: Batch, loss: Loss, dims: tuple[int, ...] = (4,), **config: Any) -> float:
    made = Train(temperature=TAU, **config)
    return compute(*batch.args, dims=dims, config=made, loss=loss).loss.item()


ONE, TWO = Batch(Q, P, N[:, None]), Batch(Q, P, N2)
GOLDEN: dict[str, tuple[float, Batch, dict[str, Any], tuple[int, ...]]] = {
    "gecko pre-finetuning": (0.035290, Batch(Q, P), {"form": "gemini-v2"}, (4,)),
    "gecko": (0.343748, ONE, {"form": "gecko"}, (4,)),
    "gemini-v2": (0.342723, ONE, {}, (4,)),
    "gemini-v2, same label": (0.342498, Batch(Q, P, N[:, None], pid=[0, 0, 2]), {}, (4,)),
    "gemini-v1": (-1.938513, ONE, {"form": "gemini-v1"}, (4,)),
    "gemini-v2 with hardness": (2.341997, ONE, {"hardness": 5.0}, (4,)),
    "qwen3": (0.679984, TWO, {"form": "qwen3"}, (4,)),
    "qwen3, second stage": (
        0.347295, TWO, {"form": "qwen3", "same_tower": False, "doc_doc": False}, (4,),
    ),
    "conan": (0.323075, TWO, {"form": "conan"}, (4,)),
    "two widths": (0.887785, ONE, {}, (4, 2)),
    "spread-out": (
        0.342723 + 0.5 * 0.561448, ONE, {"spread_out": 0.5}, (4,),
    ),
}  # fmt: skip


def test_golden_cosines() -> None:
    """Of the queries and passages that the golden values are of."""
    want = [
        [0.833333, 0.5, 0.666667],
        [0.369274, 0.86164, 0.492366],
        [0.666667, 0.666667, 0.833333],
    ]
    found = kernels.mrl_similarity(Q.float(), P.float(), (4,))
    torch.testing.assert_close(found[0], torch.tensor(want), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    want, batch, settings, dims = GOLDEN[name]
    assert loss_of(batch, Loss(**settings), dims) == pytest.approx(want, abs=2e-6)


def test_golden_cosent_and_balance_loss() -> None:
    cosine, label = torch.tensor([0.9, 0.2, 0.5, 0.6]), torch.tensor([1, 0, 0.5, 0.5])

    def pairs(cosine: torch.Tensor) -> Batch:
        a = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
        b = torch.stack([cosine, (1 - cosine**2).sqrt()], 1).double()
        return Batch(a, b, kind="sts", score=label)

    found = [loss_of(pairs(c), Loss(), (2,)) for c in (cosine, cosine.flip(0))]
    assert found == pytest.approx([0.005613, 6.694554], abs=2e-6)
    # In one step: hard negatives only, and 0.8 of CoSENT.
    config = Train(
        parts=(Part(hard_negatives=2, in_batch=False), Part(tasks={"sts": 1.0}, weight=0.8)),
        temperature=TAU,
    )
    parts = [(TWO, 0), (pairs(cosine), 1)]
    total = sum(
        config.parts[i].weight
        * compute(*b.args, dims=(b.e.shape[1],), config=config, loss=config.loss_of("", i)).loss
        for b, i in parts
    )
    assert float(total) == pytest.approx(0.327565, abs=2e-6)


@pytest.mark.parametrize("rule", ["keys", "positives", "off"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_printed_formulas(form: str, rule: str) -> None:
    """Values and gradients at two widths, with repeated queries, positives and hard negatives."""
    batch, dims = drawn(), (8, 3)
    if rule == "off":  # a hard negative that is the positive again stays, too
        batch.sides.hard_key.fill_(999)
    want, gradient = gradient_of(
        lambda e: sum(formula(form, batch, e, 0.2, d, rule) for d in dims), batch.e
    )
    config = Train(temperature=0.2)
    out, got = value_and_grad(
        *batch.args, dims=dims, config=config, loss=Loss(form=form, mask=rule)
    )
    assert out.loss.item() == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(got, gradient, rtol=1e-9, atol=1e-11)


def test_the_mask_matters() -> None:
    """Two rows with one positive: without the mask each is the other's negative."""
    batch = Batch(Q, P[[0, 0, 2]], pid=[7, 7, 9])
    own, unmasked = loss_of(batch, Loss()), loss_of(batch, Loss(mask="off"))
    assert unmasked > own + 0.2  # log 2 of three in the row that has no other rival
    repeated = Batch(Q[[0, 0, 2]], P, qid=[5, 5, 6])
    by_rule = [loss_of(repeated, Loss(mask=m)) for m in ("keys", "positives", "off")]
    assert by_rule[0] < by_rule[1] == by_rule[2]


def test_margins() -> None:
    """Absolute and relative, by hand: cosines 0.8 (positive), 0.77 and 0.75."""
    q = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    p = torch.tensor([[s, (1 - s * s) ** 0.5] for s in (0.8, 0.77, 0.75)], dtype=torch.float64)
    batch = Batch(q, p, weight=torch.tensor([1.0, 0, 0], dtype=torch.float64))

    def want(*negatives: float) -> float:
        return math.log1p(sum(math.exp((s - 0.8) / TAU) for s in negatives))

    for settings, negatives in (
        ({}, (0.77, 0.75)),
        ({"margin": -0.04}, (0.75,)),
        ({"margin": -0.04, "margin_rule": "relative"}, (0.75,)),  # up to 0.768
        ({"margin": -0.03, "margin_rule": "relative"}, (0.77, 0.75)),  # up to 0.776
        ({"margin": -0.1}, ()),
        ({"form": "qwen3", "same_tower": False, "doc_doc": False}, (0.77, 0.75)),
        ({"margin": -0.1, "margin_rule": "off"}, (0.77, 0.75)),
    ):
        assert loss_of(batch, Loss(**settings), (2,)) == pytest.approx(want(*negatives)), settings


def test_shared_hard_negatives_stand_against_every_row() -> None:
    batch = drawn(mask=torch.ones(9, 3, dtype=torch.bool))
    q, p = unit(batch.e[batch.query], 8), unit(batch.e[batch.positive], 8)
    n, s = unit(batch.e[batch.hard.reshape(-1)], 8), batch.sides
    rows = []
    for i in range(9):
        keep = s.hard_key.reshape(-1) != s.positive_key[i]
        terms = torch.cat([(q[i] @ p[i])[None], (n @ q[i])[keep]]) / TAU
        rows.append(torch.logsumexp(terms, 0) - q[i] @ p[i] / TAU)
    want = (torch.stack(rows) * s.weight).sum() / s.weight.sum()
    assert loss_of(batch, Loss(form="conan", hard="shared"), (8,)) == pytest.approx(want.item())


def test_symmetric_is_the_mean_of_both_directions() -> None:
    batch = drawn(h=0)
    back = Batch(
        batch.e[batch.positive], batch.e[batch.query], qid=batch.sides.positive_key,
        pid=batch.sides.query_key, weight=batch.sides.weight,
    )  # fmt: skip
    want = (loss_of(batch, Loss(), (8,)) + loss_of(back, Loss(), (8,))) / 2
    assert loss_of(batch, Loss(symmetric=True), (8,)) == pytest.approx(want)


def test_widths_are_weighed_and_join_in_turn() -> None:
    batch = drawn()
    each = [loss_of(batch, Loss(), (d,)) for d in (8, 3)]
    weighed = Loss(dim_weights={"3": 0.25})
    assert loss_of(batch, weighed, (8, 3)) == pytest.approx(each[0] + 0.25 * each[1])
    turn = Loss(dims_schedule="progressive", dim_weights={"3": 0.25})
    config = Train(temperature=TAU, steps=10)
    for step, want in ((0, 0.25 * each[1]), (4, 0.25 * each[1]), (5, each[0] + 0.25 * each[1])):
        out = compute(*batch.args, dims=(8, 3), config=config, loss=turn, step=step)
        assert out.loss.item() == pytest.approx(want)
        assert out.per_dim.tolist() == pytest.approx(each)  # the log has every width
    assert [dim_weights(turn, (8, 3, 5), s, 3) for s in range(3)] == [
        [0, 0.25, 0], [0, 0.25, 1], [1, 0.25, 1],
    ]  # fmt: skip
    pairs = drawn(kind="sts", h=0)
    both = [loss_of(pairs, Loss(), (d,)) for d in (8, 3)]
    assert loss_of(pairs, weighed, (8, 3)) == pytest.approx(both[0] + 0.25 * both[1])


@pytest.mark.parametrize("hard", ["own", "shared"])
def test_a_guide_drops_what_it_finds_nearer(hard: str) -> None:
    """GISTEmbed with another model's vectors: four kinds of candidates, each by its own cosine."""
    batch = drawn(mask=torch.ones(9, 3, dtype=torch.bool))
    teacher = torch.randn(len(batch.e), 5, dtype=torch.float64)
    loss = Loss(
        same_tower=True, doc_doc=True, hard=hard, mask="off", guide="absolute", guide_margin=-0.1,
    )  # fmt: skip
    batch.sides.hard_key.fill_(999)
    kept = 0

    def formula(e: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        model, guide = ([unit(x[i], x.shape[1]) for i in (batch.query, batch.positive, batch.hard)]
                        for x in (e, teacher))  # fmt: skip
        (q, p, n), (gq, gp, gn), rows = model, guide, []
        for i in range(9):
            limit = gq[i] @ gp[i] - 0.1
            pairs = [
                (x[i] @ y[j], gx[i] @ gy[j])
                for x, y, gx, gy in ((q, p, gq, gp), (q, q, gq, gq), (p, p, gp, gp))
                for j in range(9)
                if j != i
            ]
            pairs += [
                (q[i] @ n[j, k], gq[i] @ gn[j, k])
                for j in range(9)
                for k in range(3)
                if hard == "shared" or i == j
            ]
            terms = [s for s, g in pairs if g <= limit]
            kept += len(terms)
            rows.append(torch.logsumexp(torch.stack([q[i] @ p[i], *terms]) / TAU, 0)
                        - q[i] @ p[i] / TAU)  # fmt: skip
        return (torch.stack(rows) * batch.sides.weight).sum() / batch.sides.weight.sum()

    want, gradient = gradient_of(formula, batch.e)
    assert 30 < kept < 9 * (24 + 27)
    config = Train(temperature=TAU)
    options: dict[str, Any] = {"dims": (8,), "config": config, "loss": loss}
    out, got = value_and_grad(*batch.args, **options, teacher=teacher)
    assert out.loss.item() == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-10)
    with pytest.raises(UsageError, match="guided by a teacher"):
        compute(*batch.args, **options)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_distillation_of_vectors(distance: str) -> None:
    """Each side by itself, absent hard negatives out, on the teacher's width."""
    batch = drawn()
    teacher = torch.randn(len(batch.e), 5, dtype=torch.float64)
    loss = Loss(distill=0.7, distance=distance)

    def formula(e: torch.Tensor) -> torch.Tensor:
        s = batch.sides
        apart = (e[:, :5] - teacher).square().sum(1)
        if distance == "cosine":
            apart = 1 - (unit(e, 5) * unit(teacher, 5)).sum(1)
        both = s.weight[:, None] * s.hard_mask
        total = (apart[batch.hard] * both).sum() / both.sum()
        for index in (batch.query, batch.positive):
            total = total + (apart[index] * s.weight).sum() / s.weight.sum()
        plain = compute(e, *batch.args[1:], dims=(8,), config=Train(), loss=Loss()).loss
        return plain + 0.7 * total

    want, gradient = gradient_of(formula, batch.e)
    out, got = value_and_grad(*batch.args, dims=(8,), config=Train(), loss=loss, teacher=teacher)
    assert out.loss.item() == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(got, gradient, rtol=1e-8, atol=1e-10)


def test_a_wider_teacher_is_met_through_a_projection() -> None:
    """The embeddings go into the teacher's space; both they and the projection get gradients."""
    batch = drawn(h=0)
    teacher = torch.randn(len(batch.e), 11, dtype=torch.float64)
    projection = torch.randn(8, 11, dtype=torch.float64)
    options: dict[str, Any] = {"dims": (8, 3), "config": Train(), "teacher": teacher}
    plain, _ = value_and_grad(*batch.args, **options, loss=Loss())

    def apart(e: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        s = batch.sides
        far = 1 - (unit(e @ matrix, 11) * unit(teacher, 11)).sum(1)
        return sum(
            (far[i] * s.weight).sum() / s.weight.sum() for i in (batch.query, batch.positive)
        )

    out, _ = value_and_grad(*batch.args, **options, loss=Loss(distill=0.7), projection=projection)
    leaf = projection.clone().requires_grad_()
    (0.7 * apart(batch.e, leaf)).backward()
    assert (out.loss - plain.loss).item() == pytest.approx(0.7 * apart(batch.e, projection).item())
    torch.testing.assert_close(out.d_projection, leaf.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(UsageError, match="11 numbers, the embeddings 8"):
        value_and_grad(*batch.args, **options, loss=Loss(distill=0.7))


def test_distillation_of_scores() -> None:
    """Kullback-Leibler divergence over what the teacher has scored, at both widths."""
    batch, config = drawn(), Train(temperature=0.2)
    loss = Loss(distill_scores=0.5, teacher_temperature=0.3)
    s = batch.sides
    assert s.hard_score is not None

    def formula(e: torch.Tensor) -> torch.Tensor:
        total, used = 0.0 * e.sum(), 0.0
        for d in (8, 3):
            q, p, n = (unit(e[i], d) for i in (batch.query, batch.positive, batch.hard))
            used = 0.0
            for i in range(9):
                own = [k for k in range(3) if s.hard_mask[i, k] and s.hard_score[i, k].isfinite()]
                if not s.score[i].isfinite() or not own:
                    continue
                gold = torch.stack([s.score[i], *(s.hard_score[i, k] for k in own)]).double() / 0.3
                mine = torch.stack([q[i] @ p[i], *(q[i] @ n[i, k] for k in own)]) / 0.2
                apart = torch.nn.functional.kl_div(
                    mine.log_softmax(0), gold.log_softmax(0), reduction="sum", log_target=True
                )
                total, used = total + s.weight[i] * apart, used + float(s.weight[i])
        plain = compute(e, *batch.args[1:], dims=(8, 3), config=config, loss=Loss()).loss
        return plain + 0.5 * total / used

    want, gradient = gradient_of(formula, batch.e)
    out, got = value_and_grad(*batch.args, dims=(8, 3), config=config, loss=loss)
    assert out.loss.item() == pytest.approx(want, rel=1e-6)  # gold scores are float32
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-7)


def test_a_learned_temperature_has_a_gradient() -> None:
    batch = drawn()

    def formula_(tau: torch.Tensor) -> torch.Tensor:
        return compute(*batch.args, dims=(8,), config=Train(), temperature=tau).loss

    tau = torch.tensor(0.2, dtype=torch.float64)
    out, _ = value_and_grad(*batch.args, dims=(8,), config=Train(), temperature=tau)
    slope = (formula_(tau + 1e-6) - formula_(tau - 1e-6)) / 2e-6
    assert out.d_temperature is not None
    assert out.d_temperature.item() == pytest.approx(slope.item(), rel=1e-6)
    pairs, _ = value_and_grad(*drawn(kind="sts").args, dims=(8,), config=Train(), temperature=tau)
    assert pairs.d_temperature is not None and pairs.d_temperature.item() == 0


def test_settings_over_settings() -> None:
    """The stage's loss, under the part's, under the task's."""
    config = Train(
        loss=Loss(spread_out=0.1),
        losses={"faq": {"form": "gecko", "temperature": 0.1}},
        parts=(
            Part(loss={"form": "qwen3", "mask": "positives"}),
            Part(in_batch=False, hard_negatives=2),
        ),
    )
    assert config.loss_of("other", 0) == Loss(form="qwen3", mask="positives", spread_out=0.1)
    assert config.loss_of("faq", 0) == Loss(
        form="gecko", mask="positives", spread_out=0.1, temperature=0.1
    )
    assert config.loss_of("faq", 1).terms()["in_batch"] is False
    assert Train().loss_of("any") == Loss()
    recipe = from_table(
        {
            "finetune": {
                "loss": {"form": "qwen3", "margin_rule": "off"},
                "losses": {"a": {"mask": "off"}},
            }
        }
    )
    assert recipe.finetune.loss_of("a").terms()["margin"] is None
    assert recipe.finetune.loss_of("a").mask == "off"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": {"form": "gemini"}}, "did you mean 'gemini-v"),
        ({"loss": {"distill": 1.0}}, "distils from a teacher, and there is none"),
        ({"teacher": "vectors"}, "no loss has a factor for it"),
        ({"loss": {"margin_rule": "relative"}}, "there is no margin"),
        ({"loss": {"guide": "absolute"}}, "guided by a teacher, and there is none"),
        ({"loss": {"guide_margin": 0.1}}, "loss.guide = 'off'"),
        ({"loss": {"form": "conan", "symmetric": True}, "hard_negatives": 1}, "symmetric compares"),
        ({"loss": {"temperature": 0.1, "learn_temperature": True}}, "a learned one is of the run"),
        ({"loss": {"learn_temperature": True}, "sharding": "shard"}, "whole weights"),
        ({"loss": {"dim_weights": {"wide": 1.0}}}, "no weight of a width"),
        ({"loss": {"spread_out": -1.0}}, "spread_out = -1.0 is out of range"),
        ({"losses": {"faq": {"frm": "gecko"}}}, "did you mean 'form'"),
        ({"losses": {"faq": {"form": "conan", "symmetric": True}}}, "symmetric compares"),
        ({"parts": [{"loss": {"spread_out": -1.0}}]}, "spread_out = -1.0 is out of range"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        from_table({"finetune": settings})
    assert says in str(error.value)
