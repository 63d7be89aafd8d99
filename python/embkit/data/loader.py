"""Open a token store: tokens by row through Rust, example tables as numpy columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from embkit import _rust, container
from embkit.data.tables import Array, Examples, Shard, shard_paths
from embkit.errors import CorruptError
from embkit.stage import check_files, inside

KIND = "embkit.store"


class Store:
    """A token store on disk, mapped, checked at open.

    Args:
        directory: what :func:`embkit.data.tokenize` has written.
        verify: when block checksums are compared: ``"first-touch"``, ``"open"`` or ``"off"``.

    Raises:
        CorruptError: not a store, a shard is missing or has another length or header, or the
            tokenizer is not the one the tokens were made with. FormatError: a newer version.
    """

    def __init__(self, directory: Path | str, *, verify: str = "first-touch") -> None:
        self.path = Path(directory)
        self.verify = verify
        self.manifest: dict[str, Any] = container.read_manifest(self.path, kind=KIND)
        files = self.manifest["files"]
        shards = {name: record for name, record in files.items() if _is_shard(name)}
        check_files(self.path, {"files": {n: r for n, r in files.items() if n not in shards}})
        _check_there(self.path, shards)
        if verify == "open":  # Rust looks at the shards only
            for task in self.manifest["tasks"]:
                container.load(self.path / Examples.file(task["name"]), verify=verify)
        # Rust compares each shard with its record when it opens it: once, however many there are.
        self.rows_store = _rust.Store(str(self.path), verify, _infos(self.path, shards))
        rows = int(self.manifest["counts"]["rows"])
        if int(self.rows_store.rows) != rows:
            raise CorruptError(
                f"The shards hold {self.rows_store.rows} rows, the manifest says {rows}.",
                where=self.path,
                fix="run tokenize again with --fresh",
            )
        tokenizer = files.get("tokenizer/tokenizer.json", {})  # compared with its record above
        if tokenizer.get("blake3") != self.fingerprint:
            raise CorruptError(
                "tokenizer.json is not the one the tokens were made with.",
                where=self.path / "tokenizer",
                fix="run tokenize again with --fresh",
            )

    @property
    def dir(self) -> Path:
        """The directory; the same as ``path``."""
        return self.path

    def __fspath__(self) -> str:
        return str(self.path)

    def __getstate__(self) -> dict[str, Any]:
        """What a spawned worker needs: it opens the files itself."""
        return {"directory": self.path.absolute(), "verify": self.verify}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["directory"], verify=state["verify"])  # type: ignore[misc]

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        counts = self.manifest["counts"]
        return f"Store({str(self.path)!r}, rows={counts['rows']}, tokens={counts['tokens']})"

    # ------------------------------------------------------------ what the manifest says

    @property
    def fingerprint(self) -> str:
        """BLAKE3 of tokenizer.json."""
        return str(self.manifest["tokenizer"]["fingerprint"])

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's directory."""
        return self.path / "tokenizer"

    @property
    def prompts(self) -> dict[str, str]:
        """The prompt of each role, already in the tokens."""
        return dict(self.manifest["prompts"])

    @property
    def task_prompts(self) -> dict[str, dict[str, str]]:
        """Prompts of single tasks, by task and side, already in the tokens."""
        return {task: dict(own) for task, own in self.manifest.get("task_prompts", {}).items()}

    @property
    def has_plain_rows(self) -> bool:
        """Whether every text has a row without its prompt too, as prompt dropout needs."""
        return bool(
            self.manifest.get(
                "plain_rows", not any(self.prompts.values()) and not self.task_prompts
            )
        )

    @property
    def max_length(self) -> dict[str, int]:
        """Tokens kept per role."""
        return dict(self.manifest["max_length"])

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks, in manifest order."""
        return [t["name"] for t in self.manifest["tasks"]]

    @property
    def task_sizes(self) -> dict[str, int]:
        """Examples of each task, in manifest order."""
        return {t["name"]: int(t["examples"]) for t in self.manifest["tasks"]}

    def task(self, name: str) -> dict[str, Any]:
        """What the manifest says of a task: name, kind, examples, labels.

        Raises:
            KeyError: no such task.
        """
        for task in self.manifest["tasks"]:
            if task["name"] == name:
                return dict(task)
        raise KeyError(f"no task {name!r}; there are {', '.join(self.task_names)}")

    def examples(self, name: str) -> Examples:
        """The examples of one task, in store rows.

        Raises:
            KeyError: no such task. CorruptError: the table is damaged.
        """
        return Examples.load(self.path, self.task(name), rows=self.rows)

    def tasks(self) -> dict[str, Examples]:
        """The examples of every task."""
        return {name: self.examples(name) for name in self.task_names}

    # ------------------------------------------------------------ rows

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.rows_store.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.rows_store.tokens)

    def lengths(self, rows: Array) -> Array:
        """Tokens of each row, u32 [n]."""
        return self.rows_store.lengths(_u64(rows))

    def text_id(self, rows: Array) -> Array:
        """Identity of each row's text, u64 [n]."""
        return self.rows_store.text_id(_u64(rows))

    def cluster(self, rows: Array) -> Array:
        """Near-duplicate cluster of each row's text, u64 [n]."""
        return self.rows_store.cluster(_u64(rows))

    def role(self, rows: Array) -> Array:
        """0 query, 1 passage, 2 both, u8 [n]."""
        return self.rows_store.role(_u64(rows))

    def prompt_len(self, rows: Array) -> Array:
        """Tokens of the prompt, BOS or CLS included, u16 [n]."""
        return self.rows_store.prompt_len(_u64(rows))

    def gather(self, rows: Array, out_tokens: Array, out_cu_seqlens: Array) -> None:
        """Fill packed tokens [T] and cu_seqlens int32 [n+1]."""
        self.rows_store.gather(_u64(rows), out_tokens, out_cu_seqlens)

    def gather_padded(self, rows: Array, out_ids: Array, out_mask: Array, pad_id: int) -> int:
        """Fill the front of flat buffers with padded ids and mask [n, L]; returns L."""
        return self.rows_store.gather_padded(_u64(rows), out_ids, out_mask, pad_id)

    def text(self, row: int) -> str:
        """The original text of a row."""
        return str(self.rows_store.text(int(row)))

    @cached_property
    def raw(self) -> list[Shard]:
        """The original texts of all rows as (text, offsets) shards."""
        shards = []
        for path in shard_paths(self.path, "raw"):
            columns = container.load(path, kind="embkit.raw")
            shards.append((columns["text"], columns["offsets"]))
        return shards

    def texts(self) -> Iterator[str]:
        """The original text of every row, in order."""
        for text, offsets in self.raw:
            data, ends = text.tobytes(), offsets.tolist()
            for a, b in zip(ends[:-1], ends[1:], strict=True):
                yield data[a:b].decode()


def as_store(store: Any) -> Store:
    """A Store from itself or its directory."""
    return store if isinstance(store, Store) else Store(store)


def _is_shard(name: str) -> bool:
    return name.startswith(("texts-", "raw-")) and "/" not in name


def _check_there(directory: Path, shards: Mapping[str, Any]) -> None:
    """Raise CorruptError unless each shard is a file of its own in the directory."""
    with os.scandir(directory) as found:
        plain = {entry.name for entry in found if entry.is_file(follow_symlinks=False)}
    for name in shards:
        if name not in plain and inside(directory, name):  # which refuses links and paths
            raise CorruptError(
                "A file that the manifest lists is missing.",
                where=directory / name,
                fix="copy the directory again, or run its stage again with --fresh",
            )


def _infos(directory: Path, shards: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """The manifest's records of the shards as Rust takes them."""
    try:
        return {
            name: (int(one["length"]), int(one["header_crc"]), int(one["crc_crc"]))
            for name, one in shards.items()
        }
    except (KeyError, TypeError, ValueError):
        raise CorruptError(
            "The manifest has no usable record of a shard.", where=directory
        ) from None


def _u64(rows: Any) -> Array:
    return np.ascontiguousarray(rows, np.uint64)
