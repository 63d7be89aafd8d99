"""Dataclasses as a schema: from plain tables and back, and the checks of their values."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from embkit.errors import UsageError, nearest


def require(ok: bool, what: str, fix: str) -> None:
    if not ok:
        raise UsageError(what, fix=fix)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} = {value!r} is not known; {nearest(value, allowed)}")


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        for f in dataclasses.fields(value):
            # TOML has no null: what is switched off must not come back as its default.
            if table[f.name] is None and f.default is not None:
                table[f.name] = "off"
        return {name: plain(item) for name, item in table.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def changed(value: Any) -> dict[str, Any]:
    """The fields of a flat dataclass that differ from their defaults, as a plain table."""
    default = plain(type(value)())
    return {name: item for name, item in plain(value).items() if default.get(name) != item}


def build(cls: Any, table: Any, where: str) -> Any:
    """A dataclass from a table: unknown keys name the nearest, types are checked."""
    if not isinstance(table, Mapping):
        raise UsageError(f"{cls.__name__} must be a table, not {table!r}.", where=where)
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            raise UsageError(
                f"Unknown key {key!r} in {cls.__name__.lower()}; {nearest(key, known)}", where=where
            )
    values = {key: _convert(hints[key], item, f"{where}: {key}") for key, item in table.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value == "off":  # also of a path: a file of that name is "./off"
            return None
        return _convert(args[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(args) == 2 and args[1] is not Ellipsis and len(value) != len(args):
            raise UsageError(f"Expected {len(args)} values, not {len(value)}.", where=where)
        return tuple(_convert(args[0], item, where) for item in value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _convert(args[1], item, where) for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise UsageError(f"Expected {expected}, found {value!r}.", where=where, fix="correct its type")
