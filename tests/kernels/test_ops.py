"""What every op promises beyond numbers: memory, determinism, torch.compile, dispatch, imports."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from embkit_kernels import (
    KernelUnavailableError,
    cosent,
    embedding_distill,
    infonce,
    mean_pool,
    mrl_similarity,
    provider,
    spread_out,
    value_and_grads,
)
from embkit_kernels import cosent as cosent_function
from embkit_kernels.infonce import chunked
from embkit_kernels.infonce.op import infonce_forward, infonce_fused
from embkit_kernels.infonce.problem import Problem

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Largest(TorchDispatchMode):
    """Remembers the element count of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            # Views of the inputs and expanded shapes hold no memory of their own.
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def infonce_case(rng: torch.Generator, batch: int, columns: int, width: int) -> dict[str, Any]:
    ids = torch.randint(0, columns, (columns,), generator=rng)
    return {
        "q": torch.randn(batch, width, generator=rng),
        "p": torch.randn(columns, width, generator=rng),
        "hard": torch.randn(batch, 2, width, generator=rng),
        "query_ids": ids[:batch],
        "passage_ids": ids,
    }


def test_no_tensor_of_the_whole_problem_exists(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing the reference allocates, forward or backward, is larger than the workspace."""
    batch, columns, dims, workspace = 1024, 2048, (4, 8), 1 << 18
    monkeypatch.setitem(chunked.WORKSPACE, "cpu", workspace)
    values = infonce_case(rng, batch, columns, 8)
    q, p, hard = values.pop("q"), values.pop("p"), values.pop("hard")
    problem = Problem(
        dims=dims, positive_index=torch.arange(batch), passage_query_ids=values["passage_ids"],
        same_tower=True, doc_doc=True, margin=0.1, **values,
    )  # fmt: skip
    tau = torch.tensor(0.05)
    with Largest() as largest:
        rows, x = chunked.forward(q, p, hard, tau, problem)
        needs = (True, True, True)
        chunked.backward(torch.ones_like(rows), x, q, p, hard, tau, problem, needs)
        chunked.fused(torch.ones_like(rows), q, p, hard, tau, problem, needs)
    assert 0 < largest.numel <= workspace < batch * columns // 4


def test_nothing_quadratic_is_saved_for_backward(rng: torch.Generator) -> None:
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    batch = 512
    values = infonce_case(rng, batch, batch, 8)
    q = values.pop("q").requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        infonce(q, values.pop("p"), (4, 8), symmetric=True, **values)
        scores = torch.randn(batch, generator=rng).requires_grad_()
        cosent(scores, torch.arange(batch))
    assert 0 < max(saved) <= batch * 2 * 8  # the hard negatives themselves


def test_cosent_memory_is_linear(rng: torch.Generator) -> None:
    module = sys.modules[cosent_function.__module__]
    scores, labels = torch.randn(1, 3000, generator=rng), torch.arange(3000)
    with Largest() as largest:
        loss = module.cosent_op._init_fn(scores, labels, 20.0)
        module.cosent_backward._init_fn(torch.ones(1), *loss, scores, labels, 20.0)
    assert 0 < largest.numel <= module.TILE**2 < 3000**2 // 16


def test_same_inputs_same_bits(rng: torch.Generator) -> None:
    """Repeated positives included: their gradients meet in one row of p."""
    torch.set_num_threads(2)  # and sizes past the grain at which CPU ops go parallel
    values = infonce_case(rng, 520, 560, 64)
    q, p = values.pop("q"), values.pop("p")
    index = torch.randint(0, 40, (520,), generator=rng)
    labels = torch.randint(0, 5, (520,), generator=rng)
    cu = torch.arange(0, 521, 4)

    def once() -> list[Tensor]:
        grads = value_and_grads(
            q, p, (16, 64), positive_index=index, passage_query_ids=values["passage_ids"],
            symmetric=True, same_tower=True, **values,
        )  # fmt: skip
        side = q.clone().requires_grad_()
        loss = cosent((side, p[:520]), labels)[0] + mean_pool(side, cu_seqlens=cu).sum()
        return [t for t in (*grads, loss.detach(), torch.autograd.grad(loss, side)[0])]

    first = once()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def loss_of_everything(q: Tensor, p: Tensor, hard: Tensor, tau: Tensor, ids: Tensor) -> Tensor:
    loss, _ = infonce(
        q, p, (16, 4), hard=hard, query_ids=ids, passage_ids=ids, temperature=tau,
        same_tower=True, symmetric=True, margin=0.1, row_weights=ids.float(),
    )  # fmt: skip
    pooled = mean_pool(hard, lengths=ids % 3, prompt_len=1, normalize=True)
    packed = mean_pool(q, cu_seqlens=torch.arange(0, q.shape[0] + 1, 2))
    ranked, _ = cosent((q, p), ids, (4, 16), dim_weights=(1.0, 2.0))
    rows, _ = infonce(q, p, temperature=tau, reduction="none")
    return loss + rows[0] + pooled.sum() + packed.sum() + ranked + spread_out(q)[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_as_one_graph(backend: str, rng: torch.Generator) -> None:
    leaves = [torch.randn(*s, 16, generator=rng) for s in ((10,), (10,), (10, 3))]
    leaves.append(torch.tensor(0.1))
    ids = torch.randint(0, 8, (10,), generator=rng)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in leaves]
        loss = f(*given, ids)
        return [loss.detach(), *torch.autograd.grad(loss, given)]

    want = run(loss_of_everything)
    torch._dynamo.reset()
    got = run(torch.compile(loss_of_everything, fullgraph=True, backend=backend))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(rng: torch.Generator) -> None:
    module = sys.modules[mean_pool.__module__]
    ids = torch.tensor([0, 1, 1, 2])
    q, p, hard = (torch.randn(*s, 6, generator=rng) for s in ((4,), (4,), (4, 2)))
    leaves = [t.requires_grad_() for t in (q, p, hard, torch.tensor(0.1))]
    guide = [torch.randn(*s, 3, generator=rng) for s in ((4,), (4,), (4, 2))]
    options = (True, True, True, False, 0.5, 0.1, False, *guide, -0.5, False)
    keys = (torch.arange(4), None, ids, ids + 1, ids + 2, None, None, None, None)
    torch.library.opcheck(infonce_forward, (*leaves, [2, 6], *keys, *options))
    jagged = (
        torch.arange(4),
        torch.tensor([0, 2, 2, 3, 4]),
        None,
        ids,
        None,
        None,
        None,
        None,
        None,
    )
    plain = (False, True, False, False, 0.0, -0.1, True, None, None, None, 0.0, False)
    torch.library.opcheck(infonce_forward, (q, p, None, leaves[3], [6], *jagged, *plain))
    weights = torch.rand(2, 4, generator=rng, requires_grad=True)
    rest = ([2, 6], *keys, *options)
    torch.library.opcheck(infonce_fused, (*leaves, weights, True, True, True, *rest))
    frozen = (q, p.detach(), hard.detach(), leaves[3], weights, True, False, False)
    torch.library.opcheck(infonce_fused, (*frozen, *rest))
    start, end = torch.tensor([0, 2]), torch.tensor([2, 3])
    keep = torch.rand(4, 2) < 0.5
    for normalize in (False, True):
        torch.library.opcheck(module.mean_pool_packed, (q, start, end, normalize))
        torch.library.opcheck(module.mean_pool_padded, (hard, keep, normalize))
    cosent_op = sys.modules[cosent_function.__module__].cosent_op
    scores = torch.randn(2, 4, generator=rng, requires_grad=True)
    torch.library.opcheck(cosent_op, (scores, ids, 20.0))


@pytest.mark.parametrize("op", ["infonce", "cosent", "mean_pool", "similarity"])
def test_dispatch(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {
        "infonce": lambda: infonce(torch.eye(2), torch.eye(2)),
        "cosent": lambda: cosent(torch.ones(2), torch.arange(2)),
        "mean_pool": lambda: mean_pool(torch.ones(2, 2), cu_seqlens=torch.tensor([0, 2])),
        "similarity": lambda: mrl_similarity(torch.eye(2), torch.eye(2), k=1),
    }
    cpu = torch.device("cpu")
    monkeypatch.delenv("EMBKIT_KERNELS", raising=False)
    for choice in (None, "auto", "ref"):
        if choice:
            monkeypatch.setenv("EMBKIT_KERNELS", choice)
        assert provider(op, cpu) == "ref"
        calls[op]()
    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    why = f"no Triton kernel of '{op}' yet|need CUDA tensors, these are on 'cpu'|not installed"
    with pytest.raises(KernelUnavailableError, match=why):
        calls[op]()
    monkeypatch.setenv("EMBKIT_KERNELS", "fast")
    with pytest.raises(ValueError, match="use one of auto, triton, ref"):
        calls[op]()
    with pytest.raises(ValueError, match="unknown op 'sort'"):
        provider("sort", cpu)


def test_imports_with_torch_alone_and_beside_a_copy_of_itself(tmp_path: Path) -> None:
    """No triton, no numpy, no embkit: a process in which they cannot be imported.

    The folder is importable as embkit_kernels and inside embkit: two sets of ops, no clash.
    """
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").touch()
    (tmp_path / "outer" / "kernels").symlink_to(KERNELS / "embkit_kernels")
    code = (
        "import sys\n"
        "for name in ('triton', 'numpy', 'embkit', 'transformers'): sys.modules[name] = None\n"
        f"sys.path[:0] = [{str(KERNELS)!r}, {str(tmp_path)!r}]\n"
        "import torch, embkit_kernels as a, outer.kernels as b\n"
        "x = torch.eye(3, requires_grad=True)\n"
        "for ek in (a, b, a):\n"
        "    loss, _ = ek.infonce(x, x.detach())\n"
        "    assert 0 < loss.item() < 1e-6, loss\n"
        "    assert torch.autograd.grad(loss, x)[0].norm() > 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_docstring_examples() -> None:
    import doctest

    documented = (cosent, embedding_distill, infonce, mean_pool, mrl_similarity, spread_out)
    for f in (*documented, value_and_grads):
        runner = doctest.DocTestRunner()
        for case in doctest.DocTestFinder().find(f, globs={**vars(sys.modules[f.__module__])}):
            assert runner.run(case).failed == 0
        assert runner.tries > 0
