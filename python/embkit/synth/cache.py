"""Answers of a server on disk, by the content of the request: a restart pays for nothing twice."""

from __future__ import annotations

import json
import sqlite3
import threading
import weakref
from pathlib import Path
from typing import Any

from embkit import _rust
from embkit.errors import UsageError


class Cache:
    """A key-value file that any number of threads and processes share.

    Keys are digests of path and body of a request, model and parameters included. Each value is
    kept with its own digest; one that is damaged counts as missing.

    Args:
        path: an SQLite file, made when it is not there.

    Raises:
        UsageError: the file is something else.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(str(self.path), timeout=60, check_same_thread=False)
            weakref.finalize(self, self._db.close)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, digest TEXT, value TEXT)"
            )
            self._db.commit()
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"The request cache cannot be used: {error}.", where=path, fix="name another file"
            ) from error

    @staticmethod
    def key(path: str, body: Any) -> str:
        """The key of a request."""
        text = json.dumps([path, body], sort_keys=True, ensure_ascii=False)
        return _rust.blake3(text.encode())

    def get(self, key: str) -> Any:
        """The value, or None."""
        with self._lock:
            row = self._db.execute(
                "SELECT digest, value FROM answers WHERE key = ?", (key,)
            ).fetchone()
        if row is None or _rust.blake3(f"{key} {row[1]}".encode()) != row[0]:
            return None
        return json.loads(row[1])

    def put(self, key: str, value: Any) -> None:
        """Keep a value of JSON types; whole or absent whenever the process ends."""
        text = json.dumps(value, ensure_ascii=False)
        digest = _rust.blake3(f"{key} {text}".encode())
        with self._lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, digest, text))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
