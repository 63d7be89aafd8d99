"""The bundled demo: real text from Debian's archive, as package data.

`DATA` is a data folder like any that `--data` takes (train/, dev/, test/, README.md with licence
and provenance); `make.py` remakes it. Importing this package reads nothing.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
"""The bundled data folder."""
