"""Trainers that embkit's is measured beside, each in a long-lived process, all in their own loop.

    python trainers.py PEER FOLDER      peers: embkit, st, st-cached, flag

FOLDER has `job.json` with `home` (model/ in the sentence-transformers layout, store/ for embkit,
pairs.jsonl: the pairs of every batch in the order in which embkit draws them), batch, steps, round,
lr, temperature, dims, lengths, chunk. The process says that it is ready, and then runs `round`
steps for each line on stdin: its trainer stops in a callback and waits for the next line. It
answers with CPU and wall seconds, the growth of its peak of resident memory, and the losses of all
steps so far. Every peer: AdamW without decay, no clipping, constant rate, no dropout; float32 on a
CPU, and bf16 on a GPU, where seconds are those of the clock.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from embkit.bench import _cpu, _peak, _reset_peak


class Gate:
    """Waits for a word before each round, and tells what the round took."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.round, self.steps = about["round"], about["steps"]
        self.losses: list[float] = []
        self.ideal = 0.0  # seconds that the arithmetic of this round takes at the device's peak

    def open(self) -> None:
        """The first word; what came before is not measured."""
        print(json.dumps({"ready": True}), flush=True)
        self._await()

    def step(self) -> None:
        """After every step."""
        if len(self.losses) % self.round == 0:
            took = {"cpu": _cpu() - self.cpu, "wall": time.perf_counter() - self.wall}
            peak = max(_peak() - self.before, 0)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                took = dict.fromkeys(took, time.perf_counter() - self.wall)  # a GPU's time
                peak = torch.cuda.max_memory_allocated()
            said = took | {"peak": peak, "losses": self.losses}
            if self.ideal:
                said["mfu"] = self.ideal / took["wall"]
            print(json.dumps(said), flush=True)
            if len(self.losses) < self.steps:
                self._await()

    def _await(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # the bench is over
        self.before, self.ideal = _reset_peak(), 0.0
        self.cpu, self.wall = _cpu(), time.perf_counter()


def embkit(about: dict[str, Any], gate: Gate) -> None:
    from embkit.model import Encoder
    from embkit.recipe import Train
    from embkit.train import Callback, train

    class Watch(Callback):
        def on_start(self, about: Any) -> None:
            gate.open()

        def on_step(self, step: int, line: Any, speed: Any) -> None:
            gate.losses.append(line["loss"])
            gate.ideal += speed["mfu"] * speed["seconds"]  # whose seconds have the gate's waiting
            gate.step()

    home = Path(about["home"])
    settings = {name: about[name] for name in ("batch_size", "steps", "lr", "temperature", "seed")}
    config = Train(
        **settings, **about["embkit"], schedule="constant", warmup_ratio=0.0, weight_decay=0.0,
        clip_norm=0.0, checkpoint_every=10**6, log_every=10**6,
    )  # fmt: skip
    encoder = Encoder.from_pretrained(home / "model").to(about["device"])
    train(
        encoder, home / "store", name="bench", out=home / "run", config=config, callbacks=[Watch()]
    )


def arguments(kind: Any, about: dict[str, Any], **more: Any) -> Any:
    """Settings of Hugging Face's Trainer, which both rivals are."""
    return kind(
        output_dir=str(Path(about["home"]) / "hf"),
        per_device_train_batch_size=about["batch_size"], max_steps=about["steps"],
        learning_rate=about["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=0.0, optim="adamw_torch_fused", use_cpu=about["device"] == "cpu",
        bf16=about["device"] != "cpu", fp16=False,
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        dataloader_num_workers=0, dataloader_drop_last=True, train_sampling_strategy="sequential",
        **more,
    )  # fmt: skip


def counted(trainer: Any, about: dict[str, Any], gate: Gate, scale: float = 1.0) -> Any:
    """A kind of Trainer that hands its losses and steps to the gate."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            gate.open()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            gate.step()

    class Counted(trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            found = super().compute_loss(*args, **options)
            loss = found[0] if isinstance(found, tuple) else found
            gate.losses.append(scale * float(loss.detach()))
            return found

    def make(**options: Any) -> Any:
        made = Counted(**options)
        made.add_callback(Watch())
        return made

    return make


def pairs(about: dict[str, Any]) -> list[dict[str, str]]:
    lines = (Path(about["home"]) / "pairs.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def sentence_transformers(about: dict[str, Any], gate: Gate, *, cached: bool = False) -> None:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    class InOrder(DefaultBatchSampler):
        def __init__(self, dataset: Any, batch_size: int, **_: Any) -> None:
            super().__init__(SequentialSampler(dataset), batch_size=batch_size, drop_last=True)

        def set_epoch(self, epoch: int) -> None:
            pass

    model = SentenceTransformer(str(Path(about["home"]) / "model"), device=about["device"])
    rows = pairs(about)
    data = Dataset.from_dict({k: [row[k] for row in rows] for k in ("query", "positive")})
    scale = 1 / about["temperature"]
    if cached:
        inner: Any = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=about["chunk"]
        )
    else:
        inner = losses.MultipleNegativesRankingLoss(model, scale=scale)
    loss = losses.MatryoshkaLoss(model, inner, list(about["dims"]))
    args = arguments(Arguments, about, batch_sampler=InOrder)
    make = counted(SentenceTransformerTrainer, about, gate)
    make(model=model, args=args, train_dataset=data, loss=loss).train()


def flag_embedding(about: dict[str, Any], gate: Gate) -> None:
    from FlagEmbedding.abc.finetune.embedder import AbsEmbedderCollator, AbsEmbedderTrainDataset
    from FlagEmbedding.abc.finetune.embedder.AbsArguments import (
        AbsEmbedderDataArguments,
        AbsEmbedderTrainingArguments,
    )
    from FlagEmbedding.finetune.embedder.encoder_only.base.modeling import (
        BiEncoderOnlyEmbedderModel,
    )
    from FlagEmbedding.finetune.embedder.encoder_only.base.trainer import (
        EncoderOnlyEmbedderTrainer,
    )
    from transformers import AutoModel, AutoTokenizer

    home = Path(about["home"])
    file = home / "flag.jsonl"
    rows = [{"query": r["query"], "pos": [r["positive"]], "neg": []} for r in pairs(about)]
    file.write_text("".join(json.dumps({**r, "neg": [""]}) + "\n" for r in rows), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    longest = about["max_length"]
    data = AbsEmbedderTrainDataset(
        AbsEmbedderDataArguments(
            train_data=[str(file)], train_group_size=1, query_max_len=longest,
            passage_max_len=longest, cache_path=str(home / "cache"),
        ),
        tokenizer,
    )  # fmt: skip
    model = BiEncoderOnlyEmbedderModel(
        AutoModel.from_pretrained(home / "model"), tokenizer=tokenizer,
        temperature=about["temperature"], use_mrl=True, mrl_dims=list(about["dims"]),
        sentence_pooling_method="mean", normalize_embeddings=True,
    )  # fmt: skip
    args = arguments(AbsEmbedderTrainingArguments, about, remove_unused_columns=False)
    collate = AbsEmbedderCollator(tokenizer, query_max_len=longest, passage_max_len=longest)
    # Its loss is the mean over the widths; ours and sentence-transformers' are the sum.
    make = counted(EncoderOnlyEmbedderTrainer, about, gate, scale=len(about["dims"]))
    make(
        model=model, args=args, train_dataset=data, data_collator=collate,
        processing_class=tokenizer,
    ).train()  # fmt: skip


def main(peer: str, folder: Path) -> None:
    torch.set_num_threads(1)
    about = json.loads((folder / "job.json").read_text())
    gate = Gate(about)
    if peer == "embkit":
        embkit(about, gate)
    elif peer == "flag":
        flag_embedding(about, gate)
    else:
        sentence_transformers(about, gate, cached=peer == "st-cached")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
