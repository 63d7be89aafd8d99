"""Bench group `synth`: scores by a language model beside one whole forward per pair.

The model has random weights and the shape of SmolLM2-135M with fewer layers: only speed counts.
``EMBKIT_LLM`` names a model directory to take instead.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from embkit.bench import Case, synth_chain, synth_real, synth_write
from embkit.synth.local import Local
from embkit.synth.prompts import load
from embkit.synth.score import graded, query_likelihoods

_N = 10  # candidates of a query


def likelihood(quick: bool) -> Case:
    """Query likelihoods of candidates, few-shot prompt."""
    llm, queries, passages = _work(2 if quick else 8, quick)
    step = load("likelihood").steps[0]
    prompts = [step.render({"passage": p}) for p in passages]

    def ours() -> Any:
        return query_likelihoods(llm, prompts, queries)[0]

    def alone() -> Any:
        return np.array([_whole(llm, p, " " + q) for p, q in zip(prompts, queries, strict=True)])

    return _case("synth.likelihood", llm, prompts, ours, {"one forward per pair": alone})


def grades(quick: bool) -> Case:
    """Expected grades over four labels, few-shot prompt."""
    llm, queries, passages = _work(1 if quick else 2, quick)
    step = load("relevance").steps[0]
    labels = list(step.labels.items())
    prompts = [
        step.render({"query": q, "passage": p}) for q, p in zip(queries, passages, strict=True)
    ]

    def ours() -> Any:
        return graded(llm, prompts, labels)[0]

    def alone() -> Any:
        logs = np.array([[_whole(llm, p, " " + name) for name, _ in labels] for p in prompts])
        weight = np.exp(logs - logs.max(1, keepdims=True))
        return (weight * [value for _, value in labels]).sum(1) / weight.sum(1)

    return _case("synth.grades", llm, prompts, ours, {"one forward per pair and label": alone})


def _case(name: str, llm: Local, prompts: list[str], ours: Any, rivals: Any) -> Case:
    def same(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

    lengths = [len(llm.tokenizer(p)["input_ids"]) for p in prompts]
    return Case(
        name=name, unit="pairs/s", work=len(prompts), ours=ours, rivals=rivals, check=same,
        goal=">= 4x", rounds=3, two_threads=False,
        facts={"pairs": len(prompts), "prompt_tokens": round(float(np.mean(lengths)), 1),
               "layers": llm.model.config.num_hidden_layers, "llm": llm.name},
    )  # fmt: skip


def _whole(llm: Local, prompt: str, continuation: str) -> float:
    """The plain way: everything through the model, for this pair alone."""
    found = llm.tokenizer(
        prompt + continuation, add_special_tokens=False, return_offsets_mapping=True
    )
    ids = torch.tensor([found["input_ids"]])
    counted = [end > len(prompt) for _, end in found["offset_mapping"]][1:]
    with torch.inference_mode():
        logs = llm.model(ids).logits[0, :-1].log_softmax(1)
    values = logs.gather(1, ids[0, 1:, None])[:, 0]
    return float(values[torch.tensor(counted)].double().sum())


def _work(n: int, quick: bool) -> tuple[Local, list[str], list[str]]:
    """A model, n queries with 10 candidates each, of the demo's real texts."""
    from embkit.demo import DATA
    from embkit.synth.passages import read_passages

    passages = read_passages(DATA / "train" / "retrieval.jsonl.zst")[0]
    rng = random.Random(0)
    chosen = [" ".join(p.split()[:120]) for p in rng.sample(passages, n * _N)]
    queries = [" ".join(chosen[i * _N].split()[:8]) for i in range(n) for _ in range(_N)]
    if path := os.environ.get("EMBKIT_LLM"):
        return Local(path), queries, chosen
    return _random_model(passages[:2000], 2 if quick else 6), queries, chosen


def _random_model(texts: list[str], layers: int) -> Local:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    return Local(LlamaForCausalLM(config), tokenizer, chat=False, name="random weights")


CASES = (likelihood, grades, *synth_real.CASES, *synth_write.CASES, *synth_chain.CASES)
