"""The rows of whole systems: data held out of training, equal budgets, a vocabulary cut down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from embkit import recipe
from embkit.bench import recipes_peer
from embkit.bench import recipes_systems as systems
from embkit.bench import recipes_systems_data as folders
from embkit.data.sources import read_jsonl
from embkit.evaluate.tasks import RetrievalSet, load_split

TEXTS = ["Die Bibliothek liest Tabellen.", "Un éditeur de texte", "データベースを管理する", "x"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(zstandard.compress(text.encode()))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as EMBKIT_REAL_DATA names one, with made-up rows of the files that are used."""
    home = tmp_path_factory.mktemp("real")
    for name in ("cmrc.zh", "drcd_dev.zh-TW", "nli_snli.zh", "nli_ocnli.zh", "jaquad_train.ja"):
        rows = [
            {"query": f"{name} {i}", "positive": f"passage {i // 3} of {name}", "task": "x"}
            for i in range(1500)
        ]
        write(home / "pairs" / "finetune" / f"{name}.jsonl.zst", rows)
    for lang in ("zh", *folders.THREE):
        rows = [{"query": f"{lang} {i}", "positive": f"text {i} {lang}"} for i in range(600)]
        write(home / "pairs" / "prefinetune" / f"debian_desc.{lang}.jsonl.zst", rows)
    rows = [
        {"query": f"bitext {lang} {i}", "positive": f"text {i} of {lang}", "lang": f"{lang}-en"}
        for lang in (*folders.THREE, "it")
        for i in range(900)
    ]
    write(home / "pairs" / "finetune" / "bitext_ddtp.jsonl.zst", rows)
    pairs = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i % 6} for i in range(80)]
    write(home / "sts" / "stsb-zh.train.jsonl.zst", pairs)
    write(home / "sts" / "stsb-zh.dev.jsonl.zst", pairs)
    same = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2} for i in range(80)]
    write(home / "pairclass" / "lcqmc-zh.dev.jsonl.zst", same)
    labelled = [{"text": f"headline {i}", "label": f"l{i % 3}"} for i in range(300)]
    write(home / "classification" / "tnews-zh.train.jsonl.zst", labelled)
    return home


def retrieval(folder: Path) -> dict[str, RetrievalSet]:
    return {s.name: s for s in load_split(folder) if isinstance(s, RetrievalSet)}


@pytest.mark.parametrize("name", ["chinese", "three"])
def test_what_is_scored_is_not_trained(real: Path, tmp_path: Path, name: str) -> None:
    make = {"chinese": folders.chinese, "three": folders.three}[name]
    out = make(real, tmp_path / "data")
    trained = {
        row[key]
        for path in (out / "train").glob("*.jsonl")
        for row in read_jsonl(path)
        for key in ("query", "positive")
        if key in row
    }
    dev, test = retrieval(out / "dev"), retrieval(out / "test")
    assert dev.keys() == test.keys() and len(test) >= 2
    for key, found in test.items():
        judged = {found.corpus[i] for answers in found.judged for i in answers}
        assert not trained & {*found.queries, *judged}
        assert not set(found.queries) & set(dev[key].queries)
        assert len(found.queries) == pytest.approx(3 * len(dev[key].queries), abs=3)
        assert set(dev[key].corpus) <= set(found.corpus)
        for query, answers in zip(found.queries, found.judged, strict=True):
            number = int(query.split()[-1])
            want = number // 3 if "passage" in found.corpus[0] else number
            assert [found.corpus[i].split()[1] for i in answers] == [str(want)]
    if name == "chinese":  # training passages are the distractors
        assert len(test["retrieval/cmrc"].corpus) == 500
    else:
        assert [k for k in test if "bitext" in k] == [
            f"retrieval/bitext-{x}-en" for x in folders.THREE
        ]


def test_a_cut_vocabulary_cuts_texts_the_same_way(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    whole = Tokenizer(models.Unigram())
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    corpus = [*TEXTS, *(f"wholly other words {i} abc{i}" for i in range(200))]
    whole.train_from_iterator(corpus, trainer)
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    (tmp_path / "in").mkdir()
    whole.save(str(tmp_path / "in" / "tokenizer.json"))
    made = systems.cut_vocabulary(tmp_path / "in" / "tokenizer.json", TEXTS, tmp_path / "out")
    small = Tokenizer.from_file(str(made / "tokenizer.json"))
    assert small.get_vocab_size() < whole.get_vocab_size()
    for text in TEXTS:
        assert small.encode(text).tokens == whole.encode(text).tokens
        assert max(small.encode(text).ids) < small.get_vocab_size()
    assert small.encode("x").ids[0] == small.token_to_id("<s>")


@pytest.fixture(scope="module")
def bench(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> systems.Bench:
    table: dict[str, Any] = {
        "tokenizer": {"vocab_size": 300, "max_length_query": 24, "max_length_passage": 28},
        "model": {"hidden": 16, "heads": 2, "intermediate": 16, "dims": [16, 8]},
        "prefinetune": {"steps": 2, "batch_size": 16, "tasks": {"retrieval": 1.0}},
        "mine": {"candidates": 8},
        "finetune": {"steps": 2, "batch_size": 8},
    }
    system = systems.System(
        recipe="gecko", data="small", table=table, pre=("retrieval",), fine=("retrieval",),
        sts=("sts",), labels=("classification",), seeds=(3, 4),
    )  # fmt: skip
    return systems.Bench(tmp_path_factory.mktemp("systems"), small_data, system)


def test_a_recipe_is_run_whole_and_kept(
    bench: systems.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embkit import pipeline

    first = bench.ours(3)
    stages = ["read", "dedup", "tokenize", "prefinetune", "mine", "finetune", "soup", "evaluate"]
    assert list(first["stages"]) == [*stages, "export"]
    assert first["cpu"] == pytest.approx(sum(bench.budgets(first["stages"])))
    assert set(first["scores"]) == {"16", "8"}
    found = json.loads((bench.home / "ours-3" / "result.json").read_text())
    tuned = found["scores"]["test"]["soup, greedy"]["types"]
    assert first["scores"]["16"] == pytest.approx({k: w["16"] for k, w in tuned.items()}, abs=0.3)
    assert set(first["before"]) == {"untrained", "pre-finetuned", "fine-tuned 0"}
    chosen = recipe.load(bench.recipe(4))
    assert (chosen.model.seed, chosen.prefinetune.seed, chosen.run_config(0).seed) == (4, 4, 4)
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("run again"))
    assert bench.ours(3) == first


def test_the_peer_gets_our_texts_our_weights_and_our_seconds(
    bench: systems.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load_file

    ours, calls = bench.ours(3), []

    def run(
        model: Path, rows: Path, out: Path, settings: Mapping[str, Any], *, dims: Sequence[int]
    ) -> dict[str, Any]:
        calls.append((model, sorted(p.stem for p in rows.iterdir()), dict(settings), dims))
        shutil.copytree(model, out / "model", dirs_exist_ok=True)
        (out / "model" / "embkit.json").unlink(missing_ok=True)  # it is not embkit's
        return {"first": 0.5, "cpu": 0.5 + 0.01 * (settings["steps"] - 1)}

    monkeypatch.setattr(recipes_peer, "run", run)
    theirs = bench.peer(3)
    (start, early, pre, dims), _, (then, late, _, _), (_, _, fine, _) = calls[:4]
    assert early == ["retrieval"] and late == ["classification", "retrieval", "sts"]
    budgets = bench.budgets(ours["stages"])  # at 0.01 s a step after 0.5 s
    assert set(theirs["scores"]) == {"16", "8"}
    assert theirs["steps"] == [max(1, round((b - 0.5) / 0.01)) for b in budgets]
    assert calls[1][2]["steps"] == theirs["steps"][0] and fine["steps"] == theirs["steps"][1]
    assert (pre["lr"], fine["lr"], dims) == (2e-3, 5e-4, (16, 8)) and then.parent.name == "stage-0"
    mine, other = (
        load_file(p / "model.safetensors") for p in (bench.home / "ours-3/init/model", start)
    )
    assert all(np.array_equal(mine[name], other[name]) for name in mine)
    assert "task:" not in (start / "config_sentence_transformers.json").read_text()
    bench.peer(4)
    assert [c[2]["steps"] for c in calls[4:]] == theirs["steps"]
    monkeypatch.setattr("embkit.bench.rivals.interpreter", lambda: Path("python"))
    bench.system = replace(bench.system, seeds=(3,))
    case = systems.row("gecko", bench)
    assert (
        case.facts["difference_of"] == "retrieval" and case.facts["peer_steps"] == theirs["steps"]
    )
    assert case.ours().value == pytest.approx(np.mean(list(ours["scores"]["16"].values())))


def test_recipes_of_the_systems_change_sizes_and_names_alone(tmp_path: Path) -> None:
    """What decides the method is the paper's form's: losses, format, negatives, soup."""
    import tomli_w

    for name, system in systems.systems().items():
        table = {"extends": f"{system.recipe}-small", **system.table}
        (tmp_path / "r.toml").write_text(tomli_w.dumps(table), "utf-8")
        loaded = recipe.load(tmp_path / "r.toml")
        paper = recipe.load(system.recipe)
        assert loaded.tokenizer.format == paper.tokenizer.format, name
        assert loaded.finetune.loss == paper.finetune.loss, name
        assert loaded.finetune.dynamic.rule == paper.finetune.dynamic.rule, name
        assert (loaded.soup, loaded.mix.method) == (paper.soup, paper.mix.method), name
        assert [p.in_batch for p in loaded.finetune.parts] == [
            p.in_batch for p in paper.finetune.parts
        ], name
        assert {p.weight for p in loaded.finetune.parts} == {
            p.weight for p in paper.finetune.parts
        }, name
