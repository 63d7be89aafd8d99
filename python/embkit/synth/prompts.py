"""Prompts are TOML files that users edit: instructions, examples, the form of the answer.

A text that goes into a prompt is data. It cannot end the marks around it, begin a turn of a chat or
look like one of the prompt's own lines, and nothing in it is taken for a variable.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.errors import UsageError, nearest
from embkit.recipe.schema import build, one_of, require

_NAME = re.compile(r"\{([a-z_]+)\}")
# What models use to mark turns and texts.
_MARKS = re.compile(r"<(?=[|/]?\w)|(?<=\|)>|\[(?=/?INST)|<(?=<SYS)|<(?=</SYS)")
_PLAIN = {"<": "‹", ">": "›", "[": "("}


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of an answer.

    Attributes:
        min_words, max_words: of its text; scripts without spaces count two characters a word.
        of: name of the control (or of a variable that lists options) whose options alone are
            allowed.
    """

    min_words: int = 1
    max_words: int = 64
    of: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One question to the model.

    Attributes:
        instructions: what comes first; the same for all items of a stage, without variables.
        item: how an example and the item are shown; ``{name}`` stands for a variable.
        shots: examples: variables of ``item``, and the fields or the label of the answer.
        fields: of a JSON answer, in order.
        labels: texts and values of a graded answer; no fields then.
        answer: how an example's answer is shown when it is neither (query likelihood).
        max_tokens: of the answer.
        one_line: put every text on one line, so that it cannot look like a line of the prompt.
    """

    instructions: str
    item: str
    shots: tuple[Mapping[str, Any], ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    max_tokens: int = 160
    one_line: bool = False

    def __post_init__(self) -> None:
        kinds = [bool(self.fields), bool(self.labels), bool(self.answer)]
        require(sum(kinds) == 1, "A step has fields, or labels, or an answer.", "give one of them")
        for shot in self.shots:
            needed = {*_NAME.findall(self.item), *self.fields, *_NAME.findall(self.answer)}
            needed |= {"label"} if self.labels else set()
            missing = sorted(needed - set(shot))
            require(
                not missing, f"An example lacks {', '.join(missing)}.", "complete [[steps.shots]]"
            )

    def render(self, values: Mapping[str, str]) -> str:
        """The prompt of one item.

        Raises:
            UsageError: a variable of ``item`` has no value.
        """
        parts = [self.instructions.strip()]
        parts += [f"{self._fill(self.item, shot)} {self._answer(shot)}" for shot in self.shots]
        parts.append(self._fill(self.item, values))
        return "\n\n".join(parts)

    def schema(self, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """JSON schema of the answer; fields whose options differ by item are free in it."""
        return {
            "type": "object",
            "properties": {
                name: {"type": "string"}
                | ({"enum": list(options[f.of])} if f.of in options else {})
                for name, f in self.fields.items()
            },
            "required": list(self.fields),
            "additionalProperties": False,
        }

    def _answer(self, shot: Mapping[str, Any]) -> str:
        if self.labels:
            return str(shot["label"])
        if self.fields:
            return json.dumps({name: str(shot[name]) for name in self.fields}, ensure_ascii=False)
        return self._fill(self.answer, shot)

    def _fill(self, template: str, values: Mapping[str, Any]) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] not in values:
                raise UsageError(
                    f"The prompt has a variable {{{match[1]}}} without a value; "
                    + nearest(match[1], values)
                )
            return plain(str(values[match[1]]), one_line=self.one_line)

        return _NAME.sub(value, template.strip())  # one pass: values are never looked into


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a prompt file says.

    Attributes:
        name: for provenance.
        steps: questions one after the other; answers of earlier ones are variables of later ones.
        controls: options of variables that are drawn for each item, by name.
        digest: hex BLAKE3 of the content.
    """

    name: str
    steps: tuple[Step, ...]
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    digest: str = ""

    def __post_init__(self) -> None:
        require(bool(self.steps), "A prompt has no [[steps]].", "add one")
        for step in self.steps:
            for name, found in step.fields.items():
                if found.of and found.of != "characters":
                    one_of(f"fields.{name}.of", found.of, tuple(self.controls))

    @property
    def graded(self) -> Step:
        """The one step of a prompt with labels.

        Raises:
            UsageError: it has none.
        """
        if len(self.steps) != 1 or len(self.steps[0].labels) < 2:
            raise UsageError(
                f"The prompt {self.name!r} gives no grades.",
                fix="give one step with at least two [steps.labels]",
            )
        return self.steps[0]


def names() -> list[str]:
    """Prompts that come with embkit."""
    folder = resources.files("embkit.synth") / "prompts"
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".toml"))


def load(prompt: str | Path | Prompt) -> Prompt:
    """A prompt by name, or from a file.

    Raises:
        UsageError: unknown name, no TOML, unknown keys or values.
        FileNotFoundError: no such file.
    """
    if isinstance(prompt, Prompt):
        return prompt
    text = source(prompt)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"The prompt is not TOML: {error}", where=prompt) from error
    made: Prompt = build(Prompt, {**table, "digest": _rust.blake3(text.encode())}, str(prompt))
    return made


def source(prompt: str | Path) -> str:
    """The text of a prompt file, of embkit's or the user's."""
    if str(prompt) in names():
        found = resources.files("embkit.synth") / "prompts" / f"{prompt}.toml"
        return found.read_text(encoding="utf-8")
    if isinstance(prompt, str) and not prompt.endswith(".toml"):
        raise UsageError(f"Unknown prompt {prompt!r}; {nearest(prompt, names())}")
    return Path(prompt).read_text(encoding="utf-8")


def plain(text: str, *, one_line: bool = False) -> str:
    """A text as data: marks of chats and of our own tags become characters that look like them."""
    text = _MARKS.sub(lambda m: _PLAIN[m[0]], text.replace("\x00", ""))
    return " ".join(text.split()) if one_line else text.strip()
