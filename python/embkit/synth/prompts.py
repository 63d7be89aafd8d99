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

_NAME = re.compile(r"\{([a-z_][a-z0-9_]*)\}")
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
        items: the answer is a list of about so many texts of its one field; 0 is one answer. The
            number is a variable, ``{items}``.
        tail: share of a list that is used, from its end: what a model says first it always says.
        one_line: put every text on one line, so that it cannot look like a line of the prompt.
        lines: the answer is a line for each field in place of JSON, ``Name: text``, and ends with
            an empty one. The item ends with the name of the first. What small models keep to.
    """

    instructions: str
    item: str
    shots: tuple[Mapping[str, Any], ...] = ()
    fields: Mapping[str, Field] = field(default_factory=dict)
    labels: Mapping[str, float] = field(default_factory=dict)
    answer: str = ""
    max_tokens: int = 160
    items: int = 0
    tail: float = 1.0
    one_line: bool = False
    lines: bool = False

    def __post_init__(self) -> None:
        require(
            not self.lines or bool(self.fields and not self.items),
            "Only fields that are no list are answered in lines.",
            "leave out lines = true",
        )
        require(
            self.items >= 0 and 0 < self.tail <= 1,
            f"items = {self.items}, tail = {self.tail}: one is out of range.",
            "items is at least 0, tail above 0 and at most 1",
        )
        require(
            not self.items or len(self.fields) == 1,
            "A list has one field, what its texts are.",
            "give one [steps.fields]",
        )
        kinds = [bool(self.fields), bool(self.labels), bool(self.answer)]
        require(sum(kinds) == 1, "A step has fields, or labels, or an answer.", "give one of them")
        for shot in self.shots:
            needed = {*_NAME.findall(self.item), *self.fields, *_NAME.findall(self.answer)}
            needed |= {"label"} if self.labels else set()
            missing = sorted(needed - {"items"} - set(shot))
            require(
                not missing, f"An example lacks {', '.join(missing)}.", "complete [[steps.shots]]"
            )

    def render(self, values: Mapping[str, str]) -> str:
        """The prompt of one item.

        Raises:
            UsageError: a variable of ``item`` has no value.
        """
        parts = [self.instructions.strip()]
        for shot in self.shots:
            # An example has as many items as it shows, not as many as are asked for.
            given = {**shot, "items": len(shot[next(iter(self.fields))])} if self.items else shot
            parts.append(f"{self._fill(self.item, given)} {self._answer(shot)}")
        parts.append(self._fill(self.item, values))
        return "\n\n".join(parts)

    def schema(self, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """JSON schema of the answer; fields whose options differ by item are free in it."""
        list_of = {"type": "array", "items": {"type": "string"}}
        return {
            "type": "object",
            "properties": {
                name: list_of
                if self.items
                else {"type": "string"} | ({"enum": list(options[f.of])} if f.of in options else {})
                for name, f in self.fields.items()
            },
            "required": list(self.fields),
            "additionalProperties": False,
        }

    def _answer(self, shot: Mapping[str, Any]) -> str:
        if self.labels:
            return str(shot["label"])
        if self.items:
            return json.dumps({n: list(shot[n]) for n in self.fields}, ensure_ascii=False)
        if self.lines:
            first, *others = self.fields
            texts = {name: plain(str(shot[name]), one_line=True) for name in self.fields}
            return "\n".join([texts[first], *(f"{title(n)}: {texts[n]}" for n in others)])
        if self.fields:
            return json.dumps({name: str(shot[name]) for name in self.fields}, ensure_ascii=False)
        return self._fill(self.answer, shot)

    def _fill(self, template: str, values: Mapping[str, Any]) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] == "items" and self.items:
                return str(values.get("items", self.items))
            if match[1] not in values:
                raise UsageError(
                    f"The prompt has a variable {{{match[1]}}} without a value; "
                    + nearest(match[1], values)
                )
            return plain(str(values[match[1]]), one_line=self.one_line or self.lines)

        return _NAME.sub(value, template.strip())  # one pass: values are never looked into


@dataclass(frozen=True, kw_only=True)
class Listing(Step):
    """A list that is made before any text is: personas, products ... Its name is its field's.

    Attributes:
        calls: how often it is asked for; entries are joined. A list whose item has the variable of
            an earlier list is asked for once for each entry of that one.
    """

    calls: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.items > 0 and self.calls > 0, "A list needs items and calls.", "set items = 20"
        )

    @property
    def name(self) -> str:
        """The variable that stands for an entry."""
        return next(iter(self.fields))

    @property
    def variables(self) -> list[str]:
        """Names of the variables of its item."""
        return _NAME.findall(self.item)


@dataclass(frozen=True, kw_only=True)
class Label:
    """A class, or a grade of likeness, that texts are written for.

    Attributes:
        share: of the texts; shares are taken by their sum.
        about: what it means, the variable ``{about}``.
        score: of pairs of this grade.
    """

    share: float = 1.0
    about: str = ""
    score: float | None = None

    def __post_init__(self) -> None:
        require(self.share >= 0, f"share = {self.share} is negative.", "give 0 or more")


# The fields of the last step, by the kind of the examples.
_MADE = {
    "retrieval": {"query"},
    "classification": {"text"},
    "sts": {"sentence1", "sentence2"},
}
# What no list or control of such a prompt is called.
_TAKEN = (
    *("label", "about", "items", "text", "sentence1", "sentence2", "prompt", "model", "seed"),
    *("request", "at", "reason", "tokens", "mended", "fit", "grade", "judged", "answer"),
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a prompt file says.

    Attributes:
        name: for provenance.
        kind: of what it writes: ``"retrieval"`` (queries of passages), or, without passages,
            ``"classification"`` or ``"sts"``.
        lists: made before the texts; one entry of each is a variable of a text's steps.
        labels: that texts are written for, ``{label}``, with their shares.
        judge: a step with grades that asks which label a text has.
        steps: questions one after the other; answers of earlier ones are variables of later ones.
        controls: options of variables that are drawn for each item, by name.
        digest: hex BLAKE3 of the content.
    """

    name: str
    steps: tuple[Step, ...]
    controls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    digest: str = ""
    kind: str = "retrieval"
    lists: tuple[Listing, ...] = ()
    labels: Mapping[str, Label] = field(default_factory=dict)
    judge: Step | None = None

    def __post_init__(self) -> None:
        one_of("kind", self.kind, tuple(_MADE))
        require(bool(self.steps), "A prompt has no [[steps]].", "add one")
        for step in self.steps:
            for name, found in step.fields.items():
                if found.of and found.of != "characters":
                    one_of(f"fields.{name}.of", found.of, tuple(self.controls))
        if self.kind == "retrieval":
            require(
                not (self.lists or self.labels or self.judge),
                "Lists, labels and a judge are those of prompts that write labelled texts.",
                'set kind = "classification" or "sts"',
            )
            return
        self._check_labels()

    def _check_labels(self) -> None:
        last, wanted = set(self.steps[-1].fields), _MADE[self.kind]
        require(
            last == wanted,
            f"The last step of a prompt of kind {self.kind!r} has the fields {sorted(last)}.",
            f"give it {' and '.join(sorted(wanted))}",
        )
        require(
            all(not step.items for step in self.steps[:-1]),
            "Only the last step may give a list.",
            "leave items out of the others",
        )
        require(len(self.labels) > 1, "There are less than two labels.", "add [labels.NAME]")
        names = [listing.name for listing in self.lists]
        drawn = [*names, *self.controls]
        require(
            len({*drawn, *_TAKEN}) == len(drawn) + len(_TAKEN),
            f"Lists and controls have names that are taken: {', '.join(drawn)}.",
            f"give each its own, and none of {', '.join(_TAKEN)}",
        )
        scored = all(label.score is not None for label in self.labels.values())
        require(
            self.kind != "sts" or scored, "A grade has no score.", "add score to each [labels.NAME]"
        )
        if self.judge is not None:
            require(
                len(self.judge.labels) > 1
                and (self.kind == "sts" or set(self.judge.labels) == set(self.labels)),
                "The judge's labels are not those of the texts.",
                "give [judge.labels] the names of [labels]",
            )

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


def title(name: str) -> str:
    """How a field is called in an answer of lines."""
    return name.replace("_", " ").capitalize()


def plain(text: str, *, one_line: bool = False) -> str:
    """A text as data: marks of chats and of our own tags become characters that look like them."""
    text = _MARKS.sub(lambda m: _PLAIN[m[0]], text.replace("\x00", ""))
    return " ".join(text.split()) if one_line else text.strip()
