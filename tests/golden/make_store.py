"""Write a whole tiny store: ``python tests/golden/make_store.py DIR``.

``store-v1/`` beside this script is one that the first released version wrote. Unlike the single
files it is not repeated byte for byte, because its digest covers every parameter of the stage: it
is there to be read, by every later version.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from embkit import data

RETRIEVAL = [
    {"query": "plain words", "positive": ["naïve café", "你好"], "negative": ["other words"]},
    {"query": "café", "positive": "naïve café"},
]
CLASSES = [{"text": "plain words", "label": "a"}, {"text": "other words", "label": "b"}]
VOCABULARY = {"[UNK]": 0, "plain": 1, "words": 2, "café": 3, "naïve": 4, "q": 5, ":": 6, "other": 7}
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"},
}  # fmt: skip


def main(out: Path) -> None:
    """Publish the store as ``out``."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, rows in (("pairs", RETRIEVAL), ("classes", CLASSES)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        (work / "tokenizer").mkdir()
        (work / "tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
        records = data.read([work / "pairs.jsonl", work / "classes.jsonl"]).save(work / "records")
        data.tokenize(
            records, out=out, tokenizer=work / "tokenizer", max_length_query=3,
            max_length_passage=4, prompts={"query": "q: "},
        )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
