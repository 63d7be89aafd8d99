"""Classes of a task's texts, so that no text is a hard negative of one of its own class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embkit import _rust, container
from embkit.data.loader import Store
from embkit.data.tables import Array

KIND = "embkit.negatives"


@dataclass(frozen=True)
class Classes:
    """Classes of store rows.

    Attributes:
        row: U64 [n], sorted. number: int32 [n], -1 for a text whose class is not known.
    """

    row: Array
    number: Array

    @classmethod
    def of(cls, store: Store, rows: Array, labels: Mapping[str, str]) -> Classes:
        """Of rows (sorted) by the labels of their texts."""
        known = {text.strip(): label for text, label in labels.items()}
        numbers = {label: i for i, label in enumerate(sorted(set(known.values())))}
        found = (known.get(store.text(int(row)).strip()) for row in rows)
        number = [-1 if label is None else numbers[label] for label in found]
        return cls(rows, np.array(number, np.int32))

    def at(self, rows: Array) -> Array:
        """Of some of the rows, int32 of their shape."""
        found: Array = self.number[np.searchsorted(self.row, rows)]
        return found

    def save(self, directory: Path, task: str) -> None:
        """Write what :func:`load_classes` reads."""
        container.save(
            directory / f"classes-{task}.safetensors",
            {"row": self.row, "class": self.number},
            kind=KIND,
            metadata={"task": task},
        )


def load_classes(directory: Path, task: str) -> Classes | None:
    """The classes that negatives were mined with; None where there were none."""
    path = directory / f"classes-{task}.safetensors"
    if not path.is_file():
        return None
    columns = container.load(path, kind=KIND)
    return Classes(columns["row"], columns["class"])


def digest(labels: Mapping[str, str]) -> str:
    """What decides the classes, as a digest."""
    text = json.dumps(labels, sort_keys=True, ensure_ascii=False)
    return str(_rust.blake3(text.encode("utf-8", "surrogatepass")))
