"""The loop: it learns, the same bits every time, resumes exactly, and stops with reasons."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_source

from embkit import _rust, container
from embkit.data import Store
from embkit.data.tables import Examples
from embkit.errors import CorruptError, EmbkitError, Preempted, UsageError
from embkit.model import Encoder, check_export
from embkit.recipe import Part, Train
from embkit.train import finetune, prefinetune, train
from embkit.train import step as one_step
from embkit.train.checkpoint import sha256_tensors
from embkit.train.checks import gpu_is_there
from embkit.train.optim import Optimizer, learning_rate

SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 16, "lr": 2e-3, "token_budget": 300}
DRIVER = Path(__file__).with_name("kill_driver.py")


def losses(out: Path) -> list[str]:
    return [json.loads(line)["loss_hex"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_publishes(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    start = make_encoder()
    before = sha256_tensors(start.state_dict())
    out = tmp_path / "pre"
    settings = {**SETTINGS, "steps": 60, "tasks": {"retrieval": 1.0}, "temperature": 0.1}
    trained, profile = train(start, store, name="prefinetune", out=out, config=Train(**settings))
    assert sha256_tensors(start.state_dict()) == before, "the argument must not change"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(1, 61))
    first, last = (np.mean([x["loss"] for x in part]) for part in (lines[:5], lines[-5:]))
    assert last < 0.8 * first
    assert profile.steps == 60 and profile.tokens == sum(x["tokens"] for x in lines)
    manifest = container.read_manifest(out, kind="embkit.run")
    assert manifest["init_sha256"] == before and manifest["model_digest"] == trained.digest()
    state = json.loads((out / "checkpoints/step-000060/state.json").read_text())
    assert state["cursor"] == {"retrieval": 60} and state["torch_threads"] == 1
    again = prefinetune(start, store, out=out, **settings)  # done: nothing runs
    assert again.digest() == trained.digest() == Encoder.from_pretrained(out).digest()
    difference = check_export(trained, out / "model", ["w1 w2 w3", "w4 " * 50, ""])
    assert difference is None or difference <= 2e-6


def test_two_data_threads_give_the_same_bits(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = make_encoder(dropout=0.1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for threads in (1, 2):
        finetune(
            encoder, store, out=tmp_path / str(threads) / "run", hard_negatives=2,
            data_threads=threads, **SETTINGS,
        )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before) and not _deterministic()
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    assert losses(one) == losses(two) and len(set(losses(one))) == 20
    for path in sorted(p for p in one.rglob("*") if p.is_file()):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    tasks = [json.loads(line)["task"] for line in (one / "log.jsonl").read_text().splitlines()]
    assert set(tasks) == {"retrieval", "sts", "topics"}
    finetune(encoder, store, out=tmp_path / "seed", hard_negatives=2, **SETTINGS, seed=1)
    assert losses(tmp_path / "seed") != losses(one)


@pytest.mark.parametrize(
    ("kills", "way"),
    [
        (12, "changing"),
        pytest.param(200, "shards", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(200, "changing", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.promise
def test_killed_runs_equal_an_uninterrupted_one(
    store: Store,
    make_encoder: Callable[..., Encoder],
    ranked: Path,
    tmp_path: Path,
    kills: int,
    way: str,
) -> None:
    """P3, P4: SIGKILL in shards, steps, checkpoints and publishing; dropout on; two epoch ends.

    ``changing``: with hard negatives that are replaced, and mined again beside the training; more
    to resume, and all else the same. ``shards``: a run makes its own store before it trains.
    """
    changing = way == "changing"
    model = make_encoder().export(tmp_path / "model")
    work = tmp_path / "work"
    work.mkdir()
    given = ranked if changing else make_source(tmp_path / "source")
    words = [store.path, model, work, kills, 1, way, given]
    done = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, words)],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "EMBKIT_PROGRESS": "off",
            "PYTHONPATH": os.pathsep.join([str(DRIVER.parents[1]), *sys.path]),
        },
        capture_output=True, text=True, timeout=1700, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["statuses"] == {
        "killed": kills, "exit 0": len(report["rounds"])
    }, done.stderr[-3000:]  # fmt: skip
    print("kills landed in", report["landings"])
    assert sum(report["landings"].values()) == kills
    least = 30 if kills >= 200 else 1
    phases = ("step", "checkpoint", "refresh" if changing else "shard")
    assert min(report["landings"].get(p, 0) for p in phases) >= least
    assert len(report["whole"]["loss_hex"]) == 24
    changes = report["whole"]["changes"]
    if changing:
        assert [step for step, found in changes if "weights" in found] == [14, 22]
        assert sum(c["retrieval"]["replaced"] for _, c in changes if "retrieval" in c) > 20
    else:
        assert not changes
    for one in report["rounds"]:
        assert one == report["whole"]
    assert not report["left"]


def test_sigterm_leaves_a_checkpoint_and_75(
    store: Store,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = make_encoder(dropout=0.1)
    settings = {**SETTINGS, "checkpoint_every": 1000}
    real = one_step.value_and_grad
    calls = 0

    def at_seven(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(one_step, "value_and_grad", at_seven)
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted, match="after step 7 of 20") as caught:
            prefinetune(encoder, store, out=tmp_path / "run", **settings)
        assert caught.value.exit_code == 75
        assert signal.getsignal(signal.SIGTERM) is handler
    (partial,) = tmp_path.glob(".partial-run-*")
    assert (partial / "checkpoints/LATEST").read_text() == "step-000007\n"
    prefinetune(encoder, store, out=tmp_path / "run", **settings)
    prefinetune(encoder, store, out=tmp_path / "whole", **settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert not list(tmp_path.glob(".partial-*"))


def test_nan_stops_and_saves_the_batch(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    encoder = make_encoder()
    with torch.no_grad():
        encoder.projection.weight[3, 3] = float("nan")
    with pytest.raises(EmbkitError, match=r"loss of step 1 is nan") as caught:
        prefinetune(encoder, store, out=tmp_path / "run", **SETTINGS)
    assert caught.value.exit_code == 1 and not (tmp_path / "run").exists()
    (partial,) = tmp_path.glob(".partial-run-*")
    saved = container.load(partial / "failed-step-000001.safetensors", kind="embkit.batch")
    tokens, offsets = saved["tokens"], saved["offsets"].astype(int)
    for i, row in enumerate(saved["rows"]):
        want = encoder.tokenizer.ids([store.text(int(row))], max_length=32)[0]
        assert tokens[offsets[i] : offsets[i + 1]].tolist() == want.tolist()
    assert len(saved["query"]) == 16
    parts = (Part(tasks={"sts": 1.0}, batch_size=8), Part(tasks={"retrieval": 1.0}, batch_size=9))
    with pytest.raises(EmbkitError, match=r"loss of step 1 is nan") as caught:
        prefinetune(encoder, store, out=tmp_path / "parts", **{**SETTINGS, "parts": parts})
    (partial,) = tmp_path.glob(".partial-parts-*")
    for name, rows in (("000001", 8), ("000001-part-1", 9)):
        path = partial / f"failed-step-{name}.safetensors"
        assert str(path) in str(caught.value)
        assert len(container.load(path, kind="embkit.batch")["query"]) == rows


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    store: Store,
    make_encoder: Callable[..., Encoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, settings = make_encoder(dropout=0.1), {**SETTINGS, "checkpoint_every": 5}

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["embkit.model.export"], "export", broken)
        with pytest.raises(KeyboardInterrupt):
            prefinetune(encoder, store, out=tmp_path / "run", **settings)
    (partial,) = tmp_path.glob(".partial-run-*")
    newest = partial / "checkpoints/step-000020/model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    prefinetune(encoder, store, out=tmp_path / "run", **settings)
    prefinetune(encoder, store, out=tmp_path / "whole", **settings)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        tmp_path / "whole/model/model.safetensors"
    ).read_bytes()


def test_checkpoints_that_all_fail_are_an_error(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    from embkit.train.checkpoint import load_latest

    prefinetune(make_encoder(), store, out=tmp_path / "run", **SETTINGS)
    folder = tmp_path / "run/checkpoints"
    found = load_latest(folder)
    assert found is not None and found.state["step"] == 20
    for path in folder.glob("step-*/state.json"):
        path.write_text(path.read_text().replace('"step":20', '"step":21'))
    with pytest.raises(CorruptError, match="No checkpoint of this run verifies"):
        load_latest(folder)
    assert load_latest(tmp_path / "nothing") is None


def test_encode_rows_equals_encode(store: Store, make_encoder: Callable[..., Encoder]) -> None:
    encoder = make_encoder()
    rows = np.array([5, 0, 77, 5, 200], np.uint64)
    texts = [store.text(int(r)) for r in rows]
    got = encoder.encode_rows(store, rows, dim=16, token_budget=40)
    assert np.abs(got - encoder.encode(texts, dim=16)).max() < 2e-6
    assert np.array_equal(got[0], got[3])


def test_schedules() -> None:
    base = Train(steps=100, lr=2.0, warmup_ratio=0.1, min_lr_ratio=0.1, schedule="linear")
    assert [learning_rate(base, s) for s in (0, 9, 10)] == pytest.approx([0.2, 2.0, 2.0])
    assert learning_rate(base, 55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    cosine = dataclasses.replace(base, schedule="cosine")
    assert learning_rate(cosine, 55) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(cosine, 99) < 0.21 and learning_rate(base, 99) < 0.23
    constant = dataclasses.replace(base, schedule="constant", warmup_ratio=0.0)
    assert {learning_rate(constant, s) for s in (0, 50, 99)} == {2.0}


def test_optimizer_equals_adamw_by_hand(make_encoder: Callable[..., Encoder]) -> None:
    """Two steps in float64 arithmetic: clipping, bias correction, decay on matrices only."""
    encoder = make_encoder()
    config = Train(lr=0.1, weight_decay=0.5, clip_norm=0.01, betas=(0.9, 0.99), eps=1e-8)
    optimizer = Optimizer(encoder, config)
    named = dict(encoder.named_parameters())
    picked = ["projection.weight", "backbone.encoder.layer.0.output.dense.bias"]
    state = {n: (named[n].detach().double().clone(), 0.0, 0.0) for n in picked}
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        norm = sum(float(p.grad.double().pow(2).sum()) for p in named.values()) ** 0.5
        scaled = {n: named[n].grad.double() * (0.01 / norm) for n in picked}
        assert optimizer.step(0.1) == pytest.approx(norm, rel=1e-5)
        for n in picked:
            w, m, v = state[n]
            m = 0.9 * m + 0.1 * scaled[n]
            v = 0.99 * v + 0.01 * scaled[n] ** 2
            w = w * (1 - 0.1 * (0.5 if w.ndim > 1 else 0.0))
            w = w - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            state[n] = (w, m, v)
            assert (named[n].detach().double() - w).abs().max() < 1e-5


def test_refused_before_the_first_step(
    store: Store,
    make_encoder: Callable[..., Encoder],
    table: Callable[..., Examples],
    tmp_path: Path,
) -> None:
    encoder, out = make_encoder(), tmp_path / "run"
    for settings, match in (
        ({"batch_size": 91}, "fewer than a batch"),
        ({"stepss": 3}, "did you mean 'steps'"),
        ({"tasks": {"retreival": 1.0}}, "did you mean 'retrieval'"),
        ({"steps": 0}, "not positive"),
        ({"exhausted": "drop"}, "ends after 15 steps, 20 are asked for"),
        ({"exhausted": "never"}, "exhausted"),
        ({"log_every": 0}, "log_every = 0 is out of range"),
        ({"keep_checkpoints": 0}, "keep_checkpoints = 0 is out of range"),
        ({"hard_negatives": -1}, "hard_negatives = -1 is out of range"),
        ({"seed": 2**63}, "seed = 9223372036854775808 is out of range"),
        ({"min_lr_ratio": 3.0}, "min_lr_ratio = 3.0 is out of range"),
        ({"steps": 2.5}, "steps = 2.5 is no whole number"),
        ({"lr": "1e-3"}, "lr = '1e-3' is no number"),
        ({"lr": math.inf}, "lr = inf is no finite number"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"tasks": ["retrieval"]}, "has no weights"),
    ):
        with pytest.raises(UsageError, match=match):
            prefinetune(encoder, store, out=out, **{**SETTINGS, **settings})
    from tokenizers import Tokenizer, models

    other = Encoder(
        encoder.backbone, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), dims=(32,)
    )
    with pytest.raises(UsageError, match="another tokenizer"):
        prefinetune(other, store, out=out, **SETTINGS)
    encoder.prompts["query"] = "search: "
    with pytest.raises(UsageError, match="the query prompt '', the encoder serves with 'search: '"):
        prefinetune(encoder, store, out=out, **SETTINGS)
    encoder.prompts["query"] = ""
    encoder.backbone.config.max_position_embeddings = 31
    with pytest.raises(UsageError, match="the model takes 31"):
        prefinetune(encoder, store, out=out, **SETTINGS)
    assert not out.exists()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    gpu_is_there(torch.device("cpu"))
    gpu_is_there(torch.device("cuda", 1))
    with pytest.raises(UsageError, match="GPU 2, counted from 0, of 2"):
        gpu_is_there(torch.device("cuda", 2))


def test_negatives_of_another_store(
    store: Store, make_encoder: Callable[..., Encoder], tmp_path: Path
) -> None:
    from embkit.stage import stage

    def mined(examples: int, row: int) -> Path:
        out = tmp_path / f"mined-{examples}-{row}"
        with stage(out, name="mine", params={}, kind="embkit.negatives") as work:
            container.save(
                work.dir / "negatives-retrieval.safetensors",
                {
                    "offsets": np.arange(examples + 1, dtype=np.uint64),
                    "row": np.full(examples, row, np.uint64),
                    "score": np.zeros(examples, np.float32),
                    "rank": np.zeros(examples, np.uint32),
                },
                kind="embkit.negatives",
            )
            work.publish()
        return out

    settings = {**SETTINGS, "steps": 3, "hard_negatives": 2, "tasks": {"retrieval": 1.0}}
    for bad, match in ((mined(89, 0), "for 89 examples"), (mined(90, 10**6), "the store has")):
        with pytest.raises(CorruptError, match=match):
            finetune(make_encoder(), store, negatives=bad, out=tmp_path / "ft", **settings)
    with pytest.raises(UsageError, match="neither a directory"):
        finetune(make_encoder(), store, negatives=7, out=tmp_path / "ft", **settings)
    finetune(make_encoder(), store, negatives=mined(90, 3), out=tmp_path / "ft", **settings)
    finetune(make_encoder(), store, out=tmp_path / "own", **settings)
    assert losses(tmp_path / "ft") != losses(tmp_path / "own")


def test_resume_is_quick_to_its_first_batch(store: Store) -> None:
    """[train.resume]: the plan costs the same at any step."""
    plan = _rust.Plan(0, [("a", 10**9, 1.0)], 256)
    began = time.perf_counter()
    (_, _, epoch, _), examples = plan.part(10**8), plan.examples(10**8)
    assert time.perf_counter() - began < 0.1
    assert epoch == 10**8 // (10**9 // 256) and len(set(examples.tolist())) == 256


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()
