"""embedding_distill against each row and width in float64."""

from typing import Any

import pytest
import torch
from interpreter import against
from torch import Tensor

from embkit_kernels import embedding_distill, embedding_distill_naive


def pair(
    batch: int, width: int, rng: torch.Generator, apart: float = 1.0, **kind: Any
) -> tuple[Tensor, Tensor]:
    teacher = torch.randn(batch, width, generator=rng)
    student = 3 * (teacher + apart * torch.randn(batch, width, generator=rng))
    return student.to(**kind).requires_grad_(), teacher.to(**kind)


def test_golden() -> None:
    """By hand: cosines 24/25 and 0 at width 2, 1 and 0 at width 1."""
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[4.0, 3.0], [5.0, 0.0]], dtype=torch.float64)
    loss, per_dim = embedding_distill(student, teacher, (2, 1), dim_weights=(1.0, 10.0))
    torch.testing.assert_close(per_dim, torch.tensor([0.52, 0.5], dtype=torch.float64))
    assert loss.item() == pytest.approx(5.52)
    weights = torch.tensor([3.0, 1.0])
    loss, _ = embedding_distill(student, teacher, distance="l2", row_weights=weights)
    assert loss.item() == pytest.approx((3 * 2 + 29) / 4)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (1, 7), (2, 16), (33, 24), (130, 65)])
def test_against_float64(
    shape: tuple[int, int], dtype: torch.dtype, distance: Any, rng: torch.Generator
) -> None:
    student, teacher = pair(*shape, rng, dtype=dtype)
    weights = torch.rand(shape[0], generator=rng).double()
    dims = (shape[1], (shape[1] + 1) // 2)[: 1 + (shape[1] > 1)]
    options = {"distance": distance, "row_weights": weights}
    against(
        lambda s: embedding_distill(s, teacher, dims, **options)[0],
        lambda s: embedding_distill_naive(s, teacher.to(s.dtype), dims, **options)[0],
        [student],
        forward=2e-6,
        tolerance=6e-3 if dtype == torch.bfloat16 else 2e-6,
    )


def test_a_student_close_to_its_teacher_keeps_its_digits(rng: torch.Generator) -> None:
    """Where 1 - cosine in float32 has none: half the squared distance has them all."""
    student, teacher = pair(50, 32, rng, apart=1e-4)
    exact, _ = embedding_distill_naive(student.double(), teacher.double())
    naive, _ = embedding_distill_naive(student, teacher)
    loss, _ = embedding_distill(student, teacher)
    assert 0 < exact < 1e-7
    assert abs(loss / exact - 1) < 1e-3 < abs(naive / exact - 1)


def test_zero_vectors_and_no_rows() -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    for row in range(3):
        loss, _ = embedding_distill(student[row : row + 1], teacher[row : row + 1])
        assert loss.item() == 1
        assert not torch.autograd.grad(loss, student)[0].any()
    loss, per_dim = embedding_distill(student[:0], teacher[:0], (1, 2))
    assert (loss.item(), per_dim.tolist()) == (0, [0, 0])
    assert embedding_distill(student, teacher, row_weights=torch.zeros(3))[0].item() == 0


def test_what_does_not_matter(rng: torch.Generator) -> None:
    student, teacher = pair(20, 12, rng)
    loss, per_dim = embedding_distill(student, teacher, (12, 5))
    order = torch.randperm(20, generator=rng)
    torch.testing.assert_close(embedding_distill(student[order], teacher[order], (12, 5))[0], loss)
    torch.testing.assert_close(embedding_distill(student * 7, teacher / 3, (12, 5))[0], loss)
    assert torch.equal(embedding_distill(student, teacher, (5, 12))[1].flip(0), per_dim)
    ones = embedding_distill(student, teacher, (12, 5), row_weights=torch.full((20,), 0.3))[0]
    torch.testing.assert_close(ones, loss)
    assert embedding_distill(teacher, teacher)[0].item() == 0


def test_gradients(rng: torch.Generator) -> None:
    student, teacher = pair(4, 6, rng, dtype=torch.float64)
    teacher.requires_grad_()
    for distance in ("cosine", "l2"):
        assert torch.autograd.gradcheck(
            lambda s, d=distance: embedding_distill(s, teacher, (6, 2), distance=d)[0], student
        )
    loss, per_dim = embedding_distill(student, teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None
    assert not per_dim.requires_grad


def test_compiles_as_one_graph(rng: torch.Generator) -> None:
    student, teacher = pair(9, 8, rng)
    torch._dynamo.reset()
    compiled = torch.compile(embedding_distill, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(embedding_distill(student, teacher, (8, 4))[0], student)[0]
    got = torch.autograd.grad(compiled(student, teacher, (8, 4))[0], student)[0]
    torch.testing.assert_close(got, want)


def test_bad_arguments_say_what_is_wrong() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="want equal \\[B, D\\]"):
        embedding_distill(x, x[:, :2])
    with pytest.raises(ValueError, match="'cosine' or 'l2'"):
        embedding_distill(x, x, distance="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="row_weights has shape"):
        embedding_distill(x, x, row_weights=torch.ones(3))
    with pytest.raises(ValueError, match="dims has 4"):
        embedding_distill(x, x, (4,))
