"""BM25 as a baseline: bm25s with its defaults and an English Snowball stemmer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bm25_rank(queries: list[str], corpus: list[str], *, k: int = 100) -> NDArray[np.int64]:
    """Rank a corpus for each query.

    Args:
        queries, corpus: texts.
        k: passages per query, at most the corpus.

    Returns:
        Positions int64 [queries, min(k, corpus)], best first, ties by lower position.
    """
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(
            texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )

    documents = words(corpus)
    if not any(documents):
        return np.tile(np.arange(min(k, len(corpus))), (len(queries), 1))
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    out = np.empty((len(queries), min(k, len(corpus))), np.int64)
    known = index.vocab_dict
    for i, query in enumerate(words(queries)):
        found = [word for word in query if word in known]
        score = index.get_scores(found) if found else np.zeros(len(corpus), np.float32)
        out[i] = np.argsort(-score, kind="stable")[: out.shape[1]]
    return out
