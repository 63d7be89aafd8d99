"""Bench group `adapters`: what is gained by one changed import in a sentence-transformers script.

Losses are timed from embeddings to their gradients, both ways by the classes themselves around a
model that only hands embeddings on; what the model takes comes on top for both.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, RandomSampler

from embkit.bench import Case, isa
from embkit.bench.corpus import pairs, texts
from embkit.bench.mine_end import _Given

WIDTHS = (768, 512, 256, 128, 64)
_PEER = "sentence-transformers"


def _modules() -> tuple[Any, Any]:
    """The losses of either side; ImportError where sentence-transformers is missing or old."""
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError as error:
        raise ImportError("sentence-transformers 6 is not installed") from error
    from embkit.integrations import sentence_transformers as ours

    return ours, losses


class _Model(nn.Module):
    """Gives the embeddings that stand in the features under its name."""

    max_seq_length = 8

    def __init__(self, name: str = "model") -> None:
        super().__init__()
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        self.name = name
        made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")

    def __getitem__(self, place: int) -> nn.Module:
        return nn.Identity()  # the original looks at its first module

    def get_embedding_dimension(self) -> None:
        return None

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features[self.name]}


def _columns(count: int, rows: int, width: int, seed: int = 0) -> list[Tensor]:
    """Queries, and columns of documents near them, but not so near that no loss is left."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, width, generator=generator) for _ in range(count)]
    return [made[0], *[made[0] + (3 + i) * column for i, column in enumerate(made[1:])]]


Way = Callable[[], list[Tensor]]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """The loss, and the gradient of each column."""
    for a, b in zip(ours, theirs, strict=True):
        far = float((a - b).norm() / b.norm().clamp_min(1e-30))
        assert far <= 1e-4, f"relative difference {far:.1e}"


def _case(name: str, ways: list[Way], **facts: Any) -> Case:
    return Case(
        name=f"adapters.{name}", unit="ms", measure="cpu", work=1.0, ours=ways[0],
        rivals={_PEER: ways[1]}, check=_same, facts={**facts, "isa": isa()}, two_threads=False,
    )  # fmt: skip


def _through(loss: Any, columns: list[Tensor], guides: list[Tensor] | None, labels: Any) -> Way:
    """A loss of texts: forward and backward."""

    def run() -> list[Tensor]:
        leaves = [column.clone().requires_grad_() for column in columns]
        features = [{"model": leaf} for leaf in leaves]
        for feature, guide in zip(features, guides or (), strict=False):
            feature["guide"] = guide
        value = loss(features, labels)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def _of_chunks(loss: Any, columns: list[Tensor], guides: list[Tensor] | None, size: int) -> Way:
    """The loss between the two passes of a cached one, which leaves gradients of each chunk."""

    def run() -> list[Tensor]:
        chunks = [[c.clone().requires_grad_() for c in column.split(size)] for column in columns]
        more = [] if guides is None else [[list(guide.split(size)) for guide in guides]]
        value = loss.calculate_loss(chunks, *more, with_backward=True)
        return [value.detach(), *(torch.cat([c.grad for c in column]) for column in chunks)]

    return run


def ranking(quick: bool) -> Case:
    """MultipleNegativesRankingLoss with one hard negative a row."""
    rows, width = (128, 64) if quick else (1024, 768)
    columns = _columns(3, rows, width)
    ways = [
        _through(m.MultipleNegativesRankingLoss(_Model()), columns, None, None) for m in _modules()
    ]
    return _case("ranking", ways, n=rows, d=width, columns=3)


def ranking_gte(quick: bool) -> Case:
    """The same in all four directions."""
    rows, width = (128, 64) if quick else (1024, 768)
    columns = _columns(2, rows, width)
    four = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    ways = [
        _through(m.MultipleNegativesRankingLoss(_Model(), directions=four), columns, None, None)
        for m in _modules()
    ]
    return _case("ranking.gte", ways, n=rows, d=width, columns=2)


def matryoshka(quick: bool) -> Case:
    """MatryoshkaLoss around it, five widths."""
    rows = 128 if quick else 1024
    columns = _columns(2, rows, WIDTHS[0])
    ways = []
    for m in _modules():
        model = _Model()
        inner = m.MultipleNegativesRankingLoss(model)
        ways.append(_through(m.MatryoshkaLoss(model, inner, WIDTHS), columns, None, None))
    return _case("matryoshka", ways, n=rows, d=WIDTHS[0], dims=WIDTHS)


def cached(quick: bool) -> Case:
    """The loss of CachedMultipleNegativesRankingLoss, mini-batches of 32."""
    rows, width = (256, 64) if quick else (4096, 768)
    columns = _columns(2, rows, width)
    losses = [
        m.CachedMultipleNegativesRankingLoss(_Model(), mini_batch_size=32) for m in _modules()
    ]
    ways = [_of_chunks(loss, columns, None, 32) for loss in losses]
    return _case("cached", ways, n=rows, d=width, chunk=32)


def cached_matryoshka(quick: bool) -> Case:
    """The same within MatryoshkaLoss, five widths."""
    rows = 256 if quick else 2048
    columns = _columns(2, rows, WIDTHS[0])
    ways = []
    for m in _modules():
        model = _Model()
        inner = m.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)
        m.MatryoshkaLoss(model, inner, WIDTHS)
        ways.append(_of_chunks(inner, columns, None, 32))
    return _case("cached.matryoshka", ways, n=rows, d=WIDTHS[0], dims=WIDTHS, chunk=32)


def guided(quick: bool) -> Case:
    """GISTEmbedLoss with a negative a row; model and guide are equally wide."""
    rows, width = (48, 32) if quick else (256, 384)
    columns, guides = _columns(3, rows, width), _columns(3, rows, width, seed=1)
    ways = [
        _through(m.GISTEmbedLoss(_Model(), _Model("guide")), columns, guides, None)
        for m in _modules()
    ]
    return _case("guided", ways, n=rows, d=width, columns=3)


def cached_guided(quick: bool) -> Case:
    """The loss of CachedGISTEmbedLoss, mini-batches of 32."""
    rows, width = (64, 32) if quick else (512, 384)
    columns, guides = _columns(2, rows, width), _columns(2, rows, width, seed=1)
    losses = [
        m.CachedGISTEmbedLoss(_Model(), _Model("guide"), mini_batch_size=32) for m in _modules()
    ]
    ways = [_of_chunks(loss, columns, guides, 32) for loss in losses]
    return _case("cached.guided", ways, n=rows, d=width, chunk=32)


def cosent(quick: bool) -> Case:
    """CoSENTLoss of 26 gold scores within MatryoshkaLoss, five widths."""
    rows = 64 if quick else 512
    columns = _columns(2, rows, WIDTHS[0])
    labels = torch.randint(0, 26, (rows,), generator=torch.Generator().manual_seed(0)) / 25
    ways = []
    for m in _modules():
        model = _Model()
        outer = m.MatryoshkaLoss(model, m.CoSENTLoss(model), WIDTHS)
        ways.append(_through(outer, columns, None, labels))
    return _case("cosent", ways, n=rows, d=WIDTHS[0], dims=WIDTHS)


# ---------------------------------------------------------------- data


def _rows(quick: bool) -> Any:
    """Texts as passages; their first four words, which repeat, as queries."""
    from datasets import Dataset

    passages = list(texts(quick))
    passages = passages if quick else passages[:60_000]
    return Dataset.from_dict(
        {"anchor": [" ".join(t.split()[:4]) for t in passages], "positive": passages}
    )


def no_duplicates(quick: bool) -> Case:
    """An epoch of no-duplicate batches of 256, hashing included; the same batches, row for row."""
    ours, _ = _modules()
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    data = _rows(quick)
    logging.getLogger("datasets").setLevel(logging.ERROR)

    def way(kind: Any, **options: Any) -> Callable[[], list[list[int]]]:
        return lambda: list(
            kind(data, 32 if quick else 256, True, [], torch.Generator(), 0, **options)
        )

    def check(a: Any, b: Any) -> None:
        assert a == b, "batches differ"

    return Case(
        name="adapters.no_duplicates", unit="rows/s", work=len(data),
        ours=way(ours.NoDuplicatesBatchSampler),
        rivals={
            _PEER: way(NoDuplicatesBatchSampler),
            f"{_PEER}, hashed": way(NoDuplicatesBatchSampler, precompute_hashes=True),
        },
        check=check, facts={"n": len(data)}, two_threads=False,
    )  # fmt: skip


def single_task(quick: bool) -> Case:
    """An epoch's order of batches of 64 from four datasets; the same batches of every dataset."""
    ours, _ = _modules()
    from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler

    sizes = [n // 100 if quick else n for n in (640_000, 320_000, 64_000, 6_400)]
    rows: list[Any] = [range(n) for n in sizes]
    parts: Any = ConcatDataset(rows)

    def way(kind: Any) -> Callable[[], list[list[int]]]:
        def run() -> list[list[int]]:
            generator = torch.Generator().manual_seed(0)
            inner = [
                DefaultBatchSampler(RandomSampler(range(n), generator=generator), 64, False)
                for n in sizes
            ]
            return list(kind(parts, inner, generator=generator, seed=0))

        return run

    def check(a: Any, b: Any) -> None:
        ends = np.cumsum(sizes)
        counts = [Counter(int(np.searchsorted(ends, r[0], "right")) for r in x) for x in (a, b)]
        assert counts[0] == counts[1], "batches of the datasets differ"
        assert sorted(map(len, a)) == sorted(map(len, b)), "sizes of batches differ"

    return Case(
        name="adapters.single_task", unit="rows/s", work=sum(sizes),
        ours=way(ours.SingleTaskBatchSampler), rivals={_PEER: way(ProportionalBatchSampler)},
        check=check, facts={"n": sum(sizes), "tasks": len(sizes)}, two_threads=False,
    )  # fmt: skip


def mine(quick: bool) -> Case:
    """mine_hard_negatives from embeddings to a dataset of triplets, 7 negatives below 95%."""
    ours, _ = _modules()
    from datasets import Dataset
    from sentence_transformers import util

    made = pairs(1_000 if quick else 16_000, 384, quick)
    model = _Given(made.query_vectors, made.passage_vectors, made.queries, made.passages)
    data = Dataset.from_dict(
        {"anchor": made.queries, "positive": [made.passages[i] for i in made.positive.tolist()]}
    )

    def way(function: Any, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            random.seed(0)
            silent = contextlib.redirect_stderr(io.StringIO())
            with silent:
                return function(
                    data, model, corpus=made.passages, relative_margin=0.05, num_negatives=7,
                    verbose=False, **options,
                )  # fmt: skip

        return run

    def check(a: Any, b: Any) -> None:
        found = [set(zip(x["anchor"], x["negative"], strict=True)) for x in (a, b)]
        share = len(found[0] & found[1]) / max(map(len, found))
        assert share > 0.995, f"{share:.2%} of the negatives are the same"  # scores that tie

    rivals = {_PEER: way(util.mine_hard_negatives)}
    skipped = {}
    try:
        import faiss  # noqa: F401

        rivals[f"{_PEER}, faiss"] = way(util.mine_hard_negatives, use_faiss=True)
    except ImportError:
        skipped["faiss"] = "faiss-cpu is not installed"
    return Case(
        name="adapters.mine", unit="queries/s", work=len(made.queries),
        ours=way(ours.mine_hard_negatives), rivals=rivals, skipped=skipped, check=check,
        facts={"n": len(made.passages), "d": 384, "k": 7, "isa": isa()}, two_threads=False,
    )  # fmt: skip


def dedup(quick: bool) -> Case:
    """dedup(method="exact") of a dataset a tenth of which is there twice; the same rows stay.

    The near-duplicates are those of the row `dedup.near`.
    """
    ours, _ = _modules()
    import pandas
    from datasets import concatenate_datasets

    data = _rows(quick).filter(lambda row: row["positive"].isascii() and row["anchor"].strip())
    data = concatenate_datasets([data, data.select(range(len(data) // 10))]).flatten_indices()

    def embkit() -> Any:
        return ours.dedup(data, method="exact")

    def with_pandas() -> Any:
        frame = data.to_pandas()
        forms = frame.map(lambda text: " ".join(text.lower().split()))
        kept = frame[~forms.duplicated()]
        return type(data).from_pandas(kept, preserve_index=False)

    def check(a: Any, b: Any) -> None:
        assert list(a["positive"]) == list(b["positive"]), "other rows stay"

    return Case(
        name="adapters.dedup", unit="rows/s", work=len(data), ours=embkit,
        rivals={f"pandas {pandas.__version__} on normalised text": with_pandas}, check=check,
        facts={"n": len(data)}, two_threads=False,
    )  # fmt: skip


CASES = (
    ranking, ranking_gte, matryoshka, cached, cached_matryoshka, guided, cached_guided, cosent,
    no_duplicates, single_task, mine, dedup,
)  # fmt: skip
