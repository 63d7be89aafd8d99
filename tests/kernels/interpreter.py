"""Triton kernels on CPU: the interpreter, made right for bf16, every new tensor poisoned.

How a process gets there: TRITON_INTERPRET must be set before triton is first imported, because
triton's own library functions are decorated at import. tests/conftest.py sets it for the whole
test session on a machine without a GPU; nothing else in the tests runs compiled kernels in this
process (the ahead-of-time check starts its own, with the variable cleared). With a GPU the variable
stays unset, so that tests marked gpu run compiled kernels, and interpreter tests are skipped:
`TRITON_INTERPRET=1 pytest tests/kernels -m "not gpu"` runs them there.

A test takes the fixture `interpreter` and calls the public function as a user would. The rule for
numbers is `against`: forward and every gradient against the same formula in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from embkit_kernels import _dispatch

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}
"""Largest ||got - want|| / ||want|| of a gradient, by the dtype of the inputs."""

FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""An error below this is one rounding of the result: there torch is not to be beaten."""

LEAST = {torch.float32: 1e-30, torch.float16: 1e-3, torch.bfloat16: 1e-30}
"""Results with a smaller norm are compared as if they had it: below lie subnormal numbers."""


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run Triton kernels in the interpreter, exact bf16, new tensors filled with NaN."""
    pytest.importorskip("triton")
    if not _dispatch.interpreted():
        pytest.skip("TRITON_INTERPRET was not set before triton was imported")
    if reason := _dispatch._why_not_interpreter():
        pytest.skip(reason)
    monkeypatch.setenv(_dispatch.ENV, "triton")
    exact_bf16(monkeypatch)
    with poisoned():
        yield


def exact_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make bf16 in the interpreter what it is on a GPU, without a change to any kernel.

    The interpreter holds bf16 as uint16. Its `tl.dot` multiplies those bit patterns as integers,
    and its cast from float32 truncates where the hardware rounds to the nearest even. (Arithmetic
    on bf16 without a cast stays garbage: kernels cast up first.)
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def up(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def down(handle: Any) -> Any:
        bits = torch.from_numpy(handle.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(bits.numpy(), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, up(a), up(b), *rest)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        types = source.dtype.scalar, kind.scalar
        if types == (tl.bfloat16, tl.float32):
            return up(source)
        return down(source) if types == (tl.float32, tl.bfloat16) else cast(self, source, kind)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


class poisoned:
    """Fill every tensor that is allocated without values: NaN, or the largest integer.

    An element that a kernel forgets to write then shows. torch does the filling itself in its
    deterministic mode, which also refuses operations whose order may change.
    """

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before)


Outputs = Tensor | Sequence[Tensor]


def against(
    fused: Callable[..., Outputs],
    reference: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    *,
    tolerance: float | None = None,
    forward: float | None = None,
    floor: float | None = None,
    peer: Callable[..., Outputs] | None = None,
    seed: int = 7,
) -> dict[str, float]:
    """Compare outputs and every gradient with the same formula in float64.

    Errors are ||got - want|| / ||want||. Besides the tolerance, a result may not be worse than
    plain torch gives in the inputs' own dtype, unless it is within one rounding (`FLOOR`).

    Args:
        fused: what is tested; takes the inputs and returns one tensor or several.
        reference: the specification, in plain autograd; gets the inputs in float64.
        inputs: in their own dtype; those with `requires_grad` get a gradient.
        tolerance: bound of each error; None takes the dtype's from `TOLERANCE`.
        forward: bound of the outputs' errors, where it is another (losses are tighter).
        floor: error within which torch need not be beaten; None takes the dtype's from `FLOOR`.
        peer: what "plain torch" is; None means the reference in the inputs' dtype.
        seed: of the upstream gradients.

    Returns:
        The errors by name: ``out0``, ..., ``grad0``, ... (number of the input).
    """
    dtype = next(x.dtype for x in inputs if x.is_floating_point())
    bound = TOLERANCE[dtype] if tolerance is None else tolerance
    floor, least = FLOOR[dtype] if floor is None else floor, LEAST[dtype]
    wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    want = evaluate(reference, wide, inputs, seed)
    got = evaluate(fused, inputs, inputs, seed)
    torch_has = evaluate(peer or reference, inputs, inputs, seed)
    assert got.keys() == want.keys()
    errors = {}
    for name, exact in want.items():
        assert got[name].shape == exact.shape, f"{name}: {got[name].shape}, not {exact.shape}"
        errors[name] = error = relative(got[name], exact, least)
        limit = forward if forward is not None and name.startswith("out") else bound
        assert error <= limit, f"{name} is off by {error:.1e}, allowed {limit:.1e}"
        best = max(relative(torch_has[name], exact, least), floor)
        assert error <= best, f"{name} is off by {error:.1e}, torch in {dtype} by {best:.1e}"
    return errors


def relative(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """||got - want|| / max(||want||, least), infinite for NaN; ||got|| if that divides by 0."""
    got, want = got.detach().double(), want.detach().double()
    scale = max(float(want.norm()), least) or 1.0
    error = (got - want).norm() / scale
    return float(torch.nan_to_num(error, nan=torch.inf))


def evaluate(
    f: Callable[..., Outputs], inputs: Sequence[Tensor], leaves: Sequence[Tensor], seed: int
) -> dict[str, Tensor]:
    """Outputs and gradients of f, with random upstream gradients that depend on the seed alone."""
    given = [
        x.detach().clone().requires_grad_(leaf.requires_grad)
        for x, leaf in zip(inputs, leaves, strict=True)
    ]
    found = f(*given)
    out = [found] if isinstance(found, Tensor) else list(found)
    values = {f"out{i}": x.detach() for i, x in enumerate(out)}
    wanted = [(i, x) for i, x in enumerate(given) if x.requires_grad]
    live = [x for x in out if x.requires_grad]
    if wanted and live:
        rng = torch.Generator().manual_seed(seed)
        upstream = [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in live]
        total = [u.to(x.dtype) for u, x in zip(upstream, live, strict=True)]
        grads = torch.autograd.grad(live, [x for _, x in wanted], total, allow_unused=True)
        for (i, x), g in zip(wanted, grads, strict=True):
            values[f"grad{i}"] = torch.zeros_like(x) if g is None else g
    return values
