"""The group `train`: a step beside those of sentence-transformers and FlagEmbedding; resume.

Every trainer runs in its own loop, in a process of its own (benches/rivals/trainers.py), on the
same pairs in the same order, from the same weights; rounds of some steps take turns, and the losses
of all steps are compared.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from embkit.bench import Case, Reported, Sample, corpus, isa
from embkit.bench.rivals import Job, Rival
from embkit.bench.train_loss import bookkeeping
from embkit.errors import EmbkitError

_AGREE = 1e-4  # relative difference of losses, at every step
_SIZES = {"hidden": 384, "layers": 6, "heads": 12, "intermediate": 1536, "dims": (384, 256, 128)}
_BASE = {"hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072, "dims": (768, 512, 256)}
_SIX = {"hidden": 128, "layers": 6, "heads": 4, "intermediate": 512, "dims": (128, 64, 32)}
_QUICK = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "dims": (64, 32, 16)}
_PEERS = {"sentence-transformers": "st", "FlagEmbedding": "flag"}


class Work:
    """A model, a store, and the batches that a run over it has, in a temporary folder.

    Args:
        sizes: of the encoder. batch_size, steps, round: of the run; a round is measured at once.
        max_length: tokens of the longest text. small: the demo's text, not the corpus.
        chunk: rows of a chunk of a cached loss; 0 keeps the graph. device: cpu, or cuda in bf16.
    """

    def __init__(
        self,
        sizes: Mapping[str, Any],
        *,
        batch_size: int,
        steps: int,
        round_: int,
        max_length: int,
        small: bool,
        chunk: int = 0,
        device: str = "cpu",
    ) -> None:
        from embkit import data
        from embkit.data.batches import Batches
        from embkit.model import Encoder
        from embkit.recipe import Model

        self.home = tempfile.TemporaryDirectory(prefix="embkit-bench-")
        self.path = Path(self.home.name)
        rows = _pairs(batch_size * steps, small)
        source = self.path / "pairs-in.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        store = data.tokenize(
            data.read(source), out=self.path / "store", vocab_size=4000 if small else 30522,
            max_length_query=max_length, max_length_passage=max_length,
        )  # fmt: skip
        lengths = {"query": max_length, "passage": max_length}
        encoder = Encoder.from_config(
            Model(**sizes, projection=False), store.path / "tokenizer", max_length=lengths
        )
        encoder.export(self.path / "model")
        settings: dict[str, Any] = {"batch_size": batch_size, "seed": 0}
        batches = Batches(store, **settings)
        self.tokens, drawn = 0, []
        table = store.examples(store.task_names[0])
        for step in range(steps):
            batch = batches.batch(step)
            self.tokens += batch.tokens
            place = np.argsort(batch["position"])
            for i in batch.examples[place].tolist():
                positive = int(table.positive[int(table.positive_offsets[i])])
                drawn.append(
                    {"query": store.text(int(table.query[i])), "positive": store.text(positive)}
                )
        kept = "".join(json.dumps(row) + "\n" for row in drawn)
        (self.path / "pairs.jsonl").write_text(kept, "utf-8")
        own: dict[str, Any] = {"token_budget": 4096}
        if chunk:
            own = {"token_budget": chunk * max_length // 2, "graph_memory": 0.0}
        if device != "cpu":
            own |= {"precision": "bf16", "data_threads": 4}
        self.agree = _AGREE if device == "cpu" else 2e-2
        self.about: dict[str, Any] = {
            **settings, "home": str(self.path), "steps": steps, "round": round_, "lr": 2e-5,
            "temperature": 0.05, "dims": list(sizes["dims"]), "max_length": max_length,
            "chunk": chunk, "embkit": own, "device": device,
        }  # fmt: skip

    def case(self, peers: Mapping[str, str], **settings: Any) -> Case:
        """A row of trainers that do this work, round by round."""
        about = self.about
        job = Job({}, about, script="trainers.py")
        running, skipped = job.start(dict(peers))
        ours = job.start_here("embkit")
        facts = {
            "tokens_per_step": round(self.tokens / about["steps"]),
            "isa": isa(),
            "data": corpus.digest(
                np.frombuffer((self.path / "pairs.jsonl").read_bytes(), np.uint8)
            ),
        } | {name: about[name] for name in ("batch_size", "steps", "max_length", "dims")}
        losses: dict[str, list[float]] = {}
        more: dict[str, Any] = {}

        def close() -> None:
            job.close()
            self.home.cleanup()

        def derive(_: Mapping[str, Sample]) -> dict[str, Any]:
            """The losses of all steps, after the last round."""
            for name, found in losses.items():
                _agree(losses["embkit"], found, f"embkit and {name}", self.agree)
            return {
                **more,
                "steps_compared": min(map(len, losses.values())),
                "loss_difference": {
                    name: max(_differences(losses["embkit"], found))
                    for name, found in losses.items() if name != "embkit"
                },
            }  # fmt: skip

        rounds = about["steps"] // about["round"]
        return Case(
            work=self.tokens / rounds,
            ours=partial(_round, ours, losses, "embkit", more),
            rivals={n: partial(_round, rival, losses, n, {}) for n, rival in running.items()},
            check=lambda a, b: _agree(a, b, "the two", self.agree),
            skipped=skipped,
            facts=facts,
            derive=derive,
            rounds=rounds - 1,
            two_threads=False,
            close=close,
            **settings,
        )


def _round(
    rival: Rival, losses: dict[str, list[float]], name: str, more: dict[str, Any]
) -> Reported:
    said = rival.ask("go")
    losses[name] = said["losses"]
    more |= {key: said[key] for key in said if key == "mfu"}
    return Reported(said["losses"], Sample(said["cpu"], said["wall"], said["peak"]))


def _differences(a: list[float], b: list[float]) -> list[float]:
    return [abs(x - y) / max(abs(x), 1e-3) for x, y in zip(a, b, strict=False)]


def _agree(a: list[float], b: list[float], who: str, limit: float) -> None:
    worst = max(_differences(a, b))
    assert worst <= limit, f"losses of {who} differ by {worst:.1e} relative"


def _pairs(count: int, small: bool) -> list[dict[str, str]]:
    """Distinct pairs: titles and texts of mixed lengths, or the demo's pairs when small."""
    found = corpus.pairs_of_text(small)
    if len(found) < count:
        raise corpus.NotBuilt(f"{count} distinct pairs are needed, the corpus has {len(found)}")
    return found[:count]


def step(quick: bool) -> Case:
    """Steps of 256 pairs of mixed lengths, MRL of three widths."""
    work = Work(
        _QUICK if quick else _SIZES, batch_size=64 if quick else 256, steps=15 if quick else 4,
        round_=5 if quick else 1, max_length=96 if quick else 192, small=quick,
    )  # fmt: skip
    return work.case(_PEERS, name="train.step", unit="tokens/s", goal=">= 2.5x")


def loss(quick: bool) -> Case:
    """The loss after 50 steps of 256 pairs: every trainer computes the same."""
    work = Work(
        _QUICK, batch_size=32 if quick else 256, steps=50, round_=25, max_length=96, small=True
    )
    case = work.case(_PEERS, name="train.loss", unit="loss after 50 steps", goal="equal to 1e-4")
    case.score = lambda losses: losses[-1]
    return case


def gradcache(quick: bool) -> Case:
    """One batch of 2048 pairs a step in chunks of 32, MRL of three widths."""
    work = Work(
        _QUICK if quick else _SIX, batch_size=256 if quick else 2048, steps=3,
        round_=1, max_length=96 if quick else 192, small=quick, chunk=32,
    )  # fmt: skip
    peers = {"sentence-transformers, cached": "st-cached"}
    return work.case(peers, name="train.gradcache", unit="tokens/s", goal=">= 2x")


def overhead(quick: bool) -> Case:
    """Share of a step outside forward, loss, backward and optimizer."""
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train import train

    work = Work(
        _QUICK if quick else _SIZES, batch_size=64 if quick else 256, steps=20 if quick else 4,
        round_=1, max_length=96 if quick else 512, small=quick,
    )  # fmt: skip
    encoder = Encoder.from_pretrained(work.path / "model")
    config = Train(batch_size=work.about["batch_size"], steps=work.about["steps"], lr=2e-5)
    found: dict[str, Any] = {}

    def ours() -> Any:
        out = work.path / "overhead"
        options: dict[str, Any] = {"name": "bench", "out": out, "config": config, "fresh": True}
        found["profile"] = train(encoder, work.path / "store", **options)[1]
        return found["profile"]

    def derive(_: Mapping[str, Sample]) -> dict[str, Any]:
        p = found["profile"]
        names = ("wait", "forward", "loss", "backward", "optimizer", "negatives", "other")
        return {"seconds": {n: round(getattr(p, n), 4) for n in names}}

    return Case(
        name="train.overhead", unit="% of a step", work=1.0, ours=ours, rounds=1, goal="<= 5%",
        score=lambda p: 100 * p.overhead, derive=derive, close=work.home.cleanup,
    )  # fmt: skip


def resume(quick: bool) -> Case:
    """From the call to the first batch of a run that is resumed after step 100,000."""
    work = Work(
        _QUICK if quick else _SIZES, batch_size=64 if quick else 256, steps=4, round_=1,
        max_length=96 if quick else 512, small=quick,
    )  # fmt: skip
    first = _resumable(work, at=2, steps=10)
    late = _resumable(work, at=100_000, steps=200_000)

    def derive(_: Mapping[str, Sample]) -> dict[str, Any]:
        return {"at_step_2_s": first().value, "checkpoint_bytes": work.about["checkpoint_bytes"]}

    return Case(
        name="train.resume", unit="s to the first batch", work=1.0, ours=late, goal="< 1 s",
        score=lambda seconds: seconds, derive=derive, rounds=3, close=work.home.cleanup,
    )  # fmt: skip


def _resumable(work: Work, *, at: int, steps: int) -> Callable[[], Reported]:
    """A run with a checkpoint after ``at`` steps, and what resumes it up to its first batch."""
    from embkit import _rust
    from embkit.data import Store
    from embkit.data.batches import Batches
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train import Callback, train

    class Stop(Callback):
        """Ends the run at its second checkpoint, or when it has had its first batch."""

        began = took = 0.0

        def on_checkpoint(self, step: int, path: Path) -> None:
            if step == 2:
                raise InterruptedError

        def on_step(self, step: int, line: Any, speed: Any) -> None:
            if step == at + 1:
                model = speed["seconds"] * (1 - speed["wait"])
                self.took = time.perf_counter() - self.began - model
                raise InterruptedError

    encoder, store = Encoder.from_pretrained(work.path / "model"), Store(work.path / "store")
    size = work.about["batch_size"]
    out = work.path / f"resume-{at}"
    config = Train(batch_size=size, steps=steps, lr=2e-5, checkpoint_every=2)

    def go(stop: Stop) -> None:
        stop.began = time.perf_counter()
        try:
            train(encoder, store, name="bench", out=out, config=config, callbacks=[stop])
        except InterruptedError:
            return
        raise EmbkitError("the run ended")

    go(Stop())
    (folder,) = work.path.glob(f".partial-{out.name}-*")
    made = folder / "checkpoints" / "step-000002"
    work.about["checkpoint_bytes"] = sum(p.stat().st_size for p in made.iterdir())
    if at != 2:  # the state of a run that has come so far, with a log of its length
        line = (folder / "log.jsonl").read_text().splitlines()[-1]
        lines = [line.replace('"step":2,', f'"step":{i + 1},', 1) + "\n" for i in range(at)]
        (folder / "log.jsonl").write_text("".join(lines))
        state = json.loads((made / "state.json").read_text())
        plan = Batches(store, batch_size=size).plan
        cursor = dict(zip(store.task_names, plan.count_before(at), strict=True))
        state |= {"step": at, "cursor": cursor, "log_bytes": len("".join(lines))}
        _rust.write_manifest(str(made / "state.json"), json.dumps(state))
        late = made.rename(made.with_name(f"step-{at:06d}"))
        (late.parent / "LATEST").write_text(late.name + "\n")

    def resumed() -> Reported:
        stop = Stop()
        go(stop)
        return Reported(stop.took, Sample(stop.took, stop.took, 0))

    return resumed


def gpu(quick: bool) -> Case:
    """Steps of 8,192 pairs through BERT-base on a GPU, bf16, in chunks."""
    work = Work(
        _QUICK if quick else _BASE, batch_size=256 if quick else 8192, steps=4, round_=1,
        max_length=96 if quick else 512, small=quick, chunk=128, device=_cuda(),
    )  # fmt: skip
    peers = {"sentence-transformers, cached": "st-cached"}
    return work.case(peers, name="train.gpu", unit="tokens/s", goal=">= 2x")


def gpu_memory(quick: bool) -> Case:
    """Peak of GPU memory at a batch of 65,536 over that at 8,192 and embeddings with gradients."""
    small, large = (256, 2048) if quick else (8192, 65536)
    sizes: dict[str, Any] = _QUICK if quick else _BASE
    found = {}
    for size in (small, large):
        work = Work(
            sizes, batch_size=size, steps=2, round_=1, max_length=96 if quick else 512,
            small=quick, chunk=128, device=_cuda(),
        )  # fmt: skip
        case = work.case({}, name="train.gpu_memory", unit="bytes")
        found[size] = max(case.ours().sample.peak for _ in range(2))
        assert case.close is not None
        case.close()
    more = 2 * 2 * (large - small) * sizes["hidden"] * 4  # two sides, values and gradients, float32
    ratio = found[large] / (found[small] + more)
    return Case(
        name="train.gpu_memory", unit="x the smaller batch's and embeddings'", work=1.0, rounds=1,
        ours=lambda: ratio, score=lambda x: x, goal="<= 1.1x",
        facts={"peak_bytes_by_batch": {str(k): v for k, v in found.items()}},
    )  # fmt: skip


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise ImportError("needs a GPU")
    return "cuda"


CASES: tuple[Callable[[bool], Case], ...] = (
    step, loss, gradcache, bookkeeping, overhead, resume, gpu, gpu_memory,
)  # fmt: skip
