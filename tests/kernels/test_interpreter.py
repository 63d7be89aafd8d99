"""What interpreter tests stand on: exact bf16, poisoned tensors, fair comparison, dispatch."""

from typing import Any

import pytest
import torch
from interpreter import against, poisoned, relative
from torch import Tensor

from embkit_kernels import KernelUnavailableError, _dispatch, _triton

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

CPU = torch.device("cpu")


@triton.jit
def product_kernel(a, b, out, rows, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr):  # noqa: N803
    """out[rows, N] = a[rows, K] b[K, N], rows <= M."""
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + m[:, None] * K + k, mask=m[:, None] < rows, other=0.0)
    y = tl.load(b + k[:, None] * N + n)
    product = tl.dot(x, y, input_precision="ieee")
    tl.store(out + m[:, None] * N + n, product.to(out.dtype.element_ty), mask=m[:, None] < rows)


def product(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    product_kernel[(1,)](a, b, out, a.shape[0], *b.shape, 16)
    return out


def operands(rng: torch.Generator, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(s, generator=rng).to(dtype) for s in ((13, 32), (32, 16))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dots_are_right(dtype: torch.dtype, interpreter: None, rng: torch.Generator) -> None:
    a, b = operands(rng, dtype)
    assert relative(product(a, b), a.double() @ b.double()) < 3e-7
    # Stores round to the nearest, as torch does.
    assert torch.equal(product(a, b, dtype), product(a, b).to(dtype))


def test_without_the_shim_bf16_is_wrong(rng: torch.Generator) -> None:
    """The day this fails, triton's interpreter knows bf16 and the shim can go."""
    if not _dispatch.interpreted():
        pytest.skip("compiled kernels")
    a, b = operands(rng, torch.bfloat16)
    assert relative(product(a, b), a.double() @ b.double()) > 1e3
    a, b = a.float(), b.float()
    assert not torch.equal(product(a, b, torch.bfloat16), product(a, b).to(torch.bfloat16))


def test_new_tensors_are_poisoned(interpreter: None) -> None:
    x = torch.ones(3)
    for new in (
        torch.empty(3),
        torch.empty_like(x),
        x.new_empty(3),
        torch.empty_strided((3,), (1,)),
    ):
        assert new.isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()


def test_poison_ends() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_against_finds_a_wrong_gradient(rng: torch.Generator) -> None:
    x = torch.randn(5, generator=rng).requires_grad_()

    class Slanted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2.00002

    against(lambda x: x * 2, lambda x: x + x, [x])
    with pytest.raises(AssertionError, match="grad0 is off by 1.0e-05, allowed 2.0e-06"):
        against(Slanted.apply, lambda x: x + x, [x])
    with pytest.raises(AssertionError, match="out0 is off by inf"):
        against(lambda x: x * float("nan"), lambda x: x + x, [x])


def test_against_wants_no_worse_than_torch(rng: torch.Generator) -> None:
    x = torch.randn(50, generator=rng)
    with pytest.raises(AssertionError, match="torch in torch.float32 by 2.0e-06"):
        against(lambda x: x * (1 + 3e-5), lambda x: x, [x], tolerance=1e-4)
    exact = x.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="torch in torch.bfloat16"):
        against(lambda x: x.float() * 1.005, lambda x: x * 1, [exact])


def test_who_may_run_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_OPS", frozenset({"cosent"}))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("EMBKIT_KERNELS", raising=False)
    assert _dispatch.provider("cosent", CPU) == "ref"
    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    with pytest.raises(KernelUnavailableError, match="need CUDA tensors, these are on 'cpu'"):
        _dispatch.provider("cosent", CPU)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _dispatch._why_not_interpreter.cache_clear()
    assert _dispatch.provider("cosent", CPU, torch.bfloat16) == "triton"
    with pytest.raises(KernelUnavailableError, match="not torch.float64"):
        _dispatch.provider("cosent", CPU, torch.float64)
    monkeypatch.setenv("EMBKIT_KERNELS", "auto")
    assert _dispatch.provider("cosent", CPU) == "ref"
    assert "only with EMBKIT_KERNELS=triton" in str(_dispatch.why_not_triton("cosent", CPU))
    assert "no Triton kernel of 'infonce'" in str(_dispatch.why_not_triton("infonce", CPU))

    monkeypatch.setenv("EMBKIT_KERNELS", "triton")
    versions = {"numpy": "2.4.0", "triton": "3.6.0"}
    monkeypatch.setattr(_dispatch, "version", versions.__getitem__)
    _dispatch._why_not_interpreter.cache_clear()
    with pytest.raises(KernelUnavailableError, match="numpy < 2.4"):
        _dispatch.provider("cosent", CPU)
    _dispatch._why_not_interpreter.cache_clear()


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "8.0 or newer, this GPU has 7.5"), ((9, 0), None)]
)
def test_old_gpus_take_the_reference(
    capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dispatch, "_TRITON_OPS", frozenset({"cosent"}))
    monkeypatch.setattr(_dispatch, "_capability", lambda index: capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = _dispatch.why_not_triton("cosent", torch.device("cuda", 0))
    assert found is reason is None or str(reason) in str(found)


@pytest.fixture
def tables(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.json").write_text(
        '{"default": {"forward": {"BLOCK": 64, "num_warps": 4}, "backward": {"BLOCK": 32}},'
        ' "sm_90": {"forward": {"BLOCK": 128, "num_warps": 8}},'
        ' "NVIDIA H200": {"arch": "sm_90", "backward": {"BLOCK": 256}},'
        ' "candidates": {"forward": [{"BLOCK": 32}]}}'
    )
    monkeypatch.setattr(_triton, "CONFIGS", tmp_path)
    _triton._table.cache_clear()


def test_configs_by_device(tables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names: dict[int, tuple[str, str]] = {0: ("NVIDIA H200", "sm_90"), 1: ("Other", "sm_80")}
    monkeypatch.setattr(_triton, "gpu_names", names.__getitem__)
    assert _triton.config("toy", "forward") == {"BLOCK": 64, "num_warps": 4}
    assert _triton.config("toy", "forward", CPU)["BLOCK"] == 64
    assert _triton.config("toy", "forward", gpu)["BLOCK"] == 128  # by architecture
    assert _triton.config("toy", "backward", gpu)["BLOCK"] == 256  # by name
    assert _triton.config("toy", "backward", torch.device("cuda", 1))["BLOCK"] == 32
    with pytest.raises(KeyError, match="no default entry 'sideways'"):
        _triton.config("toy", "sideways")


def test_every_entry_is_compiled_where_it_runs(tables: None) -> None:
    assert list(_triton.shipped("toy", "forward")) == [
        ("default", (80, 100, 942, 86, 89, 120), {"BLOCK": 64, "num_warps": 4}),
        ("sm_90", (90,), {"BLOCK": 128, "num_warps": 8}),
    ]
    assert list(_triton.shipped("toy", "backward")) == [
        ("default", (80, 90, 100, 942, 86, 89, 120), {"BLOCK": 32}),
        ("NVIDIA H200", (90,), {"BLOCK": 256}),
    ]


def test_candidates_are_no_entries(tables: None) -> None:
    assert _triton.candidates("toy", "forward") == [{"BLOCK": 32}]
    assert _triton.candidates("toy", "backward") == []
    assert _triton.keys("toy") == ["forward", "backward"]


def test_replaced_configs_come_back(tables: None) -> None:
    with _triton.replaced("toy", forward={"BLOCK": 16}):
        assert _triton.config("toy", "forward", CPU) == {"BLOCK": 16, "num_warps": 4}
        with _triton.replaced("toy", forward={"num_warps": 1}):
            assert _triton.config("toy", "forward") == {"BLOCK": 16, "num_warps": 1}
    assert _triton.config("toy", "forward")["BLOCK"] == 64
    with pytest.raises(KeyError), _triton.replaced("toy", wrong={}):
        pass
