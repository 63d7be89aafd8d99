"""The filter stage: golden counts, what becomes of examples, the score filter, its promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import DEMO

from embkit import container, data
from embkit.data import FilterRules, Records, ScoreFilter
from embkit.errors import UsageError

from .test_records import content, files

Write = Callable[[str, list[dict[str, Any]]], Path]
PASSAGE = (
    "The quick brown fox jumps over the lazy dog while seventeen curious children watch quietly."
)
DIGITS = "12 34 56 78 90 12 34 56 78 90 11 1"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Records:
    sources = sorted(str(p) for p in (DEMO / "train").iterdir())
    return data.read(sources).save(tmp_path_factory.mktemp("demo") / "records")


GOLDEN: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "default": (
        {
            "max_top_2gram": 2,
            "max_top_3gram": 2,
            "max_top_4gram": 5,
            "max_duplicate_5gram": 4,
            "max_duplicate_6gram": 3,
            "max_duplicate_7gram": 3,
            "max_duplicate_8gram": 3,
            "max_duplicate_9gram": 2,
            "max_duplicate_10gram": 3,
            "max_curly_share": 1,
        },
        {"classification": 3584, "retrieval": 27989, "sts": 11996},
    ),
    "gopher": (
        {
            "min_words": 22281,
            "max_mean_word_length": 41,
            "max_hash_ratio": 5,
            "max_ellipsis_ratio": 1,
            "min_alphabetic_words": 113,
            "max_bullet_lines": 1,
            "max_ellipsis_lines": 20,
            "max_top_2gram": 198,
            "max_top_3gram": 293,
            "max_top_4gram": 259,
            "max_duplicate_5gram": 47,
            "max_duplicate_6gram": 41,
            "max_duplicate_7gram": 25,
            "max_duplicate_8gram": 19,
            "max_duplicate_9gram": 16,
            "max_duplicate_10gram": 11,
            "min_stop_words": 2379,
        },
        {"classification": 0, "retrieval": 8737, "sts": 11996},
    ),
}


@pytest.mark.parametrize("preset", ["default", "gopher"])
def test_golden_counts_on_the_demo_corpus(demo: Records, tmp_path: Path, preset: str) -> None:
    """docs/filters.md prints these: texts that fail each rule, and examples that pass."""
    done = data.filter(demo, out=tmp_path / "out", rules=preset)
    failing = {r["rule"]: r["texts"] for r in done.report["rules"] if r["texts"]}
    passing = {task: counts["after"] for task, counts in done.report["examples"].items()}
    assert (failing, passing) == GOLDEN[preset]
    page = (DEMO.parents[3] / "docs" / "filters.md").read_text()
    for rule, texts in failing.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{rule}`"))
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[{"default": -3, "gopher": -2}[preset]] == f"{texts:,}", rule


@pytest.fixture
def mixed(write: Write) -> Path:
    good = PASSAGE.replace("fox", "cat")
    rows = [
        {"query": "a fox", "positive": [PASSAGE, DIGITS], "negative": [DIGITS + "2", good]},
        {"query": "numbers", "positive": DIGITS},
        {"query": DIGITS, "positive": good},  # a rule for passages does not hit a query
        {"query": "x", "positive": good},  # one character
        {"query": "both", "positive": [DIGITS, DIGITS + "3"]},
    ]
    write("train/pairs.jsonl", rows)
    write("train/alike.jsonl", [{"sentence1": DIGITS, "sentence2": PASSAGE, "score": 1}] * 2)
    write("train/classes.jsonl", [{"text": DIGITS, "label": "a"}, {"text": good, "label": "b"}])
    return write("train/pairs.jsonl", rows).parent


def test_what_becomes_of_examples(mixed: Path, tmp_path: Path) -> None:
    done = data.filter(data.read(mixed), out=tmp_path / "out")
    found = content(done)
    assert [(q, p, n) for q, p, n, *_ in found["pairs"]] == [
        ("a fox", [PASSAGE], [PASSAGE.replace("fox", "cat")]),
        (DIGITS, [PASSAGE.replace("fox", "cat")], []),
    ]
    assert len(found["alike"]) == 2  # sentences are judged as queries are
    assert [row[0] for row in found["classes"]] == [PASSAGE.replace("fox", "cat")]
    report = done.report
    assert report["examples"]["pairs"] == {
        "before": 5, "query": 1, "positives": 2, "score": 0, "dropped_positives": 1,
        "dropped_negatives": 1, "after": 2,
    }  # fmt: skip
    by_rule = {r["rule"]: r for r in report["rules"]}
    digits = by_rule["max_digit_share"]
    assert digits["texts"] == 3 and digits["threshold"] == 0.5
    assert digits["examples"] == {"pairs": 2, "alike": 0, "classes": 1}
    assert digits["samples"][0] == {"text": DIGITS, "value": 1.0}
    assert by_rule["min_chars"]["examples"]["pairs"] == 1
    assert len(done.texts) == len(set(done.texts)) == report["texts"]["after"]


def test_scopes_and_bounds_can_be_set(mixed: Path, tmp_path: Path) -> None:
    rules = FilterRules.preset("off", {
        "max_digit_share": 0.5, "scopes": {"max_digit_share": "query"},
    })  # fmt: skip
    done = data.filter(data.read(mixed), out=tmp_path / "out", rules=rules)
    assert {t: c["after"] for t, c in done.report["examples"].items()} == {
        "alike": 0, "classes": 2, "pairs": 4,
    }  # fmt: skip
    off = data.filter(data.read(mixed), out=tmp_path / "off", rules="off")
    assert content(off) == content(data.read(mixed).save(tmp_path / "all"))


def test_languages_keep_what_is_not_clear(write: Write, tmp_path: Path) -> None:
    german = "Gute Filme brauchen keine teuren Kulissen, sondern Menschen, die etwas sagen."
    rows = [{"query": "editor", "positive": PASSAGE}, {"query": "film", "positive": german}]
    done = data.filter(write("a.jsonl", rows), out=tmp_path / "out", languages=["en"])
    assert [row[0] for row in content(done)["a"]] == ["editor"]
    assert done.report["languages"]["deu"] == 1
    rule = done.report["rules"][-1]
    assert (rule["rule"], rule["threshold"]) == ("languages", ["eng"])
    assert rule["samples"] == [{"text": german, "value": "deu"}]


def test_mark_changes_nothing_but_says_what_would_go(mixed: Path, tmp_path: Path) -> None:
    records = data.read(mixed).save(tmp_path / "records")
    mark = data.filter(records, out=tmp_path / "mark", action="mark")
    drop = data.filter(records, out=tmp_path / "drop")
    assert content(mark) == content(records)
    assert mark.report["examples"] == drop.report["examples"]
    tables = [container.load(x.dir / "filters.safetensors") for x in (mark, drop)]
    for name in ("text_id", "failed_query", "failed_passage", "language"):
        np.testing.assert_array_equal(tables[0][name], tables[1][name])
    np.testing.assert_array_equal(tables[0]["text_id"], records.texts.text_id)
    assert container.metadata(mark.dir / "filters.safetensors")["rules"].split()[0] == "max_words"
    # What is clean stays as it is.
    assert content(data.filter(drop, out=tmp_path / "again")) == content(drop)


@pytest.mark.promise
def test_same_bytes_for_any_threads_and_a_second_run_is_free(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = data.read(mixed).save(tmp_path / "records")
    found = []
    for threads in ("1", "2", "7"):
        monkeypatch.setenv("EMBKIT_THREADS", threads)
        found.append(files(data.filter(records, out=tmp_path / threads, languages=["en"]).dir))
    assert found[0] == found[1] == found[2]
    stamp = (tmp_path / "1" / "manifest.json").stat().st_mtime_ns
    data.filter(records, out=tmp_path / "1", languages=["eng"])  # the same language
    assert (tmp_path / "1" / "manifest.json").stat().st_mtime_ns == stamp
    data.filter(records, out=tmp_path / "1", languages=["en"], fresh=True)
    assert (tmp_path / "1" / "manifest.json").stat().st_mtime_ns != stamp


def test_wrong_arguments(mixed: Path, tmp_path: Path) -> None:
    source = data.read(mixed)
    for options, says in (
        ({"action": "dropp"}, "did you mean 'drop'"),
        ({"rules": "gofer"}, "Unknown preset"),
        ({"languages": ["english"]}, "Unknown language"),
    ):
        with pytest.raises(UsageError, match=says):
            data.filter(source, out=tmp_path / "x", **options)
    with pytest.raises(UsageError, match="no cosine"):
        ScoreFilter(model="m", threshold=2)
    with pytest.raises(UsageError, match="unknown role"):
        ScoreFilter(model="m", prompts={"querry": ""})
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- score filter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model whose cosines spread, in the sentence-transformers layout."""
    import torch
    from tokenizers import Tokenizer

    from embkit.data.vocabulary import train_wordpiece
    from embkit.model import Encoder
    from embkit.recipe import Model

    vocabulary = Tokenizer.from_str(train_wordpiece([PASSAGE] * 3, vocab_size=120))
    sizes = Model(hidden=24, layers=1, heads=2, intermediate=32, dims=(20, 8))
    encoder = Encoder.from_config(
        sizes, vocabulary, max_length={"query": 32, "passage": 32},
        prompts={"query": "fox: ", "passage": ""},
    )  # fmt: skip
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    path = tmp_path_factory.mktemp("model") / "m"
    encoder.export(path)
    return path


@pytest.fixture
def pairs(demo: Records, tmp_path: Path) -> Records:
    """A few of the demo's pairs, some with two positives, and the other kinds of tasks."""
    found = content(demo)
    rows = [
        {"query": q, "positive": [*p, found["retrieval"][i + 1][1][0]][: 1 + i % 2]}
        for i, (q, p, *_) in enumerate(found["retrieval"][:60])
    ]
    (tmp_path / "t").mkdir()
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "t" / "pairs.jsonl").write_text("".join(lines))
    sts = [{"sentence1": a, "sentence2": b[0], "score": s} for a, b, _, s, _ in found["sts"][:9]]
    (tmp_path / "t" / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sts))
    return data.read(tmp_path / "t").save(tmp_path / "records")


@pytest.mark.parametrize("prompts", [None, {"query": "", "passage": "dog: "}])
def test_scores_are_those_of_sentence_transformers(
    pairs: Records, model: Path, tmp_path: Path, prompts: dict[str, str] | None
) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(model), device="cpu")
    before = content(pairs)
    used = prompts or {"query": "fox: ", "passage": ""}
    want = []
    for query, positives, *_ in before["pairs"]:
        q = theirs.encode([query], prompt=used["query"], normalize_embeddings=True)
        p = theirs.encode(positives, prompt=used["passage"], normalize_embeddings=True)
        want.append((p @ q[0]).tolist())
    flat = np.array([c for row in want for c in row])
    threshold = float(np.median(flat))
    score = ScoreFilter(model=model, threshold=threshold, prompts=prompts)
    done = data.filter(pairs, out=tmp_path / "out", rules="off", score=score)
    table = container.load(done.dir / "scores-pairs.safetensors")
    np.testing.assert_allclose(table["score"], flat, atol=2e-6)
    kept = [
        (query, [p for p, c in zip(positives, row, strict=True) if c >= threshold])
        for (query, positives, *_), row in zip(before["pairs"], want, strict=True)
    ]
    assert [(q, p) for q, p, *_ in content(done)["pairs"]] == [(q, p) for q, p in kept if p]
    assert content(done)["sts"] == before["sts"]  # a low score is right there
    report = done.report["score"]
    assert report["pairs"] == len(flat) == sum(report["histogram"]["counts"])
    assert report["dropped"] == int((flat < threshold).sum())
    assert report["samples"][0]["score"] == pytest.approx(flat.min(), abs=1e-3)
    assert done.report["examples"]["pairs"]["score"] == len(kept) - sum(bool(p) for _, p in kept)
    assert not (done.dir / "embeddings").exists()


def test_finished_blocks_survive_a_kill(
    pairs: Records, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embkit.data import embeddings
    from embkit.model import Encoder

    monkeypatch.setattr(embeddings, "BLOCK", 16)
    score = ScoreFilter(model=Encoder.from_pretrained(model), threshold=0.0)
    whole = data.filter(pairs, out=tmp_path / "whole", score=score, rules="off")
    calls, real = [], Encoder.encode

    def dies(self: Any, texts: list[str], **options: Any) -> Any:
        calls.append(len(texts))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, texts, **options)

    monkeypatch.setattr(Encoder, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        data.filter(pairs, out=tmp_path / "out", score=score, rules="off")
    first = sum(calls[:4])
    done = data.filter(pairs, out=tmp_path / "out", score=score, rules="off")
    total = done.report["score"]["embedded"]
    assert sum(calls[5:]) == total - first // 16 * 16  # only the unfinished block again
    assert files(done.dir) == files(whole.dir)


def test_the_verb_filters(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from embkit.cli import app

    sources = [str(p) for p in sorted(mixed.iterdir())]
    words = ["filter", *sources, "--out", str(tmp_path / "out"), "--set", "min_chars=off"]
    done = CliRunner().invoke(app, [*words, "--languages", "en,de"])
    assert done.exit_code == 0, done.output
    assert "pairs: 5 examples, 3 pass" in done.output
    wrong = CliRunner().invoke(app, [*words[:-1], "max_digit=1"])
    assert isinstance(wrong.exception, UsageError) and "did you mean" in str(wrong.exception)


def test_a_recipe_can_switch_the_stage_on(tiny_recipe: Callable[..., Any]) -> None:
    from embkit import pipeline

    assert "filter" not in pipeline.stages_of(tiny_recipe())
    chosen = tiny_recipe(
        "filter.enabled=true", "filter.preset=gopher", "filter.rules={min_words = 3}",
        'filter.languages=["en"]', "filter.score_model=m", "filter.min_score=0.3",
    )  # fmt: skip
    assert pipeline.stages_of(chosen)[1:4] == ("dedup", "filter", "tokenize")
    options = pipeline.filter_options(chosen)
    assert options["rules"] == FilterRules.preset("gopher", {"min_words": 3})
    assert options["score"] == ScoreFilter(model="m", threshold=0.3)
    with pytest.raises(UsageError, match="did you mean 'drop'"):
        tiny_recipe("filter.action=drp")
