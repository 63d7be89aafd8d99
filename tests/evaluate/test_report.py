"""The report: numbers only from the result, self-contained, safe with any text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_scores import scores

from embkit.report import table, write_report
from embkit.report.charts import Line, line_chart, nice_ticks, smooth

EVIL = '<script>alert("x")</script>'


@pytest.fixture
def result() -> dict[str, Any]:
    models = {
        "untrained": scores(11.13, bm25=True),
        "pre-finetuned": scores(52.31),
        "fine-tuned 0": scores(57.77),
        "soup, greedy": scores(61.93),
    }
    samples = [{"query": EVIL, "positive": "p & q", "positive_score": 0.5, "negatives": []}]
    return {
        "recipe": "quickstart",
        "dims": [128, 32],
        "scores": {"dev": models, "test": {k: v for k, v in models.items() if k != "untrained"}},
        "soup": {
            "greedy": {
                "candidates": [{"run": "ft-0", "dev": 57.5}, {"run": "ft-1", "dev": 56.25}],
                "steps": [{"run": "ft-1", "dev": 58.125, "kept": True}],
                "uniform": {"dev": 58.125},
                "kept": ["ft-0", "ft-1"],
                "dev": 58.125,
            }
        },
        "dedup": {
            "texts": {"before": 1234, "duplicates": 56},
            "clusters": {
                "count": 7,
                "largest": [
                    {"size": 3, "representative": EVIL, "members": [{"text": "t", "similarity": 1}]}
                ],
            },
            "examples": {"facts": {"before": 99, "leaked": 3, "after": 90}},
            "leaks": {"texts": 4, "exact": 1, "near": 1, "span": 2,
                      "spans": [{"span": EVIL, "overlap": 0.5, "evaluation": "e"}]},
        },
        "mine": {
            "tasks": {
                "facts": {"kept": 8, "examples": 4, "audit": {"percent": 31}, "samples": samples,
                          "mean_positive_score": 0.75, "mean_negative_score": None}
            }
        },
        "export": {"max_abs_difference": 1.5e-7, "limit": 2e-6},
    }  # fmt: skip


@pytest.fixture
def asked() -> dict[str, Any]:
    """Reports of the stages that ask a language model; all texts, and its name, are not trusted."""
    prompt = {"name": EVIL, "digest": "d"}
    wrote = {
        "items": 1250, "kept": 1201, "dropped": {"not_json": 40, "copy": 9}, "mended": 17,
        "prompt_tokens": 123456, "completion_tokens": 7890, "prompt": prompt, "model": EVIL,
        "samples": {"not_json": [{"passage": EVIL, "answer": EVIL}]},
    }  # fmt: skip
    labels = {EVIL: {"wanted": 0.25, "fit": 3, "kept": 2, "share": 0.325}}
    judged = {
        "model": EVIL, "pairs": 4321, "ungraded": 12,
        "agreement": {"pairs": 4309, "same_decision": 0.911, "kappa": 0.734, "mean_difference": 1},
        "tasks": {EVIL: {"before": 4100, "after": 3999, "weak_positives": 101,
                         "strong_negatives": 77, "samples": {
            "positives": [{"query": EVIL, "passage": EVIL, "grade": 0.125}], "negatives": []}}},
    }  # fmt: skip
    ranked = {
        "examples": 3999, "judged": 3990, "unjudged": 9, "best_is_not_seed": 613,
        "share_best_is_not_seed": 0.153634, "candidates": 79980,
        "rejected_candidates": {"shape": 8}, "seed_rank_mean": 1.875, "seed_mrr": None,
        "negatives": 3988,
    }  # fmt: skip
    return {
        "synth": {EVIL: wrote, "moods": {**wrote, "labels": labels, "dropped": {}}},
        "judge": judged,
        "relabel": {"model": EVIL, "tasks": {EVIL: ranked},
                    "samples": [{"task": EVIL, "query": EVIL, "seed": EVIL, "best": EVIL}]},
    }  # fmt: skip


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    rows = [{"step": i, "task": "facts", "loss": 5 / (i + 1)} for i in range(1, 1001)]
    torn = '{"step": 1001, "lo'
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    return path


class Balanced(HTMLParser):
    """Fails on a tag that is closed in the wrong order; collects text and outside references."""

    void = {"meta", "br", "img", "link", "line", "circle", "polyline"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_needs_nothing(result: dict[str, Any], log: Path) -> None:
    page = write_report(result, logs={"ft-0": log}, settings="lr = 0.1", seconds={"read": 61.0})
    parser = parse(page)
    assert parser.links == []
    assert "script" not in parser.seen
    assert not re.search(r"https?://|url\(|@import", page)
    text = " ".join(parser.words)
    assert EVIL in text  # as text, not as a tag
    assert "lr = 0.1" in text and "1 min 1 s" in text
    assert parser.seen.count("svg") >= 5  # widths and stages of two splits, one loss


def test_every_score_is_in_the_page(result: dict[str, Any]) -> None:
    text = " ".join(parse(write_report(result)).words)
    for split in result["scores"].values():
        for model in split.values():
            for width in ("128", "32"):
                assert f"{model['mean'][width]:.2f}" in text
            for kind in model["types"]:
                assert f"{model['types'][kind]['128']:.2f}" in text
    for number in ("83.91", "57.50", "58.12", "1,234", "1.5e-07", "0.750"):
        assert number in text


def test_what_a_language_model_did_is_in_the_page_and_cannot_leave_its_cells(
    result: dict[str, Any], asked: dict[str, Any]
) -> None:
    counts = {"requests": 5150, "cached": 21, "prompt_tokens": 234567, "completion_tokens": 8901,
              "retries": {"timeout": 3, "rate": 2}, "rejected": {"empty": 1}}  # fmt: skip
    page = write_report({**result, **asked}, usage={"synth": counts})
    parser = parse(page)
    assert "script" not in parser.seen and parser.links == []
    text = " ".join(parser.words)
    assert text.count(EVIL) > 15
    for number in (
        *("1,250 items", "1,201 kept", "17 had", "123,456 tokens read", "7,890 written", "3.2%"),
        *("not_json", "32.5%", "25.0%", "4,321 pairs", "12 it could not", "91.1%", "0.734"),
        *("3,999", "101", "77", "0.12", "613", "15.4%", "1.875", "8 x shape", "3,988"),
        *("5,150", "21", "234,567", "8,901", "2 x rate, 3 x timeout", "1 x empty"),
    ):
        assert number in text, number
    # Without files of counts, and without the stages.
    assert "234,567" not in write_report({**result, **asked})
    assert "Language model" not in write_report(result, usage={"synth": counts})


def test_a_bare_result_is_enough(result: dict[str, Any]) -> None:
    bare = {k: result[k] for k in ("recipe", "dims", "scores")}
    parse(write_report(bare))
    parse(write_report({**bare, "export": {"max_abs_difference": None}}))


def test_the_text_table_has_every_model_and_width(result: dict[str, Any]) -> None:
    text = table(result)
    first = text.split("\n\n")[0].splitlines()
    assert first[0].split()[:5] == ["test", "mean", "@128", "mean", "@32"]
    assert [line.split("  ")[0] for line in first[1:]] == [
        "pre-finetuned",
        "fine-tuned 0",
        "soup, greedy",
    ]
    dev = text.split("\n\n")[1].splitlines()
    assert dev[-1].startswith("BM25") and "83.91" in dev[-1]
    assert len({len(line) for line in first[1:]}) == 1  # columns line up


def test_ticks_are_round_and_cover() -> None:
    for low, high in ((0, 1), (3.2, 3.3), (-12, 61.9), (0.0001, 0.00035), (5, 5), (0, 0)):
        ticks = nice_ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high
        assert 3 <= len(ticks) <= 12
        steps = {round(b - a, 12) for a, b in zip(ticks[:-1], ticks[1:], strict=True)}
        assert len(steps) == 1


def test_smoothing_is_a_running_mean() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    for span in (1, 2, 3, 10):
        want = [
            sum(values[max(0, i + 1 - span) : i + 1]) / min(i + 1, span) for i in range(len(values))
        ]
        assert smooth(values, span=span) == pytest.approx(want)


def test_a_chart_survives_odd_data() -> None:
    nan = float("nan")
    parse(line_chart([Line(name="a", x=[1], y=[2], color="red", points=True)],
                     x_label="x", y_label="y"))  # fmt: skip
    parse(line_chart([Line(name=EVIL, x=[1, 2], y=[nan, 3], color="red", points=True)],
                     x_label=EVIL, y_label="y", log_x=True, x_ticks=[(1, "1")]))  # fmt: skip
    assert "no data" in line_chart(
        [Line(name="a", x=[1], y=[nan], color="red")], x_label="x", y_label="y"
    )
