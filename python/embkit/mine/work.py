"""`embkit mine`: the stage. Blocks of queries are finished one by one and survive a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embkit import _rust, container
from embkit.data.loader import Store, as_store
from embkit.data.tables import Array, Examples, offsets_of, owners
from embkit.errors import CorruptError, UsageError, nearest
from embkit.mine import report as reports
from embkit.mine.classes import Classes, digest
from embkit.mine.memory import PER_SKETCH
from embkit.mine.miner import (
    NONE,
    Block,
    Miner,
    Passages,
    added,
    joined,
    reranked,
    room_for,
)
from embkit.mine.rerank import Reranker, as_reranker, identity
from embkit.mine.source import StoreVectors, embed, precomputed
from embkit.progress import Bar, bar, say
from embkit.recipe import Rules
from embkit.stage import stage

if TYPE_CHECKING:
    from embkit.model import Encoder

KIND = "embkit.negatives"
BLOCK_KIND = "embkit.negatives.block"
VERSION = 2  # of the stage: ranks without positives and repeats


def mine(
    encoder: Encoder | Path | str | Sequence[Encoder | Path | str] | None,
    store: Store | Path | str,
    *,
    out: Path | str,
    rules: Rules | None = None,
    embeddings: Path | str | Sequence[Path | str] | None = None,
    reranker: Any = None,
    tasks: Sequence[str] | None = None,
    classes: Mapping[str, Mapping[str, str]] | None = None,
    memory: int = 0,
    threads: int = 0,
    fresh: bool = False,
    **settings: Any,
) -> Path:
    """Mine hard negatives for the retrieval tasks of a store.

    Args:
        encoder: the model that ranks, its full width; or its directory; or several, each of which
            gives its own negatives; or None with ``embeddings``.
        store: a token store made with the encoder's tokenizer.
        out: the directory to publish: one negatives table per task, aligned with its examples.
        rules: what is kept (docs/mining.md); **settings: single rules in place of those.
        embeddings: vectors of every row of the store in its order, from any model: ``.npy``,
            ``.safetensors`` or a folder of shards; several are several miners.
        reranker: ``f(queries, passages) -> scores`` on texts, or an object with ``predict``. The
            stage knows it by its ``name`` (else its class or function): give it a new one, or
            ``fresh=True``, when its answers change.
        tasks: names of retrieval tasks (all).
        classes: by task the class of each text, where queries and passages are texts of classes
            (a labelled set that was turned into pairs): none of a query's own class is its
            negative, nor one whose class is not known.
        memory: bytes for search and rules beside mapped files, models and the result; 0 for a
            default. No effect on the result.
        threads: 0 for all; no effect on the result.
        fresh: do it again even when it is done.

    Returns:
        ``out``.

    Raises:
        UsageError: no retrieval task, an unknown task, a wrong number, another tokenizer,
            embeddings that do not belong to the store, or less memory than mining takes at the
            least. CorruptError: damaged input.
    """
    store = as_store(store)
    chosen = _tasks(store, tasks)
    rules = replace(rules or Rules(), **settings)
    encoders = _encoders(encoder, store)
    paths = _paths(embeddings)
    if not encoders and not paths:
        raise UsageError("There is nothing to mine with.", fix="give a model or embeddings")
    if classes and rules.refill == "random":
        raise UsageError(
            "refill = 'random' draws passages whatever their class, and these tasks have classes: "
            f"{', '.join(classes)}.",
            where="mine.refill",
            fix='set refill = "none" or "relax"',
        )
    params = {
        "models": [e.digest() for e in encoders],
        "rules": asdict(rules),
        "reranker": identity(reranker),
        "tasks": [t.name for t in chosen],
        **({"classes": {n: digest(found) for n, found in classes.items()}} if classes else {}),
    }
    with stage(
        out, name="mine", version=VERSION, params=params, inputs=[store.path, *paths], kind=KIND,
        fresh=fresh,
    ) as work:  # fmt: skip
        if not work.done:
            run = _Run(store, chosen, rules, as_reranker(reranker), memory, threads, work)
            run.classes = {
                table.name: Classes.of(store, np.unique(table.rows()), classes[table.name])
                for table in chosen
                if classes and table.name in classes
            }
            run.all(encoders, paths)
    return Path(out)


def load_negatives(directory: Path | str, task: str) -> tuple[Array, Array, Array, Array]:
    """The table of one task: offsets U64 [m+1], row U64, score F32, rank U32.

    Raises:
        CorruptError: damaged, or no negatives of that task.
    """
    t = load_table(directory, task)
    return t["offsets"], t["row"], t["score"], t["rank"]


def load_table(directory: Path | str, task: str, prefix: str = "negatives") -> dict[str, Array]:
    """All columns of a task's table."""
    directory = Path(directory)
    manifest = container.read_manifest(directory, kind=KIND)
    names = [t["name"] for t in manifest["tasks"]]
    if task not in names:
        raise CorruptError(
            f"No negatives of task {task!r}; {nearest(task, names)}", where=directory
        )
    return container.load(directory / f"{prefix}-{task}.safetensors", kind=KIND)


class _Run:
    """The work of the stage."""

    def __init__(
        self,
        store: Store,
        tables: list[Examples],
        rules: Rules,
        reranker: Reranker | None,
        memory: int,
        threads: int,
        work: Any,
    ) -> None:
        self.store, self.tables, self.rules, self.reranker = store, tables, rules, reranker
        self.memory, self.threads, self.work = memory, threads, work
        self.dir: Path = work.dir
        self.classes: dict[str, Classes] = {}  # by task

    def all(self, encoders: list[Encoder], paths: list[Path]) -> None:
        rows = np.unique(np.concatenate([table.rows() for table in self.tables]))
        miners = [
            embed(self.dir / folder(i), e, self.store, rows) for i, e in enumerate(encoders)
        ] + [self._precomputed(path, encoders) for path in paths]
        total = len(miners) * sum(map(len, self.tables))
        found: dict[str, list[dict[str, Any]]] = {table.name: [] for table in self.tables}
        with bar("Mine", total=total, unit="queries") as progress:
            for number, vectors in enumerate(miners):
                for table in self.tables:
                    found[table.name].append(self._task(number, table, vectors, progress))
        shown: dict[str, Any] = {"rows": len(rows), "tasks": {}}
        for table in self.tables:
            shown["tasks"][table.name] = self._publish(table, found[table.name])
        text = json.dumps(shown, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (self.dir / "report.json").write_text(text + "\n", encoding="utf-8")
        for name in ("blocks", "scratch"):
            shutil.rmtree(self.dir / name, ignore_errors=True)
        tasks = [
            {"name": t.name, "examples": len(t), "negatives": shown["tasks"][t.name]["kept"]}
            for t in self.tables
        ]
        explain = {
            "rules": asdict(self.rules),
            "miners": [folder(i) for i in range(len(encoders))] + [None] * len(paths),
            "reranked": self.reranker is not None,
        }
        self.work.publish(
            {"tasks": tasks, "store": str(self.store.manifest.get("digest")), "explain": explain}
        )

    def _precomputed(self, path: Path, encoders: list[Encoder]) -> StoreVectors:
        vectors = precomputed(path, self.store, None if len(encoders) != 1 else encoders[0])
        vectors.matrix.check()
        return vectors

    def _task(
        self, number: int, table: Examples, vectors: StoreVectors, progress: Bar
    ) -> dict[str, Any]:
        """The negatives that one miner finds for one task."""
        scratch = self.dir / "scratch" / f"corpus-{number}"
        task = Task(
            self.store, table, vectors, self.rules, scratch, self.memory, self.threads,
            self.reranker, self.classes.get(table.name),
        )  # fmt: skip
        if task.miner.searcher.plan is not None:
            say(f"{table.name}: {task.miner.searcher.plan}")
        start, first, parts = progress.done, 0, []
        blocks = self.dir / "blocks"
        blocks.mkdir(exist_ok=True)
        _rust.sweep_tmp(str(blocks))
        while first < len(table):
            prefix = f"{number}-{table.name}-{first:010d}-"
            done = _adopt(blocks, prefix, len(table))
            if done is None:
                last = min(first + task.miner.block, len(table))
                done = task.mine(first, last, _counted(progress, start + first, last - first))
                path = blocks / f"{prefix}{last:010d}.safetensors"
                save_block(path, done)
                done = _read(path)  # mapped: the result so far takes no memory
            parts.append(done)
            first += len(done["offsets"]) - 1
            progress.update(start + first)
        for path in (scratch, scratch.with_name(f"{scratch.name}.q")):
            path.unlink(missing_ok=True)
        say(f"{table.name}: searched with {_shown(parts[0]['search'])}")
        positive = np.concatenate([p["positive"] for p in parts])
        return joined(parts) | {"positive": positive, "search": parts[0]["search"]}

    def _publish(self, table: Examples, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Write a task's table; returns its part of the report."""
        for one in found:
            one["rerank"] = reranked(one)
        columns = together(found, self.rules.ensemble)
        container.save(
            self.dir / f"negatives-{table.name}.safetensors",
            columns,
            kind=KIND,
            metadata={"task": table.name},
        )
        if table.name in self.classes:
            self.classes[table.name].save(self.dir, table.name)
        for number, one in enumerate(found):
            if "rerank_offsets" in one:
                container.save(
                    self.dir / f"reranked-{number}-{table.name}.safetensors",
                    {name: value for name, value in one.items() if name.startswith("rerank_")},
                    kind=KIND,
                    metadata={"task": table.name},
                )
        audits = [one["audit"] for one in found]
        shown = reports.of_task(self.store, table, columns, found[0]["positive"], added(audits))
        shown["search"] = found[0]["search"]
        if len(found) > 1:
            shown["miners"] = [{"audit": one["audit"], "search": one["search"]} for one in found]
        return shown


class Task:
    """One miner in the corpus of one task."""

    def __init__(
        self,
        store: Store,
        table: Examples,
        vectors: StoreVectors,
        rules: Rules,
        scratch: Path,
        memory: int = 0,
        threads: int = 0,
        reranker: Reranker | None = None,
        classes: Classes | None = None,
    ) -> None:
        self.store, self.table, self.vectors = store, table, vectors
        self.classes = classes
        self.rows = np.unique(np.concatenate([table.positive, table.negative]))
        if len(self.rows) < rules.k:
            raise UsageError(
                f"The corpus of task {table.name!r} has {len(self.rows)} passages for "
                f"k = {rules.k} negatives.",
                fix="lower k, or give more passages",
            )
        self.positive = np.searchsorted(self.rows, table.positive).astype(np.uint32)
        cluster = store.cluster(self.rows)
        passages = Passages(
            vectors=vectors.corpus(self.rows, scratch, capped=memory > 0),
            name=self.rows,
            cluster=cluster,
            shards=store.raw if rules.near_duplicate is not None else [],
        )
        sketches = PER_SKETCH * store.rows if rules.near_duplicate is not None else 0
        # One search for equal queries, which are numbered as they come.
        distinct, first, back = np.unique(table.query, return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.place = np.argsort(order)[back.reshape(-1)]
        queries = vectors.corpus(
            distinct[order], scratch.with_name(f"{scratch.name}.q"), capped=memory > 0
        )
        self.miner = Miner(
            passages, queries, rules, room=room_for(table.positive_offsets, self.positive, cluster),
            memory=memory, held=sketches + len(table.positive) * 16, threads=threads,
            reranker=reranker, text=store.text,
            classes=None if classes is None else classes.at(self.rows),
        )  # fmt: skip

    def block(self, first: int, last: int) -> Block:
        """The examples from ``first`` to ``last``."""
        table, vectors = self.table, self.vectors
        span = slice(int(table.positive_offsets[first]), int(table.positive_offsets[last]))
        offsets = table.positive_offsets[first : last + 1] - table.positive_offsets[first]
        query = table.query[first:last]
        own = np.searchsorted(self.rows, query)
        inside = self.rows[np.minimum(own, len(self.rows) - 1)] == query
        mine, its = vectors.at(query[owners(offsets)]), vectors.at(table.positive[span])
        return Block(
            query=self.place[first:last],
            number=np.arange(first, last, dtype=np.uint64),
            own=np.where(inside, own, NONE).astype(np.uint32),
            cluster=self.store.cluster(query),
            text=np.ascontiguousarray(query, np.uint64),
            offsets=offsets,
            positive=self.positive[span],
            score=vectors.matrix.dot(mine, vectors.matrix, its),
            **({} if self.classes is None else {"label": self.classes.at(query)}),
        )

    def mine(self, first: int, last: int, progress: Any = None) -> dict[str, Any]:
        """Their negatives."""
        block = self.block(first, last)
        found = self.miner.mine(block, progress)
        return found | {"positive": block.score, "search": self.miner.report}


def together(found: list[dict[str, Any]], ensemble: str) -> dict[str, Array]:
    """The columns of a table from one or several miners, the first of each before the second."""
    names = ["row", "score", "rank", *(["rerank"] if found[0]["rerank"] is not None else [])]
    if len(found) == 1:
        return {"offsets": found[0]["offsets"]} | {n: found[0][n] for n in names}
    m = len(found[0]["offsets"]) - 1
    example = np.concatenate([owners(one["offsets"]) for one in found])
    sizes = [len(one["row"]) for one in found]
    miner = np.repeat(np.arange(len(found), dtype=np.uint8), sizes)
    starts = [one["offsets"][:-1].astype(np.int64)[owners(one["offsets"])] for one in found]
    place = np.concatenate([np.arange(len(s)) - s for s in starts])
    order = np.lexsort((miner, place, example))
    columns = {n: np.concatenate([one[n] for one in found])[order] for n in names}
    columns["miner"], example = miner[order], example[order]
    if ensemble == "merge":  # the first one stays
        pairs = np.stack([example.astype(np.uint64), columns["row"]])
        _, first = np.unique(pairs, axis=1, return_index=True)
        first.sort()
        example, columns = example[first], {n: c[first] for n, c in columns.items()}
    return {"offsets": offsets_of(np.bincount(example, minlength=m)), **columns}


def folder(number: int) -> str:
    """Where the embeddings of a miner lie."""
    return "embeddings" if number == 0 else f"embeddings-{number}"


def save_block(path: Path, block: dict[str, Any]) -> None:
    """Write a block of queries, whole or not at all."""
    about = {name: json.dumps(block[name]) for name in ("audit", "search")}
    tensors = {name: value for name, value in block.items() if name not in about}
    container.save(path, tensors, kind=BLOCK_KIND, metadata=about)


def _adopt(folder: Path, prefix: str, end: int) -> dict[str, Any] | None:
    """A block from here on that a killed run has finished: the longest that is whole."""
    for path in sorted(folder.glob(f"{prefix}*.safetensors"), reverse=True):
        try:
            block = _read(path)
        except (CorruptError, KeyError, ValueError):
            continue
        if len(block["offsets"]) - 1 + int(prefix.rsplit("-", 2)[1]) <= end:
            return block
    return None


def _read(path: Path) -> dict[str, Any]:
    """A block as it was saved, its arrays mapped."""
    tensors, meta = container.load(path, kind=BLOCK_KIND, verify="open"), container.metadata(path)
    return {**tensors, **{name: json.loads(meta[name]) for name in ("audit", "search")}}


def _shown(report: dict[str, Any]) -> str:
    return ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in report.items()
    )


def _counted(progress: Bar, start: float, most: int) -> Any:
    return lambda done: progress.update(start + min(done, most))


def _encoders(given: Any, store: Store) -> list[Encoder]:
    one = given is None or isinstance(given, (str, Path)) or not isinstance(given, Sequence)
    encoders: list[Any] = []
    for model in [given] if one else given:
        if isinstance(model, (str, Path)):
            from embkit.model import Encoder

            encoders.append(Encoder.from_pretrained(model))
        elif model is not None:
            encoders.append(model)
    for model in encoders:
        if model.tokenizer.fingerprint != store.fingerprint:
            raise UsageError(
                "The encoder and the store have different tokenizers.",
                where=store.path,
                fix="tokenize the records with the encoder's tokenizer",
            )
    return encoders


def _paths(given: Any) -> list[Path]:
    if given is None:
        return []
    return [Path(p) for p in ([given] if isinstance(given, (str, Path)) else given)]


def _tasks(store: Store, names: Sequence[str] | None) -> list[Examples]:
    known = {t["name"]: t["kind"] for t in store.manifest["tasks"]}
    for name in names or ():
        if name not in known:
            raise UsageError(f"Unknown task {name!r}; {nearest(name, known)}")
        if known[name] != "retrieval":
            raise UsageError(f"Task {name!r} is {known[name]}; only retrieval tasks are mined.")
    chosen = [n for n in known if known[n] == "retrieval" and (names is None or n in names)]
    tables = [table for name in chosen if len(table := store.examples(name))]
    if not tables:
        raise UsageError(
            "The store has no retrieval examples to mine for.",
            where=store.path,
            fix="add a task with query and positive columns",
        )
    return tables
