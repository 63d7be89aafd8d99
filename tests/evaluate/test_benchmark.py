"""`evaluate_tasks`: mteb's numbers, from one encode, with intervals, leaks and a second model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import every_kind
import numpy as np
import pytest
from scipy.stats import spearmanr
from small import full_count

from embkit.errors import UsageError
from embkit.evaluate import evaluate_tasks, leaked_texts, metrics
from embkit.evaluate.kinds import KINDS, load_all, texts_of
from embkit.evaluate.local import as_task
from embkit.evaluate.run import score_set
from embkit.evaluate.table import table
from embkit.evaluate.vectors import TextVectors, quantised
from embkit.evaluate.words import _names as names_of
from embkit.evaluate.words import evaluate as run_words

mteb = pytest.importorskip("mteb")

DIMS = [20, 5]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind.make(tmp_path_factory.mktemp("kinds") / "test")


@pytest.fixture(scope="session")
def made(encoder: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All kinds at two widths, with files, and the directory."""
    root = tmp_path_factory.mktemp("made")
    result = evaluate_tasks(
        encoder, [folder], name="some/model", dims=DIMS, resamples=20, cache=root / "cache",
        out=root / "out",
    )  # fmt: skip
    return result, root


def test_every_kind_has_a_score_and_an_interval(made: Any) -> None:
    """An interval is there only where examples.py gives mteb's own score."""
    result, _ = made
    assert {of["type"] for of in result["tasks"].values()} == set(KINDS)
    for of in result["tasks"].values():
        for width in DIMS:
            cell = of["scores"][str(width)]["float"]
            assert cell["low"] < cell["high"]
            assert cell["low"] - 5 < cell["score"] < cell["high"] + 5
        assert of["scores"]["20"]["float"]["score"] != of["scores"]["5"]["float"]["score"]
    means = [result["types"][kind]["20"]["float"] for kind in KINDS]
    assert result["mean"]["20"]["float"] == pytest.approx(np.mean(means))
    page = (made[1] / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    for of in result["tasks"].values():
        assert f"{of['scores']['5']['float']['high']:.2f}]</td>" in page
    shown = table(result)
    assert "retrieval-small" in shown and "mean over types" in shown


def test_files_are_what_mteb_writes_and_loads(made: Any) -> None:
    result, root = made
    files = sorted((root / "out" / "results").rglob("*-small.json"))
    assert len(files) == len(KINDS) * len(DIMS)
    whole = root / "out" / "results" / "some__model"
    for path in whole.rglob("*-small.json"):
        loaded = mteb.TaskResult.from_disk(path)
        score = result["tasks"][loaded.task_name]["scores"]["20"]["float"]["score"]
        assert 100 * loaded.get_score() == pytest.approx(score, abs=1e-3)
    assert (root / "out" / "results" / "some__model-5-float").is_dir()
    meta = json.loads(next(whole.rglob("model_meta.json")).read_text())
    assert meta["name"] == "some/model" and meta["embed_dim"] == 20


def test_each_text_is_encoded_once_and_never_again(
    encoder: Any, folder: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, root = made
    asked: set[tuple[Any, Any, str]] = set()
    real = TextVectors.get

    def get(self: Any, texts: Any, *, role: Any, prompt: Any) -> Any:
        asked.update((role, prompt, text) for text in texts)
        return real(self, texts, role=role, prompt=prompt)

    monkeypatch.setattr(TextVectors, "get", get)
    monkeypatch.setattr(type(encoder), "encode", lambda *_, **__: pytest.fail("encoded again"))
    again = evaluate_tasks(
        encoder, [folder], dims=[12], precisions=["binary"], resamples=0, cache=root / "cache"
    )
    assert again["encoded"] == {"embkit/model": 0}
    assert result["encoded"] == {"some/model": len(asked)}
    assert "low" not in again["tasks"]["sts-small"]["scores"]["12"]["binary"]


def test_dev_measures_equal_those_of_mteb(encoder: Any, folder: Path, made: Any) -> None:
    """On the same vectors. The probe of `accuracy` draws other examples than mteb's."""
    result, _ = made
    sets = {one.type: one for one in load_all(folder)}
    for width in DIMS:
        cells = {k: result["tasks"][f"{k}-small"]["scores"][str(width)]["float"] for k in sets}
        found, vectors = sets["retrieval"], TextVectors(encoder)
        parts = [
            quantised(vectors.get(texts, role=role, prompt=None), width, "float")
            for texts, role in ((found.queries, "query"), (found.corpus, "passage"))
        ]
        got = score_set(found, parts)
        assert got["ndcg@10"] == pytest.approx(cells["retrieval"]["score"], abs=1e-3)
        found = sets["sts"]
        parts = [
            quantised(vectors.get(texts, role=None, prompt=None), width, "float")
            for texts in (found.first, found.second)
        ]
        assert score_set(found, parts)["spearman"] == pytest.approx(cells["sts"]["score"], abs=0.05)


def test_dev_probe_equals_that_of_mteb_on_its_draws(
    encoder: Any, folder: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = made
    found = next(one for one in load_all(folder) if one.type == "classification")
    order, drawn = list(range(len(found.train))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        taken = [
            i
            for at, i in enumerate(order)
            if sum(found.train_label[j] == found.train_label[i] for j in order[:at]) < 8
        ]
        drawn.append(np.array(taken))
    monkeypatch.setattr(metrics, "draws", lambda labels: drawn)
    vectors = TextVectors(encoder)
    parts = [
        quantised(vectors.get(texts, role=None, prompt=None), 20, "float")
        for texts in (found.train, found.test)
    ]
    want = result["tasks"]["classification-small"]["scores"]["20"]["float"]["score"]
    assert score_set(found, parts)["accuracy"] == pytest.approx(want, abs=1e-6)


def test_a_task_of_mteb_by_its_name(
    encoder: Any, folder: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STSBenchmark by name, its data taken from here: nothing is fetched in a test."""
    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (folder / "sts" / "small.jsonl").read_text().splitlines()]

    def load(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = DatasetDict({"test": Dataset.from_list(rows)}), True

    monkeypatch.setattr(type(mteb.get_task("STSBenchmark")), "load_data", load)
    got = evaluate_tasks(encoder, ["STSBenchmark"], dims=[20], resamples=10)
    cell = got["tasks"]["STSBenchmark"]["scores"]["20"]["float"]
    want = made[0]["tasks"]["sts-small"]["scores"]["20"]["float"]
    assert cell["score"] == pytest.approx(want["score"], abs=1e-9)
    assert got["tasks"]["STSBenchmark"]["type"] == "sts"


def test_a_task_of_several_languages_is_their_mean(encoder: Any, folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [json.loads(line) for line in (folder / "sts" / "small.jsonl").read_text().splitlines()]
    parts = {"en-en": rows[:35], "es-es": rows[35:]}
    task = mteb.get_task("STS17", hf_subsets=list(parts))
    task.dataset = {
        name: DatasetDict({"test": Dataset.from_list(part)}) for name, part in parts.items()
    }
    task.data_loaded = True
    got = evaluate_tasks(encoder, [task], dims=[20], resamples=10)["tasks"]["STS17"]
    cell = got["scores"]["20"]["float"]
    each = []
    for part in parts.values():
        a, b = (encoder.encode([r[c] for r in part]) for c in ("sentence1", "sentence2"))
        each.append(100 * spearmanr((a * b).sum(1), [r["score"] for r in part]).statistic)
    assert cell["score"] == pytest.approx(np.mean(each), abs=0.1)
    assert got["examples"] == len(rows)
    assert cell["low"] < cell["score"] < cell["high"]


def test_a_measure_that_is_not_known_has_no_interval(encoder: Any, folder: Path) -> None:
    task = as_task(next(one for one in load_all(folder) if one.type == "multilabel"))
    type(task).metadata = task.metadata.model_copy(update={"main_score": "lrap"})
    got = evaluate_tasks(encoder, [task], dims=[20], resamples=10)
    cell = got["tasks"]["multilabel-small"]["scores"]["20"]["float"]
    assert list(cell) == ["score"] and cell["score"] > 0
    assert f"{cell['score']:.2f}\n" in table(got)


def test_words_of_the_command_line(encoder: Any, folder: Path, tmp_path: Path) -> None:
    only = tmp_path / "test"
    only.mkdir()
    (only / "sts").symlink_to(folder / "sts")
    for name in ("a", "b"):
        encoder.export(tmp_path / name / "model")
    words = {"dims": "20,5", "precision": "float, int8", "leaks": None, "held_out": []}
    shown = run_words(
        tmp_path / "a" / "model", None, tasks=str(only), against=tmp_path / "b" / "model",
        cache=tmp_path / "cache", out=tmp_path / "out", fresh=False, **words,
    )  # fmt: skip
    first, row, *_ = shown.splitlines()
    assert first.split()[:5] == ["task", "measure", "20", "20", "int8"]
    assert row.split()[:2] == ["sts-small", "cosine_spearman"]
    assert shown.splitlines()[-1].split() == ["mean", "over", "tasks", "+0.00", "[+0.00,", "+0.00]"]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["model"] == "a/model" and result["against"]["model"] == "b/model"
    # The two are the same model, by its digest: one encode serves both.
    rows = [json.loads(line) for line in (folder / "sts" / "small.jsonl").read_text().splitlines()]
    texts = {row[c] for row in rows for c in ("sentence1", "sentence2")}
    assert result["encoded"] == dict.fromkeys(("a/model", "b/model"), len(texts))
    assert names_of("A, MTEB(eng, v2),some/folder") == ["A", "MTEB(eng, v2)", "some/folder"]


def test_names_that_are_none(encoder: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder and no task or benchmark") as error:
        evaluate_tasks(encoder, ["STSBenchmrk"])
    assert "STSBenchmark" in str(error.value)
    with pytest.raises(UsageError, match="Unknown precision 'int4'"):
        evaluate_tasks(encoder, ["STSBenchmark"], precisions=["int4"])
    with pytest.raises(UsageError, match="No task"):
        evaluate_tasks(encoder, [])
    with pytest.raises(UsageError, match="add 20 to dims and float"):
        evaluate_tasks(encoder, ["STSBenchmark"], dims=[12], against=encoder)


def test_two_models_in_pairs(encoder: Any, folder: Path, tmp_path: Path) -> None:
    import torch

    only = tmp_path / "some"
    only.mkdir()
    for kind in ("sts", "pairclass"):
        (only / kind).symlink_to(folder / kind)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    same = evaluate_tasks(encoder, [only], against=encoder, dims=[20], resamples=20)["against"]
    assert all(c["difference"] == c["low"] == c["high"] == 0 for c in same["tasks"].values())
    got = evaluate_tasks(encoder, [only], against=other, dims=[20], resamples=50)
    alone = evaluate_tasks(other, [only], dims=[20], resamples=50)
    for name, cell in got["against"]["tasks"].items():
        one = got["tasks"][name]["scores"]["20"]["float"]["score"]
        two = alone["tasks"][name]["scores"]["20"]["float"]["score"]
        assert cell["difference"] == pytest.approx(one - two)
        assert cell["low"] < cell["difference"] < cell["high"]
    each = [c["difference"] for c in got["against"]["tasks"].values()]
    assert got["against"]["mean"]["difference"] == pytest.approx(np.mean(each))
    assert "embkit/model minus that" in table(got)


def examples_with(found: Any, seen: set[str]) -> int:
    """How many examples of a set have a text that training has seen."""
    match found.type:
        case "retrieval" | "instruction_retrieval":
            found = getattr(found, "retrieval", found)
            each = [
                {q, *(found.corpus[i] for i in answers)}
                for q, answers in zip(found.queries, found.judged, strict=True)
            ]
        case "reranking":
            each = [{q, *p} for q, p in zip(found.queries, found.positive, strict=True)]
        case "classification" | "multilabel":
            each = [{text} for text in found.test]
        case "clustering" | "summarization":
            each = [{text} for text in found.texts]
        case _:
            each = [{*pair} for pair in zip(found.first, found.second, strict=True)]
    return sum(bool(texts & seen) for texts in each)


@pytest.mark.skipif(full_count(0, 1), reason="EMBKIT_TEST_FULL=1 leaks into every kind of sets")
def test_leaked_examples_of_every_kind(encoder: Any, folder: Path, made: Any) -> None:
    """A text from the front and the last held-out one of each set: queries and passages, both
    sides of pairs. White space does not matter."""
    sets = load_all(folder)
    seen = {texts_of(one)[i] for one in sets for i in (3, -1)}
    seen -= {texts_of(one)[-1] for one in sets if one.type == "summarization"}
    spaced = {text.replace(" ", "\n ") for text in seen}
    got = evaluate_tasks(
        encoder, [folder], dims=[20], resamples=0, leaked=spaced, cache=made[1] / "cache"
    )
    for one in sets:
        of = got["tasks"][one.name.replace("/", "-")]
        assert of["leaked"] == examples_with(one, seen) > 0, one.name
        cell = of["scores"]["20"]["float"]
        assert cell["clean"] != cell["score"]
        assert "clean_low" not in cell


def test_scores_without_leaked_examples(encoder: Any, folder: Path, tmp_path: Path) -> None:
    """The dedup stage finds copies of some sentences; their pairs leave the second score."""
    from embkit import data

    only = tmp_path / "test"
    only.mkdir()
    (only / "sts").symlink_to(folder / "sts")
    rows = [json.loads(line) for line in (folder / "sts" / "small.jsonl").read_text().splitlines()]
    every_kind.write(
        tmp_path / "train" / "t.jsonl",
        [{"query": f"number {i}", "positive": rows[i]["sentence1"]} for i in range(0, 24, 2)],
    )
    training = tmp_path / "train" / "t.jsonl"
    data.dedup(training, out=tmp_path / "dedup", against=only, leaked="mark")
    leaked = leaked_texts(tmp_path / "dedup", [only])
    assert {rows[i]["sentence1"] for i in range(0, 24, 2)} <= leaked
    got = evaluate_tasks(encoder, [only], dims=[20], resamples=20, leaked=leaked)
    of = got["tasks"]["sts-small"]
    kept = [r for r in rows if not {r["sentence1"], r["sentence2"]} & leaked]
    assert of["leaked"] == len(rows) - len(kept) >= 12
    a, b = (encoder.encode([r[c] for r in kept]) for c in ("sentence1", "sentence2"))
    want = spearmanr((a * b).sum(1), [r["score"] for r in kept]).statistic
    cell = of["scores"]["20"]["float"]
    assert cell["clean"] == pytest.approx(100 * want, abs=0.1)
    assert cell["clean_low"] < cell["clean"] < cell["clean_high"]
    assert f"without {of['leaked']} leaked" in table(got)
    with pytest.raises(UsageError, match="not what the dedup stage compared with"):
        leaked_texts(tmp_path / "dedup", [folder])
    with pytest.raises(UsageError, match="compared with no evaluation data"):
        leaked_texts(tmp_path, [only])
