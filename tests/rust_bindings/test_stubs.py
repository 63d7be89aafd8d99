"""`_rust.pyi` against the extension itself: the same names, arguments and defaults."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from embkit import _rust

STUB = Path(_rust.__file__).with_name("_rust.pyi")


def arguments(node: ast.FunctionDef) -> list[tuple[str, Any]]:
    """Names and defaults of a stub's function, without self and cls."""
    args = node.args.args
    empty = inspect.Parameter.empty
    defaults = [empty] * (len(args) - len(node.args.defaults))
    defaults += [ast.literal_eval(d) for d in node.args.defaults]
    pairs = [(a.arg, d) for a, d in zip(args, defaults, strict=True)]
    for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        pairs.append((arg.arg, empty if default is None else ast.literal_eval(default)))
    return [p for p in pairs if p[0] not in ("self", "cls")]


def real(function: Any) -> list[tuple[str, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default) for p in parameters if p.name not in ("self", "cls")]


TREE = ast.parse(STUB.read_text("utf-8"))
FUNCTIONS = {n.name: n for n in TREE.body if isinstance(n, ast.FunctionDef)}
CLASSES = {n.name: n for n in TREE.body if isinstance(n, ast.ClassDef)}


def test_the_names_are_the_same() -> None:
    there = {n for n in dir(_rust) if not n.startswith("_")}
    assert there == set(FUNCTIONS) | set(CLASSES)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_take_the_same_arguments(name: str) -> None:
    assert real(getattr(_rust, name)) == arguments(FUNCTIONS[name])
    assert ast.get_docstring(FUNCTIONS[name])
    assert getattr(_rust, name).__doc__


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_classes_have_the_same_methods(name: str) -> None:
    cls, node = getattr(_rust, name), CLASSES[name]
    methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
    public = {n for n in vars(cls) if not n.startswith("_")}
    assert public == {n for n in methods if not n.startswith("_")}
    if "__new__" in methods:
        assert real(cls) == arguments(methods["__new__"])
    else:  # only made by others
        with pytest.raises(TypeError, match="cannot create"):
            cls()
    for method in sorted(public):
        if any(
            isinstance(d, ast.Name) and d.id == "property" for d in methods[method].decorator_list
        ):
            assert inspect.isgetsetdescriptor(getattr(cls, method))
        else:
            assert real(getattr(cls, method)) == arguments(methods[method]), method
