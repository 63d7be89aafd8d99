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
from embkit.bench import recipes_causal as causal
from embkit.bench import recipes_peer
from embkit.bench import recipes_systems as systems
from embkit.bench import recipes_systems_data as folders
from embkit.data.readers import read_jsonl
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
        named = {*loaded.prefinetune.tasks, *loaded.finetune.tasks, *loaded.finetune.batch_sizes}
        assert named <= {*system.pre, *system.fine, *system.sts, *system.labels}, name
        assert (loaded.soup, loaded.mix.method) == (paper.soup, paper.mix.method), name
        assert [p.in_batch for p in loaded.finetune.parts] == [
            p.in_batch for p in paper.finetune.parts
        ], name
        assert {p.weight for p in loaded.finetune.parts} == {
            p.weight for p in paper.finetune.parts
        }, name


def test_small_sets_for_a_large_model(tmp_path: Path) -> None:
    whole = tmp_path / "whole"

    def lines(path: str, rows: list[dict[str, Any]]) -> None:
        (whole / path).parent.mkdir(parents=True, exist_ok=True)
        (whole / path).write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name in folders.SHORT:
        pairs = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(300)]
        lines(f"train/{name}.jsonl", pairs)
        for split in ("dev", "test"):
            place = f"{split}/retrieval/{name}"
            lines(f"{place}/corpus.jsonl", [{"_id": str(i), "text": f"x{i}"} for i in range(400)])
            lines(f"{place}/queries.jsonl", [{"_id": f"q{i}", "text": f"y{i}"} for i in range(60)])
            right = [
                {"query_id": f"q{i}", "corpus_id": str(399 - i), "score": 1} for i in range(60)
            ]
            lines(f"{place}/qrels.jsonl", right)
            same = [{"sentence1": f"a{i}", "sentence2": "b", "score": i} for i in range(60)]
            lines(f"{split}/sts/stsb.jsonl", same)
    out = folders.short(whole, tmp_path / "out")
    assert {p.stem: len(read_jsonl(p)) for p in (out / "train").iterdir()} == dict.fromkeys(
        folders.SHORT, 160
    )
    for split, asked in (("dev", 12), ("test", 48)):
        found = retrieval(out / split)
        assert [s.split("/")[1] for s in found] == sorted(folders.SHORT)
        for held in found.values():
            assert (len(held.queries), len(held.corpus)) == (asked, 2 * asked)
            for query, answers in zip(held.queries, held.judged, strict=True):
                assert [held.corpus[i] for i in answers] == [f"x{399 - int(query[1:])}"]
        assert len(read_jsonl(out / split / "sts" / "stsb.jsonl")) == asked


def test_a_model_stands_beside_its_own_start(bench: systems.Bench) -> None:
    ours = bench.ours(3)
    one = systems.Bench(bench.home.parent, bench.data, replace(bench.system, seeds=(3,)))
    one.home = bench.home
    case = causal.row(one)
    result = json.loads((bench.home / "ours-3" / "result.json").read_text())
    types = result["scores"]["test"]["untrained"]["types"]
    (peer,) = case.rivals
    assert case.name == "recipes.gemini-smollm2" and peer == "before training"
    assert case.rivals[peer]().value == pytest.approx(
        np.mean([by["16"] for by in types.values()]), abs=0.3
    )
    assert case.ours().value == pytest.approx(np.mean(list(ours["scores"]["16"].values())))
    assert case.facts["before"] == [ours["before"]]


def test_a_real_model_is_named_in_the_recipe_and_decides_the_folder(
    bench: systems.Bench, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    made = systems.Bench(tmp_path, bench.data, causal.SYSTEM, model=tmp_path / "model")
    chosen = recipe.load(made.recipe(0))
    assert chosen.model.path == str(tmp_path / "model")
    assert chosen.model.bidirectional and chosen.model.new_head and not chosen.mix.on
    assert chosen.model.pooling == "mean" and chosen.finetune.loss.form == "gemini-v2"
    (tmp_path / "model" / "config.json").write_text("{ }")
    again = systems.Bench(tmp_path, bench.data, causal.SYSTEM, model=tmp_path / "model")
    assert again.home != made.home
    by_kind = {"types": {"retrieval": {"96": 1.0, "384": 2.0}}}
    names = ("start", "pre-finetuned", "fine-tuned 0")
    result = {"dims": [384, 96], "scores": {"test": dict.fromkeys(names, by_kind)}}
    assert systems.before(result) == dict.fromkeys(names, {"retrieval": 2.0})
