"""Fine-tuning as sentence-transformers documents it.

    python recipes_peer.py FOLDER

FOLDER has job.json: `start` (a model directory), `rows` (a JSON lines file per task), `dims`, and
the settings: batch, lr, cached (CachedMultipleNegativesRankingLoss), hard (negatives per pair from
`mine_hard_negatives`, 0 for none), sampler (proportional or round_robin), labels (whether labelled
texts are trained as pairs of a class), scale, seed, steps. Pairs are trained by
MultipleNegativesRankingLoss, scored sentences by CoSENTLoss, each in MatryoshkaLoss; batches
without duplicates; AdamW, linear rate after a tenth of warm-up. Writes model/ and said.json: CPU
seconds of the training and until the end of its first step.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, util
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.training_args import BatchSamplers, MultiDatasetBatchSamplers
from transformers import TrainerCallback

from embkit.bench import _cpu as cpu


def load(about: dict[str, Any]) -> tuple[dict[str, Dataset], list[str]]:
    """A dataset per task, and the names of those with hard negatives to mine."""
    found: dict[str, Dataset] = {}
    pairs = []
    for path in sorted(Path(about["rows"]).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if "label" in rows[0]:
            if about.get("labels"):
                found[path.stem] = Dataset.from_list(same_class(rows, about["seed"]))
            continue
        if "score" not in rows[0]:
            pairs.append(path.stem)
        found[path.stem] = Dataset.from_list(rows)
    return found, pairs


def same_class(rows: list[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Each text with another of its class."""
    draw = random.Random(seed)
    by_label: dict[int, list[str]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["text"])
    out = []
    for texts in by_label.values():
        shuffled = draw.sample(texts, len(texts))
        out += [{"query": a, "positive": b} for a, b in zip(shuffled, shuffled[1:], strict=False)]
    draw.shuffle(out)
    return out


def train(
    about: dict[str, Any], data: dict[str, Dataset], *, steps: int
) -> tuple[Any, float, float]:
    """A model after so many steps, CPU seconds in all and until the end of the first step."""
    marks: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(cpu())

    torch.manual_seed(about["seed"])
    begun = cpu()
    model = SentenceTransformer(about["start"], device="cpu")
    scale = about.get("scale", 20.0)
    if about.get("cached"):
        inner: Any = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=32
        )
    else:
        inner = losses.MultipleNegativesRankingLoss(model, scale=scale)
    ranking = losses.MatryoshkaLoss(model, inner, about["dims"])
    graded = losses.MatryoshkaLoss(model, losses.CoSENTLoss(model), about["dims"])
    by_task = {
        name: graded if "score" in one.column_names else ranking for name, one in data.items()
    }
    kinds = MultiDatasetBatchSamplers
    args = Arguments(
        output_dir=about["hf"], max_steps=steps, seed=about["seed"],
        per_device_train_batch_size=about["batch"], learning_rate=about["lr"],
        warmup_steps=max(1, steps // 10), use_cpu=True, save_strategy="no", report_to=[],
        logging_strategy="no", disable_tqdm=True, batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=(
            kinds.ROUND_ROBIN if about.get("sampler") == "round_robin" else kinds.PROPORTIONAL
        ),
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=by_task, callbacks=[Watch()]
    ).train()
    return model, cpu() - begun, marks[0] - begun


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    about = json.loads((folder / "job.json").read_text()) | {"hf": str(folder / "hf")}
    data, pairs = load(about)
    begun = cpu()
    if about.get("hard"):
        model = SentenceTransformer(about["start"], device="cpu")
        for name in pairs:
            data[name] = util.mine_hard_negatives(
                data[name], model, num_negatives=about["hard"], range_max=64,
                relative_margin=0.05, sampling_strategy="top", output_format="n-tuple",
                use_faiss=False, verbose=False,
            )  # fmt: skip
    mined = cpu() - begun
    model, used, first = train(about, data, steps=about["steps"])
    model.save(str(folder / "model"))
    said = {"cpu": round(used, 3), "first": round(first, 3), "mining": round(mined, 2)}
    (folder / "said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
