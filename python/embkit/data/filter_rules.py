"""The rules of :func:`embkit.data.filter`: names, formulas, scopes and default bounds.

The statistics are Rust's; here is what is asked of them. docs/filters.md explains each rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embkit import _rust
from embkit.errors import UsageError, nearest

SCOPES = ("query", "passage", "both")
# Rules on shares of characters and words, and those on what repeats, start at these many words.
_FEW, _MANY = 10, 50


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a bound of :class:`FilterRules` means.

    Attributes:
        name: the field of FilterRules.
        statistic: what is bounded (Rust's name). least: values below the bound fail.
        formula: in words. scope: ``"query"``, ``"passage"`` or ``"both"``.
        from_words: ``"least_words"``, ``"least_words_repeated"`` or None: which setting says from
            how many words on the rule applies.
        top: largest sensible bound (1 for shares).
    """

    name: str
    statistic: str
    least: bool
    formula: str
    scope: str = "passage"
    from_words: str | None = "least_words"
    top: float = math.inf


def _rules() -> tuple[Rule, ...]:
    def most(statistic: str, formula: str, **more: Any) -> Rule:
        return Rule(name=f"max_{statistic}", statistic=statistic, least=False, formula=formula,
                    **more)  # fmt: skip

    def least(statistic: str, formula: str, **more: Any) -> Rule:
        return Rule(name=f"min_{statistic}", statistic=statistic, least=True, formula=formula,
                    **more)  # fmt: skip

    size: dict[str, Any] = {"from_words": None, "scope": "both"}
    share: dict[str, Any] = {"top": 1.0}
    again: dict[str, Any] = {"top": 1.0, "from_words": "least_words_repeated"}
    top = "characters in the most frequent word {}-gram, if it occurs twice / characters"
    twice = "characters in word {}-grams that occurred before / characters"
    return (
        least("words", "words", **size),
        most("words", "words", **size),
        least("chars", "characters", **size),
        most("chars", "characters", **size),
        least("mean_word_length", "characters of words / words"),
        most("mean_word_length", "characters of words / words"),
        most("hash_ratio", "'#' / words"),
        most("ellipsis_ratio", "'...' and '…' / words"),
        most("digit_share", "digits / characters", **share),
        least("alphabetic_words", "words with a letter / words", **share),
        most("bullet_lines", "lines that begin with a bullet / lines", **share),
        most("ellipsis_lines", "lines that end with an ellipsis / lines", **share),
        most("duplicate_lines", "lines equal to an earlier one / lines", **again),
        most("duplicate_line_chars", "characters in such lines / characters", **again),
        most("duplicate_paragraphs", "paragraphs equal to an earlier one / paragraphs", **again),
        most("duplicate_paragraph_chars", "characters in such paragraphs / characters", **again),
        *(most(f"top_{n}gram", top.format(n), **again) for n in (2, 3, 4)),
        *(most(f"duplicate_{n}gram", twice.format(n), **again) for n in range(5, 11)),
        most("uppercase_share", "upper-case letters / letters", **share),
        least("stop_words", "of the, be, to, of, and, that, have, with; English texts only",
              from_words="least_words_repeated", top=8.0),
        most("curly_share", "'{' and '}' / characters", **share),
        most("lorem_ipsum", "occurrences of 'lorem ipsum'", from_words=None, scope="both"),
        most("boilerplate_lines", "lines with a phrase of page furniture / lines",
             from_words=None, top=1.0),
    )  # fmt: skip


RULES = _rules()
LANGUAGE = "languages"  # the rule that bit 31 stands for
_LANGUAGE_BIT = 31


@dataclass(frozen=True, kw_only=True)
class FilterRules:
    """Bounds of the rules; None switches one off. The bound itself passes.

    The defaults are for training data of embeddings: what is broken goes, what is only short or
    unlike prose stays. ``FilterRules.preset("gopher")`` has the bounds of Gopher's documents,
    ``"off"`` none at all. docs/filters.md has formula and source of each.

    Attributes:
        least_words: words from which rules on shares of characters, words and lines apply.
        least_words_repeated: ... and rules on repetition and stop words.
        scopes: ``"query"``, ``"passage"`` or ``"both"`` for rules that shall not have their own
            scope. Sentences of sts tasks count as queries, classified texts as passages.

    Raises:
        UsageError: a bound that is no number or out of range, an unknown rule or scope.
    """

    min_words: float | None = None
    max_words: float | None = 100_000
    min_chars: float | None = 2
    max_chars: float | None = None
    min_mean_word_length: float | None = 2.0
    max_mean_word_length: float | None = 20.0
    max_hash_ratio: float | None = 0.2
    max_ellipsis_ratio: float | None = 0.2
    max_digit_share: float | None = 0.5
    min_alphabetic_words: float | None = 0.5
    max_bullet_lines: float | None = None
    max_ellipsis_lines: float | None = None
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_chars: float | None = 0.2
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_chars: float | None = 0.2
    max_top_2gram: float | None = 0.3
    max_top_3gram: float | None = 0.27
    max_top_4gram: float | None = 0.24
    max_duplicate_5gram: float | None = 0.3
    max_duplicate_6gram: float | None = 0.28
    max_duplicate_7gram: float | None = 0.26
    max_duplicate_8gram: float | None = 0.24
    max_duplicate_9gram: float | None = 0.22
    max_duplicate_10gram: float | None = 0.2
    max_uppercase_share: float | None = 0.7
    min_stop_words: float | None = None
    max_curly_share: float | None = 0.05
    max_lorem_ipsum: float | None = 1
    max_boilerplate_lines: float | None = 0.5
    least_words: int = _FEW
    least_words_repeated: int = _MANY
    scopes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rule in RULES:
            value = getattr(self, rule.name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value <= rule.top or not math.isfinite(value):
                top = "" if rule.top == math.inf else f" to {rule.top:g}"
                raise UsageError(
                    f"{rule.name} = {value!r} is out of range.",
                    fix=f"a number from 0{top or ' on'}, or None to switch the rule off",
                )
        for name in ("least_words", "least_words_repeated"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise UsageError(f"{name} = {getattr(self, name)!r} is no number of words.")
        for name, scope in self.scopes.items():
            if name not in _NAMES:
                raise UsageError(f"scopes: unknown rule {name!r}; {nearest(name, _NAMES)}")
            if scope not in SCOPES:
                raise UsageError(f"scopes: unknown scope {scope!r}; {nearest(scope, SCOPES)}")

    @classmethod
    def preset(cls, name: str, settings: Mapping[str, Any] | None = None) -> FilterRules:
        """A preset with some rules set otherwise.

        Args:
            name: ``"default"``, ``"gopher"`` or ``"off"``.
            settings: fields and their values; ``"off"`` (or None) switches a rule off.

        Raises:
            UsageError: unknown preset or rule (names the nearest), or a bad value.
        """
        if name not in PRESETS:
            raise UsageError(f"Unknown preset {name!r}; {nearest(name, PRESETS)}")
        values = dict(PRESETS[name])
        known = [f.name for f in dataclasses.fields(cls)]
        for key, value in (settings or {}).items():
            if key not in known:
                raise UsageError(f"Unknown rule {key!r}; {nearest(key, known)}")
            values[key] = None if key in _NAMES and value == "off" else value
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Every setting, for a stage's parameters."""
        return {**dataclasses.asdict(self), "scopes": dict(sorted(self.scopes.items()))}

    def active(self) -> list[Rule]:
        """The rules that have a bound, in order."""
        return [rule for rule in RULES if getattr(self, rule.name) is not None]

    def scope(self, rule: Rule) -> str:
        """Where a rule applies."""
        return self.scopes.get(rule.name, rule.scope)

    def words(self, rule: Rule) -> int:
        """From how many words on a rule applies."""
        return 0 if rule.from_words is None else int(getattr(self, rule.from_words))

    def checks(self) -> list[tuple[str, bool, float, int]]:
        """The rules as ``_rust.filter_texts`` takes them."""
        return [
            (r.statistic, r.least, float(getattr(self, r.name)), self.words(r))
            for r in self.active()
        ]

    def mask(self, use: str) -> int:
        """Bits of the rules that apply to ``"query"`` or ``"passage"`` texts."""
        bits = 1 << _LANGUAGE_BIT
        for i, rule in enumerate(self.active()):
            if self.scope(rule) in (use, "both"):
                bits |= 1 << i
        return bits


_NAMES = tuple(rule.name for rule in RULES)
_GOPHER: dict[str, Any] = {
    "min_words": 50,
    "max_words": 100_000,
    "min_mean_word_length": 3.0,
    "max_mean_word_length": 10.0,
    "max_hash_ratio": 0.1,
    "max_ellipsis_ratio": 0.1,
    "max_bullet_lines": 0.9,
    "max_ellipsis_lines": 0.3,
    "min_alphabetic_words": 0.8,
    "min_stop_words": 2,
    "max_duplicate_lines": 0.3,
    "max_duplicate_paragraphs": 0.3,
    "max_duplicate_line_chars": 0.2,
    "max_duplicate_paragraph_chars": 0.2,
    "max_top_2gram": 0.2,
    "max_top_3gram": 0.18,
    "max_top_4gram": 0.16,
    **{f"max_duplicate_{n}gram": round(0.15 - 0.01 * (n - 5), 2) for n in range(5, 11)},
}
_OFF: dict[str, Any] = dict.fromkeys(_NAMES)
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "gopher": {
        **_OFF,
        **_GOPHER,
        "least_words": 0,
        "least_words_repeated": 0,
        "scopes": {"min_words": "passage", "max_words": "passage"},
    },
    "off": _OFF,
}

# Pairs of ISO 639-1 and 639-3, for the languages that have both.
_PAIRS = """
af afr ak aka am amh ar ara az aze be bel bg bul bn ben ca cat cs ces cy cym da dan de deu el ell
en eng eo epo es spa et est fa pes fi fin fr fra gu guj he heb hi hin hr hrv hu hun hy hye id ind
it ita ja jpn jv jav ka kat km khm kn kan ko kor la lat lt lit lv lav mk mkd ml mal mr mar my mya
nb nob ne nep nl nld no nob or ori pa pan pl pol pt por ro ron ru rus si sin sk slk sl slv sn sna
sr srp sv swe ta tam te tel th tha tk tuk tl tgl tr tur uk ukr ur urd uz uzb vi vie yi yid zh cmn
zu zul
"""
_WORDS = _PAIRS.split()
_TWO = dict(zip(_WORDS[::2], _WORDS[1::2], strict=True))


def language_codes(languages: Sequence[str] | None) -> list[int]:
    """Numbers of languages given by ISO 639-1 or 639-3 code.

    Raises:
        UsageError: an unknown code, or an empty list.
    """
    if languages is None:
        return []
    if isinstance(languages, str):
        raise UsageError("languages is a list of codes.", fix='write languages=["en", "de"]')
    if not languages:
        raise UsageError("languages is empty: no text would stay.", fix="None for all languages")
    known = _rust.filter_names()[1]
    codes = []
    for language in languages:
        code = _TWO.get(language, language)
        if code not in known[1:]:
            names = sorted({*known[1:], *(k for k, v in _TWO.items() if v in known)})
            raise UsageError(f"Unknown language {language!r}; {nearest(language, names)}")
        codes.append(known.index(code))
    return sorted(set(codes))


def text_statistics(texts: Sequence[str]) -> list[dict[str, float]]:
    """Every statistic of each text, by name: what the rules would see.

    >>> text_statistics(["Two words"])[0]["words"]
    2.0
    """
    if isinstance(texts, str):
        raise UsageError("text_statistics takes a list of texts.")
    encoded = [t.encode() for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.uint64)
    np.cumsum([len(t) for t in encoded], out=offsets[1:])
    shard = (np.frombuffer(b"".join(encoded), np.uint8), offsets)
    names = _rust.filter_names()[0]
    values = _rust.text_statistics([shard], np.arange(len(encoded), dtype=np.uint64))
    return [dict(zip(names, row.tolist(), strict=True)) for row in values.reshape(-1, len(names))]
