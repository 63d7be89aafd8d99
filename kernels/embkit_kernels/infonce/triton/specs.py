"""Every shipped configuration of the InfoNCE kernels, for the ahead-of-time check (see aot.py)."""

from collections.abc import Iterator
from typing import Any

from ... import _triton
from ..._triton import Spec
from .coefficients import coefficient_kernel
from .finish import finish_kernel
from .forward import combine_kernel, forward_kernel
from .launch import OP
from .prep import prefix_kernel

_TILE = {
    "INVERSE_U": "*fp32", "INVERSE_V": "*fp32", "REFERENCE": "*fp32", "TAU": "*fp32",
    "ROW_KEY": "*i32", "COLUMN_KEY": "*i32", "WIDTHS": "*i32",
    "B": "i32", "N": "i32", "padded": "i32", "width": "i32", "stride_u": "i32", "stride_v": "i32",
    "stride_rows": "i32", "tiles_m": "i32", "tiles_n": "i32",
}  # fmt: skip
_ALIGNED = ("padded", "width", "stride_u", "stride_v", "stride_rows", "stride_partials",
            "stride_columns", "first")  # fmt: skip
_OPTIONAL = ("ROW_START", "COLUMN_START", "ROW_QUERY", "COLUMN_QUERY", "margin", "alpha")
_QUERIES = {"ROW_QUERY": "*i32", "COLUMN_QUERY": "*i32"}
_FORWARD = {**_TILE, "MAXIMA": "*fp32", "SUMS": "*fp32", "stride_partials": "i32"}
_VARIANTS: dict[str, dict[str, str]] = {
    "": {},
    " all options": {**_QUERIES, "margin": "fp32", "alpha": "fp32"},
    " jagged": {**_QUERIES, "ROW_START": "*i32", "COLUMN_START": "*i32"},
}
"""The fewest options and the most; jagged positives have code of their own."""


def specs() -> Iterator[Spec]:
    """Tile kernels per dtype and set of options, and the kernels around them."""
    for dtype, key in (("bf16", "tile"), ("fp32", "tile_fp32")):
        for entry, arch, config in _triton.shipped(OP, key):
            where = "" if entry == "default" else f" {entry}"
            for variant, extra in _VARIANTS.items():
                if dtype == "fp32" and variant != " all options":
                    continue
                name = f"{dtype}{variant}{where}"
                yield _tile(f"forward {name}", forward_kernel, _FORWARD, dtype, extra, config, arch)
                signature = {
                    **_TILE, "X": "*fp32", "WEIGHT": "*fp32", "C": f"*{dtype}", "RHO": "*fp32",
                    "KAPPA": "*fp32", "stride_columns": "i32", "first": "i32", "K": "i32",
                }  # fmt: skip
                kernel = coefficient_kernel
                yield _tile(f"coefficients {name}", kernel, signature, dtype, extra, config, arch)
    yield from _around("bf16")


def _tile(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    dtype: str,
    extra: dict[str, str],
    config: dict[str, Any],
    arch: tuple[int, ...],
) -> Spec:
    blocks = {k: v for k, v in config.items() if k.isupper()}
    kind = {"U": f"*{dtype}", "V": f"*{dtype}"}
    if config["TMA"]:
        for side, block in (("U", "BLOCK_M"), ("V", "BLOCK_N")):
            kind[side] = f"tensordesc<{dtype}[{config[block]},{config['BLOCK_K']}]>"
    signature = {**kind, **signature, **extra}
    constexprs = dict.fromkeys(k for k in _OPTIONAL if k not in extra)
    if "SCALE" in kernel.arg_names:
        constexprs["SCALE"] = None
    constexprs |= {**blocks, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    forward, jagged = kernel is forward_kernel, "ROW_START" in extra
    pointers = [k for k, v in signature.items() if v.startswith("*")]
    return Spec(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=(*pointers, *(a for a in _ALIGNED if a in signature)),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        arch=arch,
        stack_budget=0 if forward and not jagged and dtype != "fp32" else 64,
        tensor_cores=dtype != "fp32",
        pipelined=not jagged,
        maxnreg=config.get("forward_maxnreg") if forward and not jagged else None,
    )


def _around(dtype: str) -> Iterator[Spec]:
    """prefix_kernel, combine_kernel and finish_kernel: bytes bound, no tensor cores."""
    for entry, arch, config in _triton.shipped(OP, "prefix"):
        where = "" if entry == "default" else f" {entry}"
        sizes = {"R": "i32", "K": "i32", "stride_v": "i32", "stride_u": "i32", "tiny": "fp32"}
        common = {"V": f"*{dtype}", "WIDTHS": "*i32", **sizes}
        for name, signature, constexprs in (
            ("norms", {"INVERSE": "*fp32"},
             {"U": None, "U_ROW": None, "V_ROW": None, "DOTS": None}),
            ("dots", {"U": f"*{dtype}", "V_ROW": "*i64", "DOTS": "*fp32"},
             {"U_ROW": None, "INVERSE": None}),
        ):  # fmt: skip
            yield _plain(f"{name} {dtype}{where}", prefix_kernel, {**common, **signature},
                         {**constexprs, "each": 1, "EVEN": True}, config, arch)  # fmt: skip
    for entry, arch, config in _triton.shipped(OP, "finish"):
        where = "" if entry == "default" else f" {entry}"
        signature = {
            "OUT": f"*{dtype}", "X": f"*{dtype}", "ACC": "*fp32", "WIDTHS": "*i32",
            "INVERSE": "*fp32", "PULL": "*fp32", "START": "*i32", "ENTRY": "*i64",
            "Y": f"*{dtype}", "PAIR_C": "*fp32", "PAIR_PULL": "*fp32", "HARD": f"*{dtype}",
            "HARD_C": "*fp32", "K": "i32", "width": "i32", "stride_x": "i32", "stride_k": "i32",
            "stride_y": "i32", "stride_e": "i32", "stride_hard": "i32", "stride_hard_c": "i32",
            "each": "i32",
        }  # fmt: skip
        yield _plain(f"finish {dtype}{where}", finish_kernel, signature,
                     {"UNSCALE": None, "SOURCE": None}, config, arch)  # fmt: skip
    for entry, arch, config in _triton.shipped(OP, "combine"):
        where = "" if entry == "default" else f" {entry}"
        signature = {"MAXIMA": "*fp32", "SUMS": "*fp32", "X": "*fp32", "B": "i32",
                     "stride_rows": "i32", "tiles": "i32"}  # fmt: skip
        yield _plain(f"combine{where}", combine_kernel, signature, {}, config, arch)


def _plain(
    name: str,
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    config: dict[str, Any],
    arch: tuple[int, ...],
) -> Spec:
    blocks = {k: v for k, v in config.items() if not k.startswith("num_")}
    strides = [k for k in signature if k.startswith("stride") or k == "width"]
    return Spec(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={**constexprs, **blocks},
        aligned=(*(k for k, v in signature.items() if v.startswith("*")), *strides),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        arch=arch,
    )
