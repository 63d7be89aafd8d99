"""Each statistic against a plain Python formula, on texts with everything in them."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter

import numpy as np
import pytest

from embkit import _rust
from embkit.data import FilterRules, text_statistics
from embkit.data.filter_rules import PRESETS, RULES, language_codes
from embkit.errors import UsageError

SPACE = "\t\n\x0b\x0c\r \x85\xa0\u2003\u2028\u3000"
STOP = {"the", "be", "to", "of", "and", "that", "have", "with"}
BULLETS = "•‣◦▪▫■□●○·▶"
WORDS = """
the The THAT, (and) of with. a bc x1 42 Ω½ ... …. .... # {x} C++ -- naïve Straße ЖЗ ы é 北京
日本の文字、 テキスト ภาษา ខ្មែរ 한국어 😀 lorem Lorem ipsum enable JavaScript privacy policy
"""
PIECES = [
    *WORDS.split(), "\x00", "- item", "* item", "• item", "-x", "– y", "Terms of USE",
    "we use cookies", "Lorem Ipsum", " ", "\n", "\n\n", "\r\n", " \t\n", "\u3000", "\u2028",
    "same line twice", "same line twice\n",
]  # fmt: skip


def unspaced(c: str) -> bool:
    o = ord(c)
    ranges = [(0xE00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007),
              (0x3040, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
              (0xF900, 0xFAFF), (0x20000, 0x3FFFF)]  # fmt: skip
    return any(a <= o <= b for a, b in ranges)


def letter(c: str) -> bool:
    # Rust's Alphabetic has marks that are vowels, too: the Khmer ones of PIECES.
    return c.isalpha() or 0x17B6 <= ord(c) <= 0x17C8


def split_words(text: str) -> list[str]:
    words = []
    for run in re.split(f"[{SPACE}]+", text):
        word = ""
        for c in run:
            if unspaced(c):
                words += [word] if word else []
                words.append(c)
                word = ""
            else:
                word += c
        words += [word] if word else []
    return words


def share(a: float, b: float) -> float:
    return a / b if b else 0.0


def naive(text: str) -> dict[str, float]:
    words = split_words(text)
    chars = [c for c in text if c not in SPACE]
    alone = [w for w in words if len(w) == 1 and unspaced(w)]
    spaced = len(words) - len(alone)
    lines = [line.strip(SPACE) for line in text.split("\n")]
    full = [line for line in lines if line]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        paragraphs[-1:] = [paragraphs[-1] + [line]] if line else [paragraphs[-1], []]
    blocks = ["\n".join(p) for p in paragraphs if p]
    size = lambda t: sum(c not in SPACE for c in t)  # noqa: E731
    again = lambda items: [x for i, x in enumerate(items) if x in items[:i]]  # noqa: E731
    letters = [c for c in text if letter(c)]
    short = {w.lower() for w in words if len(w) <= 8}
    bare = {re.sub(r"^[^a-z0-9]+|[^a-z0-9]+$", "", w) for w in short}
    phrases = _rust.filter_names()[2]
    low = re.sub("[A-Z]+", lambda m: m.group().lower(), text)
    bullet = [x for x in full if x[0] in BULLETS or (x[0] in "-*–—" and (x + " ")[1] in SPACE)]
    out = {
        "words": len(words),
        "chars": len(chars),
        "mean_word_length": 6.0 if len(alone) > spaced else share(len(chars) - len(alone), spaced),
        "hash_ratio": share(text.count("#"), len(words)),
        "ellipsis_ratio": share(text.count("...") + text.count("…"), len(words)),
        "digit_share": share(sum(unicodedata.category(c)[0] == "N" for c in text), len(chars)),
        "alphabetic_words": share(sum(any(map(letter, w)) for w in words), len(words))
        if words
        else 1.0,
        "bullet_lines": share(len(bullet), len(full)),
        "ellipsis_lines": share(sum(x.endswith(("...", "…")) for x in full), len(full)),
        "duplicate_lines": share(len(again(full)), len(full)),
        "duplicate_line_chars": share(size("".join(again(full))), len(chars)),
        "duplicate_paragraphs": share(len(again(blocks)), len(blocks)),
        "duplicate_paragraph_chars": share(size("".join(again(blocks))), len(chars)),
        "uppercase_share": share(sum(c.isupper() for c in text), len(letters)),
        "stop_words": len(STOP & bare),
        "curly_share": share(text.count("{") + text.count("}"), len(chars)),
        "lorem_ipsum": low.count(phrases[0]),
        "boilerplate_lines": share(
            sum(any(p in x for p in phrases[1:]) for x in low.split("\n")), len(full)
        ),
    }
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        count = Counter(grams)
        if n <= 4:
            most = max(count.values(), default=0)
            best = max((most * size("".join(g)) for g in grams if count[g] == most), default=0)
            out[f"top_{n}gram"] = min(share(best, len(chars)), 1.0) if most > 1 else 0.0
        else:
            seen, covered = set(), set()
            for i, gram in enumerate(grams):
                if gram in seen:
                    covered |= set(range(i, i + n))
                seen.add(gram)
            out[f"duplicate_{n}gram"] = share(sum(len(words[i]) for i in covered), len(chars))
    return out


def random_text(rng: random.Random) -> str:
    pieces = rng.sample(PIECES, rng.randint(1, 12))  # few, so that much repeats
    glue = rng.choice([" ", " ", "", "\n"])
    return glue.join(rng.choice(pieces) for _ in range(rng.choice([0, 1, 3, 10, 40, 150])))


def test_statistics_equal_the_plain_formulas() -> None:
    rng = random.Random(0)
    texts = ["", " \n", "\x00\x00", "a" * 3000, ". " * 40, *(random_text(rng) for _ in range(400))]
    for text, found in zip(texts, text_statistics(texts), strict=True):
        want = naive(text)
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert found[name] == pytest.approx(value, abs=1e-12), (name, text)


def test_a_line_of_five_megabytes() -> None:
    """One word of 5 MB, and a million words: beyond 2^20 words repetition is not looked at."""
    long, many, cjk = "x" * 5_000_000, "ab " * 1_700_000, "文字" * 800_000
    one, two, three = text_statistics([long, many, cjk])
    assert (one["words"], one["chars"], one["mean_word_length"]) == (1, 5e6, 5e6)
    assert two["words"] == 1_700_000 and two["top_2gram"] == 1.0
    assert two["duplicate_10gram"] == pytest.approx(1, abs=1e-4)
    assert three["words"] == three["chars"] == 1_600_000 and three["top_2gram"] == 1.0


def shard(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    encoded = [t.encode() for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.uint64)
    np.cumsum([len(t) for t in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


@pytest.mark.promise
def test_bits_are_the_bounds_for_any_number_of_threads() -> None:
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(1500)]
    rules = FilterRules.preset(
        "gopher", {"min_words": 5, "least_words": 3, "min_stop_words": "off"}
    )
    found = [_rust.filter_texts([shard(texts)], rules.checks(), threads=t)[0] for t in (1, 2, 7)]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    for bits, values in zip(found[0].tolist(), text_statistics(texts), strict=True):
        for i, rule in enumerate(rules.active()):
            value, bound = values[rule.statistic], getattr(rules, rule.name)
            fails = value < bound if rule.least else value > bound
            assert bool(bits >> i & 1) == (fails and values["words"] >= rules.words(rule))
    assert len(set(found[0].tolist())) > 20


def test_stop_words_are_for_english_and_languages_for_what_is_clear() -> None:
    texts = [
        "Gute Filme brauchen keine teuren Kulissen, sondern Menschen, die etwas zu sagen haben.",
        "Il était une fois une petite fille de village, la plus jolie que l'on eût su voir.",
        "English words without any: this sentence was written because somebody wanted something "
        "where common little words never appear, although people usually write them everywhere.",
        "text editor",
        "東京は日本の首都です",
    ]
    bits, language = _rust.filter_texts([shard(texts)], [("stop_words", True, 2, 0)], detect=True)
    names = _rust.filter_names()[1]
    assert [names[c] for c in language.tolist()] == ["deu", "fra", "eng", "und", "jpn"]
    assert bits.tolist() == [0, 0, 1, 0, 0]
    bits, _ = _rust.filter_texts([shard(texts)], [], language_codes(["de", "jpn"]))
    assert [b >> 31 for b in bits.tolist()] == [0, 1, 1, 0, 0]  # "text editor" is not clear


def test_every_rule_has_a_statistic_and_every_preset_is_sound() -> None:
    assert {rule.statistic for rule in RULES} == set(_rust.filter_names()[0])
    for name in PRESETS:
        assert len(FilterRules.preset(name).active()) <= 31
    assert FilterRules.preset("off").active() == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_digit_shar": 1}, "did you mean 'max_digit_share'"),
        ({"max_digit_share": 1.5}, "out of range"),
        ({"max_digit_share": -0.1}, "out of range"),
        ({"max_words": float("nan")}, "out of range"),
        ({"max_words": "many"}, "out of range"),
        ({"least_words": -1}, "least_words"),
        ({"scopes": {"max_words": "querry"}}, "did you mean 'query'"),
        ({"scopes": {"max_word": "query"}}, "did you mean 'max_words'"),
    ],
)
def test_bad_rules_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        FilterRules.preset("default", settings)


def test_bad_presets_and_languages_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'gopher'"):
        FilterRules.preset("goper")
    with pytest.raises(UsageError, match="Unknown language 'xx'"):
        language_codes(["en", "xx"])
    with pytest.raises(UsageError, match="list of codes"):
        language_codes("en")
    with pytest.raises(UsageError, match="no text would stay"):
        language_codes([])
    with pytest.raises(UsageError, match="No statistic"):
        _rust.filter_texts([shard(["a"])], [("nonsense", True, 1, 0)])
    with pytest.raises(UsageError, match="32 rules"):
        _rust.filter_texts([shard(["a"])], [("words", True, 1, 0)] * 32)
