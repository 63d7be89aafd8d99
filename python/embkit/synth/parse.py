"""The answers of a model: JSON or lines of a fixed form, mended where certain, else refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from embkit.synth.prompts import Step, title

_NUMBER = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+")
_COMMA = re.compile(r",(\s*[}\]])")
_WIDE = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\u3040-\u30ff\u0e00-\u0eff]")


_HALF = re.compile("[\ud800-\udfff]")  # of a pair: JSON can say it, UTF-8 cannot


class Invalid(Exception):
    """An answer that cannot be used; ``reason`` is one word for the counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_answer(
    text: str, step: Step, options: Mapping[str, Sequence[str]], *, cut: bool = False
) -> tuple[dict[str, str], bool]:
    """The fields of an answer.

    Args:
        text: what the model wrote.
        step: the form that was asked for.
        options: of fields with options, by the name of the control.
        cut: the text stopped at its token limit.

    Returns:
        The fields, nothing else of the answer, and whether it had to be mended.

    Raises:
        Invalid: ``not_json``, ``schema`` (a field is missing or no text), ``cut`` (of lines, the
            last one), ``length``, ``option`` (not among the options) or ``example`` (a copy of an
            example's answer).
    """
    found, mended = read_lines(text, step, cut) if step.lines else read_object(text)
    out: dict[str, str] = {}
    for name, field in step.fields.items():
        value = found.get(name)
        if value is None:  # keys in another case or with spaces are no other keys
            same = [v for k, v in found.items() if _key(k) == _key(name)]
            value, mended = (same[0], True) if len(same) == 1 else (None, mended)
        if not isinstance(value, str) or _HALF.search(value):
            raise Invalid("schema")
        value = " ".join(value.split())
        if not field.min_words <= words(value) <= field.max_words:
            raise Invalid("length")
        if field.of:
            same = [o for o in options[field.of] if _key(o) == _key(value)]
            if not same:
                raise Invalid("option")
            value = same[0]
        out[name] = value
    for shot in step.shots:
        if any(not f.of and _key(str(shot[n])) == _key(out[n]) and n != "task"
               for n, f in step.fields.items()):  # fmt: skip
            raise Invalid("example")
    return out, mended


def read_lines(text: str, step: Step, cut: bool) -> tuple[dict[str, Any], bool]:
    """The fields of an answer in lines, in their order; what comes after the last is left.

    Mended is a name before the first, which the prompt has said already.
    """
    out: dict[str, Any] = {}
    mended, rest = False, text.lstrip()
    for name in step.fields:
        line, end, rest = rest.partition("\n")
        said, colon, value = line.partition(":")
        named = bool(colon) and _key(said) == _key(title(name))
        if out and not named:
            raise Invalid("cut" if cut and not end else "schema")
        mended = mended or (named and not out)
        out[name] = (value if named else line).strip()
    if cut and not end:
        raise Invalid("cut")  # its last field would be a piece
    return out, mended


def read_list(text: str, step: Step) -> tuple[list[tuple[str, str]], bool]:
    """The texts of a list: each with the reason why it cannot be used, empty when it can.

    Args:
        text: what the model wrote.
        step: with ``items``; of the list the last ``tail`` is taken.

    Returns:
        The texts, and whether the answer had to be mended. Mended are also a list without its
        object, numbers before entries, and a list that was cut: its whole entries stay.

    Raises:
        Invalid: ``not_json``: there is no list of texts.
    """
    ((name, field),) = step.fields.items()
    found, mended = _entries(text, name)
    copies = {_key(str(entry)) for shot in step.shots for entry in shot[name]}
    out = []
    for entry in found[len(found) - max(1, round(step.tail * len(found))) :]:
        value = " ".join(_NUMBER.sub("", entry).split())
        mended = mended or bool(_NUMBER.match(entry))
        reason = "" if field.min_words <= words(value) <= field.max_words else "length"
        if _HALF.search(value):
            value, reason = _HALF.sub("\ufffd", value), "schema"
        out.append((value, "example" if _key(value) in copies else reason))
    return out, mended


def _entries(text: str, name: str) -> tuple[list[str], bool]:
    """The strings of the list ``name``, or of the only list, of an answer."""
    try:
        found, mended = read_object(text)
        lists = [v for v in found.values() if isinstance(v, list)]
        value = found.get(name, lists[0] if len(lists) == 1 else None)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return value, mended or name not in found
        raise Invalid("schema")
    except Invalid:
        if "[" not in text:
            raise
    at = text.find("[") + 1
    out: list[str] = []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            one, at = json.JSONDecoder(strict=False).raw_decode(text, at)
        except (ValueError, RecursionError):  # the end, or where it was cut
            break
        if not isinstance(one, str):
            raise Invalid("schema")
        out.append(one)
    if not out:
        raise Invalid("not_json")
    return out, True


def read_object(text: str) -> tuple[dict[str, Any], bool]:
    """The JSON object in a text, and whether more had to be done than to read it.

    Mended are: text around the object, a trailing comma, raw line ends in strings. An object that
    is cut off is not: its last field would be a piece.
    """
    text = text.strip()
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found, False
    except (ValueError, RecursionError):  # a small model may open brackets without end
        pass
    start = text.find("{")
    if start < 0:
        raise Invalid("not_json")
    for candidate in (text[start:], _COMMA.sub(r"\1", text[start:])):
        try:
            found, _ = json.JSONDecoder(strict=False).raw_decode(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            return found, True
    raise Invalid("not_json")


def words(text: str) -> int:
    """Words of a text; of scripts without spaces, two characters are one."""
    wide = len(_WIDE.findall(text))
    return len(_WIDE.sub(" ", text).split()) + (wide + 1) // 2


def _key(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().casefold()
