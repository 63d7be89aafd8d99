"""Mined negatives in a store whose rows have other numbers: their tasks are the same in both.

Relabelling gives some tasks other positives, so a store is made anew and its rows are numbered
anew. What was mined for the other tasks stays true: their texts are there, in the same order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embkit import container
from embkit.container import read_manifest
from embkit.data.loader import as_store
from embkit.data.tables import Array, Examples
from embkit.errors import UsageError
from embkit.mine.work import KIND, load_table
from embkit.stage import stage

_COLUMNS = ("offsets", "row", "score", "rank", "miner")


def carry(
    negatives: Path | str, store: Any, to: Any, *, out: Path | str, fresh: bool = False
) -> Path:
    """Negatives that were mined on ``store``, as a directory for ``to``; a stage.

    Args:
        negatives: what :func:`embkit.mine.mine` published. Reranked candidates stay behind.
        store: the store they were mined on.
        to: a store in which the tasks of the negatives have the same examples in the same order.
        out: the directory to publish.
        fresh: do it again even when it is done.

    Raises:
        UsageError: negatives of another store, or a task that differs between the stores.
    """
    old, new, folder = as_store(store), as_store(to), Path(negatives)
    manifest = read_manifest(folder, kind=KIND)
    if manifest["store"] != str(old.manifest.get("digest")):
        raise UsageError(
            "The negatives were mined on another store.", where=folder, fix="name that store"
        )
    inputs = [folder, old.path, new.path]
    with stage(out, name="carry", params={}, inputs=inputs, kind=KIND, fresh=fresh) as work:
        if not work.done:
            for task in manifest["tasks"]:
                name = task["name"]
                columns = load_table(folder, name)
                before, after = _corpus(old, name), _corpus(new, name)
                same = len(before) == len(after) and bool(
                    (old.text_id(before) == new.text_id(after)).all()
                )
                if not same:
                    raise UsageError(
                        f"Task {name!r} has other examples than the negatives were mined for.",
                        where=new.path,
                        fix="mine again on this store",
                    )
                row_of = np.zeros(old.rows, np.uint64)
                row_of[before] = after
                kept = {c: columns[c] for c in _COLUMNS if c in columns}
                container.save(
                    work.dir / f"negatives-{name}.safetensors",
                    {**kept, "row": row_of[columns["row"]]},
                    kind=KIND,
                    metadata={"task": name},
                )
            work.publish({"tasks": manifest["tasks"], "store": str(new.manifest.get("digest"))})
    return Path(out)


def _corpus(store: Any, name: str) -> Array:
    """Rows of a task's positives, then negatives: all that a negative can be."""
    if name not in store.task_names:
        raise UsageError(f"The store has no task {name!r}.", where=store.path)
    table: Examples = store.examples(name)
    return np.concatenate([table.positive, table.negative])
