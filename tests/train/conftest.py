"""A tiny token store, made from texts that rhyme: enough structure for a loss to fall."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_miner
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from embkit import _rust
from embkit.data import Store
from embkit.data.tables import Examples
from embkit.model import Encoder
from embkit.model.tokens import TextTokenizer
from embkit.recipe import Model
from embkit.stage import stage

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(200)]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Small tensors: more threads only cost time, and the other tests need the cores."""
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(was)


def tiny_tokenizer() -> Tokenizer:
    """Whole words, lower-cased, [CLS] and [SEP] around them."""
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def texts_and_tables(seed: int, examples: int) -> tuple[list[str], list[Examples]]:
    """Pairs that share words (retrieval), graded pairs (sts) and texts of three classes."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []

    def add(words: np.ndarray) -> int:
        texts.append(" ".join(WORDS[int(w)] for w in words))
        return len(texts) - 1

    query, positive, negative = [], [], []
    for _ in range(examples):
        topic = rng.integers(0, 200, 12)
        query.append(add(topic[: rng.integers(2, 6)]))
        positive.append(add(rng.permutation(topic)[: rng.integers(4, 12)]))
        negative.append([add(rng.integers(0, 200, 7)) for _ in range(int(rng.integers(0, 4)))])
    tables = [make_table("retrieval", "retrieval", query, [[p] for p in positive], negative)]
    first = [add(rng.integers(0, 200, 6)) for _ in range(examples)]
    second = [add(rng.integers(0, 200, 6)) for _ in range(examples)]
    score = rng.integers(0, 5, examples).astype(np.float32)
    tables.append(make_table("sts", "sts", first, [[s] for s in second], score=score))
    label = rng.integers(0, 3, examples).astype(np.int32)
    group = [add(rng.integers(60 * c, 60 * c + 60, 5)) for c in label]
    tables.append(make_table("topics", "classification", group, label=label))
    return texts, tables


def make_table(
    name: str,
    kind: str,
    query: list[int],
    positive: list[list[int]] | None = None,
    negative: list[list[int]] | None = None,
    *,
    score: np.ndarray | None = None,
    label: np.ndarray | None = None,
) -> Examples:
    """An examples table from Python lists."""
    m = len(query)

    def jagged(lists: list[list[int]] | None) -> tuple[np.ndarray, np.ndarray]:
        lists = lists or [[] for _ in range(m)]
        counts = np.cumsum([0, *map(len, lists)]).astype(np.uint64)
        return counts, np.array([v for one in lists for v in one], np.uint64)

    p_off, p = jagged(positive)
    n_off, n = jagged(negative)
    return Examples(
        name=name,
        kind=kind,
        query=np.array(query, np.uint64),
        positive_offsets=p_off,
        positive=p,
        negative_offsets=n_off,
        negative=n,
        negative_score=np.full(len(n), np.nan, np.float32),
        score=np.full(m, np.nan, np.float32) if score is None else score,
        label=np.full(m, -1, np.int32) if label is None else label,
        weight=np.ones(m, np.float32),
        provenance=np.zeros(m, np.uint32),
        labels=() if label is None else ("a", "b", "c"),
    )


def write_store(
    out: Path, texts: list[str], tables: list[Examples], *, cluster: np.ndarray | None = None
) -> Store:
    """A store directory as docs/formats.md has it."""
    tokenizer = TextTokenizer(tiny_tokenizer()).json
    n = len(texts)
    text_id = np.arange(n, dtype=np.uint64) * 7 + 1
    raw = [t.encode() for t in texts]
    shard = (
        np.frombuffer(b"".join(raw), np.uint8),
        np.cumsum([0, *map(len, raw)]).astype(np.uint64),
    )
    with stage(out, name="tokenize", params={}, kind="embkit.store", fresh=True) as work:
        done = _rust.tokenize(
            str(work.dir),
            [shard],
            np.arange(n, dtype=np.uint64),
            np.zeros(n, np.uint16),
            [""],
            np.full(n, 2, np.uint8),
            np.zeros(n, np.uint16),
            text_id,
            text_id if cluster is None else cluster,
            tokenizer,
            [32, 32, 32],
        )
        for i, one in enumerate(tables):
            one.save(work.dir, index=i)
        (work.dir / "tokenizer").mkdir(exist_ok=True)
        (work.dir / "tokenizer" / "tokenizer.json").write_text(tokenizer, "utf-8")
        fingerprint = _rust.blake3_file(str(work.dir / "tokenizer" / "tokenizer.json"))
        work.publish(
            {
                "tasks": [
                    {"name": t.name, "kind": t.kind, "labels": list(t.labels), "examples": len(t)}
                    for t in tables
                ],
                "sources": [],
                "tokenizer": {"fingerprint": fingerprint, "vocab_size": 205, "backend": "test"},
                "prompts": {"query": "", "passage": ""},
                "max_length": {"query": 32, "passage": 32},
                "counts": {"rows": n, "tokens": done["tokens"], "shards": 1},
            }
        )
    return Store(out)


@pytest.fixture
def table() -> Callable[..., Examples]:
    """Makes an examples table from Python lists."""
    return make_table


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """Makes a store of three tasks from a seed, or one of the texts and tables given."""

    def make(seed: int, examples: int, *, copies: int = 1) -> Store:
        texts, tables = texts_and_tables(seed, examples)
        rng = np.random.default_rng(seed)
        cluster = rng.integers(0, max(len(texts) // copies, 1), len(texts)).astype(np.uint64)
        clusters = None if copies == 1 else cluster + np.uint64(2**63)
        return write_store(tmp_path / f"store-{seed}-{examples}", texts, tables, cluster=clusters)

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """90 examples of each of three tasks."""
    return write_store(tmp_path_factory.mktemp("data") / "store", *texts_and_tables(0, 90))


@pytest.fixture(scope="session")
def ranked(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of ranked negatives for the store: those of ``fake_miner.py`` for no weights."""
    model = tmp_path_factory.mktemp("ranked")
    (model / "model.safetensors").write_bytes(b"")
    fake_miner.main(str(store.path), str(model), str(model / "mined"))
    return model / "mined"


@pytest.fixture(scope="session")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """60 examples of each task: copies among the texts, and every ninth text four times as long."""
    texts, tables = texts_and_tables(7, 60)
    texts = [" ".join([t] * (4 if i % 9 == 0 else 1)) for i, t in enumerate(texts)]
    cluster = np.random.default_rng(7).integers(0, len(texts) // 6, len(texts)).astype(np.uint64)
    return write_store(tmp_path_factory.mktemp("skewed") / "store", texts, tables, cluster=cluster)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny encoder for the tiny stores."""
    return tiny_encoder().export(tmp_path_factory.mktemp("tiny") / "model")


def tiny_encoder(**settings: Any) -> Encoder:
    """Settings of recipe.Model by name."""
    sizes: dict[str, Any] = {
        "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "dims": (32, 16, 8),
    }  # fmt: skip
    return Encoder.from_config(
        Model(**{**sizes, **settings}),
        tiny_tokenizer(),
        max_length={"query": 32, "passage": 32},
    )


@pytest.fixture
def make_encoder() -> Callable[..., Encoder]:
    """Makes a tiny encoder for the tiny store; settings of recipe.Model by name."""
    return tiny_encoder


@pytest.fixture(scope="session")
def dev(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A retrieval set and a graded set of texts of the store."""
    folder = tmp_path_factory.mktemp("dev")
    query, corpus = [[store.text(2 * i + k) for i in range(40)] for k in (0, 1)]
    parts: dict[str, list[dict[str, Any]]] = {
        "retrieval/pairs/queries": [{"_id": f"q{i}", "text": t} for i, t in enumerate(query)],
        "retrieval/pairs/corpus": [{"_id": f"d{i}", "text": t} for i, t in enumerate(corpus)],
        "retrieval/pairs/qrels": [
            {"query_id": f"q{i}", "corpus_id": f"d{i}", "score": 1} for i in range(40)
        ],
        "sts/alike": [
            {"sentence1": a, "sentence2": b, "score": i % 5}
            for i, (a, b) in enumerate(zip(query, corpus, strict=True))
        ],
    }
    for name, rows in parts.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
