"""Soups: averages against numpy, the greedy promise, and what may not be averaged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from embkit.container import read_manifest, write_manifest
from embkit.errors import CorruptError, UsageError
from embkit.evaluate import judge
from embkit.model import Encoder
from embkit.recipe import Model, Soup
from embkit.soup import check_compatible, merge, slerp, soup
from embkit.stage import digest_of

TEXTS = ["a text editor", "plays music", "a library for images", "mail", ""]


def build(seed: int, *, sizes: Model | None = None, corpus: int = 0) -> Encoder:
    """An encoder: the same start for all, plus noise of ``seed`` that stands for training."""
    from tokenizers import Tokenizer

    from embkit.data.vocabulary import train_wordpiece

    words = ["small text editor", "fast image library", "old sound player", "mail reader"]
    vocabulary = Tokenizer.from_str(train_wordpiece(words[corpus:], vocab_size=120))
    model = sizes or Model(hidden=16, layers=1, heads=2, intermediate=24, dims=(12, 6))
    encoder = Encoder.from_config(model, vocabulary, max_length={"query": 12, "passage": 20})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.03)
    return encoder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        build(seed).export(tmp_path / f"run-{seed}" / "model")
    return [tmp_path / f"run-{seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def dev(small_data: Path) -> Path:
    return small_data / "dev"


def weights(model: Path) -> dict[str, np.ndarray]:
    out = {}
    for path in sorted(model.rglob("*.safetensors")):
        for name, value in load_file(path).items():
            out[f"{path.relative_to(model)}:{name}"] = value
    return out


@pytest.mark.parametrize("share", [None, [1.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
def test_a_uniform_soup_is_the_weighted_mean(
    runs: list[Path], tmp_path: Path, share: list[float] | None
) -> None:
    soup(runs, out=tmp_path / "soup", select="uniform", weights=share)
    each = [weights(run / "model") for run in runs]
    got = weights(tmp_path / "soup" / "model")
    w = np.array(share or [1, 1, 1]) / sum(share or [1, 1, 1])
    assert set(got) == set(each[0]) and len(got) > 10
    for name, value in got.items():
        want = sum(a * part[name].astype(np.float64) for a, part in zip(w, each, strict=True))
        np.testing.assert_allclose(value, want, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("select", ["uniform", "greedy", "best"])
def test_a_soup_of_one_model_is_the_model(
    runs: list[Path], tmp_path: Path, dev: Path, select: str
) -> None:
    got = soup(runs[:1], out=tmp_path / "soup", select=select, on=dev)
    one = Encoder.from_pretrained(runs[0] / "model")
    assert got.digest() == one.digest()
    np.testing.assert_array_equal(got.encode(TEXTS), one.encode(TEXTS))
    for path in sorted((runs[0] / "model").rglob("*")):
        if path.is_file():
            copy = tmp_path / "soup" / "model" / path.relative_to(runs[0] / "model")
            assert copy.read_bytes() == path.read_bytes()


def test_the_greedy_soup_is_at_least_its_best_ingredient(
    runs: list[Path], tmp_path: Path, dev: Path
) -> None:
    got = soup(runs, out=tmp_path / "soup", select="greedy", on=dev)
    report = json.loads((tmp_path / "soup" / "report.json").read_text())
    scores = {c["run"]: c["dev"] for c in report["candidates"]}
    assert scores == {r.name: judge(Encoder.from_pretrained(r / "model"), dev) for r in runs}
    assert report["dev"] >= max(scores.values())
    assert report["dev"] == pytest.approx(judge(got, dev))
    assert report["weights"] == [1 / len(report["kept"])] * len(report["kept"])
    # Replay the rule: in order of the score alone, kept when the score rises.
    order = sorted(runs, key=lambda r: (-scores[r.name], r.name))
    kept, best = [order[0]], scores[order[0].name]
    for step, run in zip(report["steps"], order[1:], strict=True):
        tried = judge(Encoder.from_pretrained(merge_of([*kept, run], tmp_path)), dev)
        assert step == {"run": run.name, "dev": pytest.approx(tried), "kept": tried > best}
        if tried > best:
            kept, best = [*kept, run], tried
    assert report["kept"] == [r.name for r in kept]
    each = [weights(r / "model") for r in kept]
    for name, value in weights(tmp_path / "soup" / "model").items():
        mean = np.mean([part[name] for part in each], axis=0, dtype=np.float64)
        np.testing.assert_allclose(value, mean, rtol=2e-7, atol=1e-7)


def merge_of(runs: list[Path], tmp_path: Path) -> Path:
    return merge([r / "model" for r in runs], tmp_path / "replay")


def test_uniform_is_scored_beside_and_best_is_the_best(
    runs: list[Path], tmp_path: Path, dev: Path
) -> None:
    mean = soup(runs, out=tmp_path / "uniform", select="uniform", on=dev)
    best = soup(runs, out=tmp_path / "best", select="best", on=dev)
    report = json.loads((tmp_path / "best" / "report.json").read_text())
    assert report["uniform"]["dev"] == pytest.approx(judge(mean, dev))
    top = max(report["candidates"], key=lambda c: c["dev"])
    assert report["kept"] == [top["run"]]
    want = Encoder.from_pretrained(next(r for r in runs if r.name == top["run"]) / "model")
    assert best.digest() == want.digest()


def test_half_precision_sums_in_fp32(tmp_path: Path) -> None:
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file

    values = [torch.full((7, 3), v, dtype=torch.bfloat16) for v in (1.0, 1.0078125, 256.0)]
    for i, value in enumerate(values):
        (tmp_path / str(i)).mkdir()
        ids = torch.arange(5)
        save_file({"w": value, "ids": ids}, tmp_path / str(i) / "model.safetensors")
    merge([tmp_path / str(i) for i in range(3)], tmp_path / "out")
    got = load(tmp_path / "out" / "model.safetensors")
    want = (sum(v.float() for v in values) / 3).to(torch.bfloat16)
    assert got["w"].dtype == torch.bfloat16
    assert torch.equal(got["w"], want)
    assert torch.equal(got["ids"], torch.arange(5))


def test_a_soup_is_free_the_second_time_and_the_same_again(
    runs: list[Path], tmp_path: Path
) -> None:
    soup(runs, out=tmp_path / "a", select="uniform")
    stamp = (tmp_path / "a" / "manifest.json").stat().st_mtime_ns
    soup(runs, out=tmp_path / "a", select="uniform")
    assert (tmp_path / "a" / "manifest.json").stat().st_mtime_ns == stamp
    soup(runs, out=tmp_path / "b", select="uniform")
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_soup_is_sealed_with_its_own_digest(runs: list[Path], tmp_path: Path) -> None:
    got = soup(runs, out=tmp_path / "soup", select="uniform")
    content = json.loads((tmp_path / "soup" / "model" / "embkit.json").read_text())
    assert content["digest"] == got.digest()


# ---------------------------------------------------------------- what may not be averaged


def test_other_architectures_and_tokenizers_are_refused(runs: list[Path], tmp_path: Path) -> None:
    wide = Model(hidden=24, layers=1, heads=2, intermediate=24, dims=(12, 6))
    build(0, sizes=wide).export(tmp_path / "wide" / "model")
    with pytest.raises(UsageError, match="different architectures"):
        soup([runs[0], tmp_path / "wide"], out=tmp_path / "x", select="uniform")
    build(0, corpus=1).export(tmp_path / "words" / "model")
    with pytest.raises(UsageError, match="different (tokenizers|architectures)"):
        soup([runs[0], tmp_path / "words"], out=tmp_path / "x", select="uniform")
    shutil.copytree(runs[1], tmp_path / "cased")
    path = tmp_path / "cased" / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"lowercase":true', '"lowercase":false'))
    with pytest.raises(UsageError, match="different tokenizers"):
        soup([runs[0], tmp_path / "cased"], out=tmp_path / "x", select="uniform")
    assert not (tmp_path / "x").exists()


def test_what_differs_is_said(runs: list[Path], tmp_path: Path) -> None:
    wide = Model(hidden=24, layers=1, heads=2, intermediate=24, dims=(12, 6))
    build(0, sizes=wide).export(tmp_path / "wide" / "model")
    with pytest.raises(UsageError, match=r"config.json differs in hidden_size: 16, and 24"):
        check_compatible([runs[0] / "model", tmp_path / "wide" / "model"])
    build(0, corpus=1).export(tmp_path / "words" / "model")
    for name in ("config.json", "embkit.json"):  # so that the tokenizer is what is left
        shutil.copy(runs[0] / "model" / name, tmp_path / "words" / "model" / name)
    with pytest.raises(UsageError, match=r"tokenizer.json differs in model\.vocab\."):
        check_compatible([runs[0] / "model", tmp_path / "words" / "model"])
    # Who wrote a file, and how the tokenizer was last used, is no difference.
    path = runs[1] / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_version": "4.0"}))
    path = runs[1] / "model" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": {"max_length": 9}}))
    check_compatible([run / "model" for run in runs])


def test_runs_from_different_starts_are_warned_of(
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMBKIT_PROGRESS", "plain")
    for run, start in zip(runs, ("aa", "aa", "bb"), strict=True):
        write_manifest(run, {"format": "embkit.run", "version": 1, "init_sha256": start})
    soup(runs[:2], out=tmp_path / "same", select="uniform")
    assert "different weights" not in capsys.readouterr().out
    assert json.loads((tmp_path / "same" / "report.json").read_text())["same_start"] is True
    soup(runs, out=tmp_path / "other", select="uniform")
    assert "warning: these runs started from different weights" in capsys.readouterr().out
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    assert report["same_start"] is False
    assert [p["init_sha256"] for p in report["parents"]] == ["aa", "aa", "bb"]


def test_missing_and_unfinished_runs(runs: list[Path], tmp_path: Path, dev: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "x", "select": "uniform"}
    with pytest.raises(FileNotFoundError, match="No such training run"):
        soup([tmp_path / "nowhere"], **options)
    (runs[1] / "model" / "model.safetensors").unlink()
    with pytest.raises(CorruptError, match="no finished model"):
        soup(runs, **options)
    with pytest.raises(UsageError, match="no runs"):
        soup([], **options)
    with pytest.raises(UsageError, match="did you mean 'greedy'"):
        soup(runs[:1], out=tmp_path / "x", select="greddy", on=dev)
    with pytest.raises(UsageError, match="needs sets to judge on"):
        soup(runs[:1], out=tmp_path / "x", select="greedy")
    with pytest.raises(UsageError, match="2 weights for 1 runs"):
        soup(runs[:1], weights=[1, 2], **options)
    with pytest.raises(UsageError, match="weights go with"):
        soup(runs[:1], out=tmp_path / "x", select="best", on=dev, weights=[1])
    assert not (tmp_path / "x").exists()


def test_slerp_of_vectors() -> None:
    """The published example, the ends of the arc, and what has no arc."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert slerp(a, b, 0.5).tolist() == pytest.approx([0.707107, 1.414214], abs=1e-6)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert slerp(a, b, 1.0).tolist() == pytest.approx(b.tolist(), abs=1e-12)
    third = slerp(a, b / 2, 1 / 3)  # of unit vectors: a third of the angle, and of unit length
    assert third.tolist() == pytest.approx([np.cos(np.pi / 6), np.sin(np.pi / 6)])
    for other in (3 * a, -a, torch.zeros(2)):
        assert torch.equal(slerp(a, other, 0.25), torch.lerp(a, other, 0.25))


def test_slerp_folds_the_runs_in_with_equal_weight(runs: list[Path], tmp_path: Path) -> None:
    soup(runs, out=tmp_path / "s", select="slerp")
    parts = [weights(run / "model") for run in runs]
    for name, got in weights(tmp_path / "s" / "model").items():
        want = torch.from_numpy(parts[0][name])
        for k, part in enumerate(parts[1:], 2):
            want = slerp(want, torch.from_numpy(part[name]), 1 / k)
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-7, err_msg=name)
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    assert report["kept"] == [run.name for run in runs]
    alone = soup(runs[:1], out=tmp_path / "one", select="slerp")
    assert alone.digest() == Encoder.from_pretrained(runs[0] / "model").digest()


# ---------------------------------------------------------------- searched, mixed, of checkpoints


def report_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


@pytest.fixture
def closeness(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Judges by how near a model's weights are to a quarter of the first, three of the second."""
    states = [Encoder.from_pretrained(run / "model").state_dict() for run in runs]
    names = [n for n, v in states[0].items() if v.is_floating_point()]

    def scored(encoder: Encoder, folder: Path | str) -> float:
        state, far = encoder.state_dict(), 0.0
        for name in names:
            target = 0.25 * states[0][name] + 0.75 * states[1][name]
            far += float((state[name] - target).square().sum())
        return 100 - far**0.5

    monkeypatch.setattr(sys.modules["embkit.evaluate"], "judge", scored)
    return scored


@pytest.mark.parametrize(("method", "budget"), [("grid", 12), ("dirichlet", 12), ("bayes", 16)])
def test_searched_weights_are_the_best_that_were_tried(
    runs: list[Path], tmp_path: Path, dev: Path, method: str, budget: int, closeness: Any
) -> None:
    search = Soup(select="search", method=method, candidates=budget, initial=4)
    got = soup(runs, out=tmp_path / "s", select="search", on=dev, search=search)
    report = report_of(tmp_path / "s")
    tried = report["search"]["candidates"]
    # Each run alone, their mean (with which the search begins), and what the method proposes.
    assert len(tried) == 3 + 1 + budget and report["search"]["method"] == method
    assert [t["dev"] for t in tried] == sorted((t["dev"] for t in tried), reverse=True)
    assert report["dev"] == tried[0]["dev"] == pytest.approx(closeness(got, dev), abs=1e-4)
    assert report["dev"] > max(c["dev"] for c in report["candidates"])
    assert report["dev"] > report["uniform"]["dev"]
    chosen = dict(zip(report["kept"], report["weights"], strict=True))
    for run in runs:
        assert chosen.get(run.name, 0.0) == pytest.approx(tried[0]["weights"][run.name], abs=2e-4)
    members = [r / "model" for r in runs if r.name in chosen]
    merged = merge(members, tmp_path / "again", weights=report["weights"])
    assert Encoder.from_pretrained(merged).digest() == got.digest()
    if method == "bayes":  # it comes near to the best weights there are
        assert chosen["run-1"] == pytest.approx(0.75, abs=0.15)


def test_a_search_that_was_killed_judges_nothing_twice(
    runs: list[Path], tmp_path: Path, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []

    def scored(encoder: Encoder, folder: Path | str) -> float:
        if len(judged) == 6:
            judged.append("killed")
            raise KeyboardInterrupt
        judged.append(encoder.digest())
        return float(int(judged[-1][:6], 16))

    monkeypatch.setattr(sys.modules["embkit.evaluate"], "judge", scored)
    options: dict[str, Any] = {
        "select": "search", "on": dev, "search": Soup(method="dirichlet", candidates=5),
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        soup(runs, out=tmp_path / "s", **options)
    soup(runs, out=tmp_path / "s", **options)
    # The mean is judged once: the search begins with it, and its score is known by then.
    assert len(judged) == 1 + 3 + 5 and len(set(judged)) == len(judged)
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"model", "report.json", "manifest.json"}


def test_the_best_alpha_between_base_and_soup(runs: list[Path], tmp_path: Path, dev: Path) -> None:
    base, *tuned = runs
    got = soup(
        tuned, out=tmp_path / "s", select="uniform", on=dev, base=base, alpha=(0.0, 0.5, 1.0)
    )
    report = report_of(tmp_path / "s")
    scores = {t["alpha"]: t["dev"] for t in report["alphas"]}
    assert list(scores) == [0.0, 0.5, 1.0]
    assert scores[0.0] == pytest.approx(judge(Encoder.from_pretrained(base / "model"), dev))
    assert scores[1.0] == report["uniform"]["dev"]
    assert report["dev"] == max(scores.values()) == pytest.approx(judge(got, dev))
    assert scores[report["alpha"]] == report["dev"] and report["base"]["run"] == base.name
    fixed = soup(tuned, out=tmp_path / "f", select="uniform", base=base, alpha=0.25)
    assert report_of(tmp_path / "f")["alpha"] == 0.25
    each = [weights(r / "model") for r in runs]
    for name, value in Encoder.from_pretrained(tmp_path / "f").state_dict().items():
        key = f"model.safetensors:{name.removeprefix('backbone.')}"
        if key in each[0]:
            want = 0.75 * each[0][key] + 0.125 * each[1][key] + 0.125 * each[2][key]
            np.testing.assert_allclose(value.numpy(), want, rtol=1e-5, atol=1e-7)
    assert fixed.digest() != got.digest()
    with pytest.raises(UsageError, match="A choice of alphas needs sets to judge on"):
        soup(tuned, out=tmp_path / "x", select="uniform", base=base, alpha=(0.1, 0.2))
    with pytest.raises(UsageError, match="there is none"):
        soup(tuned, out=tmp_path / "x", select="uniform", alpha=0.5)


def test_provenance_is_in_the_report_the_manifest_and_the_model(
    runs: list[Path], tmp_path: Path, dev: Path
) -> None:
    soup(runs[:2], out=tmp_path / "s", select="uniform", on=dev, weights=[1, 3])
    report, manifest = report_of(tmp_path / "s"), read_manifest(tmp_path / "s")
    assert [p["weight"] for p in report["parents"]] == [0.25, 0.75]
    assert [p["digest"] for p in report["parents"]] == [digest_of(r / "model") for r in runs[:2]]
    assert [p["dev"] for p in report["parents"]] == [c["dev"] for c in report["candidates"]]
    assert manifest["parents"] == report["parents"]
    made = json.loads((tmp_path / "s" / "model" / "embkit.json").read_text())["soup"]
    assert made == {"select": "uniform", "dev": report["dev"], "parents": report["parents"]}
    again = soup([tmp_path / "s", runs[2]], out=tmp_path / "t", select="uniform")  # of a soup
    assert again.digest() != Encoder.from_pretrained(tmp_path / "s").digest()


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / runs[0].name
    shutil.copytree(runs[1], twin)
    soup([runs[0], twin], out=tmp_path / "s", select="uniform")
    assert report_of(tmp_path / "s")["kept"] == [f"{runs[0].name} (1)", f"{runs[0].name} (2)"]
