"""The model card: README.md of an export, with metadata that the Hugging Face hub reads.

What the weights do not say comes from a :class:`Card`: of a whole run (:meth:`Card.of_run`), or of
a file the user wrote (:meth:`Card.read`). Nothing is guessed: what is not known is left out, and a
data set without a stated licence is listed as such.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import embkit
from embkit.errors import UsageError, nearest
from embkit.model.encoder import Encoder
from embkit.model.portable import OWN_FLAG, needed_transformers
from embkit.model.projection import linears

# Kind of an evaluation set -> the hub's task and its name.
_TASKS = {
    "retrieval": ("information-retrieval", "Retrieval"),
    "sts": ("semantic-similarity", "Semantic similarity"),
    "classification": ("text-classification", "Classification"),
    "reranking": ("reranking", "Reranking"),
    "clustering": ("clustering", "Clustering"),
}
_LOCAL = re.compile(r'"(?:/|~/|\.\.?/)[^"\n]*?([^"/\n]+)/?"')


@dataclass(frozen=True)
class Data:
    """A training set: its name, licence (``""`` when not known), address, and examples."""

    name: str
    license: str = ""
    url: str = ""
    examples: int = 0


@dataclass(frozen=True)
class Card:
    """What a card says beside the model itself.

    Args:
        base_model: hub id of the model that training began with; ``""`` for random weights.
        language: ISO 639 codes. license: of the weights, as the hub names it (``apache-2.0``).
        data: the training sets.
        recipe: the recipe as TOML.
        scores: set -> ``{"type": kind, "metric": name, "widths": {width: value in percent}}``.
        soup: which runs were averaged: ``{"select", "kept", "weights", "candidates"}``.
    """

    base_model: str = ""
    language: Sequence[str] = ()
    license: str = ""
    data: Sequence[Data] = ()
    recipe: str = ""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    soup: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | str, *, base: Card | None = None) -> Card:
        """A card file: TOML with base_model, language, license, and ``[[data]]`` tables.

        Args:
            base: what the file does not say comes from here.

        Raises:
            UsageError: no such file, no TOML, or a key that a card does not have.
        """
        file = Path(path)
        try:
            given = tomllib.loads(file.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"No card: {error}", where=file, fix="give a TOML file") from error
        known = ("base_model", "language", "license", "data")
        for key in given:
            if key not in known:
                raise UsageError(f"Unknown key {key!r}; {nearest(key, known)}", where=file)
        sets = given.get("data", [])
        names = [f.name for f in dataclasses.fields(Data)]
        for entry in sets:
            wrong = [k for k in entry if k not in names]
            if wrong or not entry.get("name"):
                raise UsageError(
                    f"A [[data]] table has {names}, name at least; this one {list(entry)}.",
                    where=file,
                )
        language = given.get("language", [])
        given["language"] = [language] if isinstance(language, str) else language
        if sets:
            given["data"] = _merged([Data(**entry) for entry in sets], base.data if base else ())
        return dataclasses.replace(base or cls(), **{k: v for k, v in given.items() if v})

    @classmethod
    def of_run(
        cls, folder: Path | str, *, result: Mapping[str, Any] | None = None, soup: str = ""
    ) -> Card:
        """The card of a run of ``embkit run``: its recipe, data, scores and soup.

        Args:
            folder: the run's directory.
            result: what result.json will hold, when it is not written yet.
            soup: its name in ``result``; default: the recipe's.
        """
        root = Path(folder)
        found = dict(result if result is not None else _json(root / "result.json"))
        text = (root / "recipe.toml").read_text("utf-8") if _is_run(root) else ""
        recipe = tomllib.loads(text)
        soups = found.get("soup", {})
        mixed = "mixed with the start"  # the last of the soups where there is one
        chosen = soup or (mixed if mixed in soups else recipe.get("soup", {}).get("select", ""))
        counts = _json(root / "clean" / "report.json").get("examples", {})
        sources = _json(root / "store" / "manifest.json").get("sources", [])
        sets = [str(s.get("task") or s.get("name")) for s in sources if isinstance(s, dict)]
        return cls(
            base_model=_hub_id(str(recipe.get("model", {}).get("path", ""))),
            data=[
                Data(name, examples=int(counts.get(name, {}).get("after", 0)))
                for name in dict.fromkeys(sets)
            ],
            recipe=_without_paths(text),
            scores=_scores(found.get("scores", {}), f"soup, {chosen}"),
            soup=soups.get(chosen, {}),
        )


def find(model: Path | str) -> Card:
    """The card of the run or soup that a model directory lies in; an empty one for any other."""
    root = Path(model).resolve()
    for folder in (root, root.parent):
        if _is_run(folder) and (folder / "result.json").is_file():
            return Card.of_run(folder)
        if (report := _json(folder / "report.json")).get("kept"):
            return Card(soup=report)
    return Card()


def write(encoder: Encoder, title: str, card: Card, *, onnx: Sequence[str] = ()) -> str:
    """The text of README.md.

    Args:
        title: the model's name, and what a user loads it by.
        onnx: ONNX files of the export.
    """
    parts = [
        f"---\n{_metadata(encoder, title, card)}\n---\n",
        f"# {title}\n",
        _about(encoder),
        _usage(encoder, title, onnx),
        _attention(encoder),
        _score_table(card),
        _training(card),
        _environment(),
    ]
    return "\n".join(part for part in parts if part)


def _metadata(encoder: Encoder, title: str, card: Card) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=_TASKS.get(found["type"], (found["type"], ""))[0],
            task_name=_TASKS.get(found["type"], ("", found["type"]))[1],
            dataset_type=name,
            dataset_name=name,
            metric_type=str(found["metric"]),
            metric_name=f"{found['metric']} (width {width})",
            metric_value=round(float(value), 2),
        )
        for name, found in card.scores.items()
        for width, value in found["widths"].items()
    ]
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "embkit"]
    if len(encoder.dims) > 1:
        tags.append("matryoshka")
    given: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": tags,
        "base_model": card.base_model or None,
        "language": list(card.language) or None,
        "license": card.license or None,
        "datasets": [d.name for d in card.data if _hub_id(d.name) and "/" in d.name] or None,
    }
    if results:
        given |= {"model_name": title, "eval_results": results}
    return str(ModelCardData(**given).to_yaml()).strip()


def _about(encoder: Encoder) -> str:
    widths = ", ".join(map(str, encoder.dims))
    matryoshka = (
        f" Its first {widths} numbers are embeddings of their own (Matryoshka), to be normalised\n"
        "again after the cut."
        if len(encoder.dims) > 1
        else ""
    )
    length = max(encoder.max_length.values())
    lines = [
        f"A text-embedding model trained with embkit {embkit.__version__}. It maps a text to a "
        f"unit vector of\nwidth {encoder.width}.{matryoshka}\n",
        f"- Pooling: {encoder.pooling}; projection: {_head(encoder)}",
        f"- Longest text: {length} tokens (queries were trained with "
        f"{encoder.max_length['query']})",
        f"- Prompts: query {encoder.prompts['query']!r}, passage {encoder.prompts['passage']!r}",
        "- Similarity: cosine\n",
    ]
    return "\n".join(lines)


def _usage(encoder: Encoder, title: str, onnx: Sequence[str]) -> str:
    cut = f", truncate_dim={encoder.dims[-1]}" if len(encoder.dims) > 1 else ""
    parts = [
        f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({title!r}{cut})
queries = model.encode(["a question"], prompt_name="query", normalize_embeddings=True)
passages = model.encode(["a text", "another"], prompt_name="document", normalize_embeddings=True)
print(model.similarity(queries, passages))
```

To train it further:

```python
from embkit.model import Encoder

encoder = Encoder.from_pretrained({title!r})
```
"""
    ]
    if onnx:
        files = ", ".join(f"`{name}`" for name in onnx)
        parts.append(
            f"For ONNX Runtime: {files}, from `input_ids` and `attention_mask` to "
            "`last_hidden_state`\n(the states before pooling) and `sentence_embedding` (pooled, "
            "projected, of unit length).\n"
        )
    return "\n".join(parts)


def _head(encoder: Encoder) -> str:
    widths = [layer.out_features for layer in linears(encoder.projection)]
    if len(widths) > 1:
        return f"{len(widths)} linear layers, {' -> '.join(map(str, widths))}"
    return "linear" if widths else "none"


def _attention(encoder: Encoder) -> str:
    """What the reader of a converted language model has to know."""
    if encoder.opening < 1:
        return f"""## Attention

Unfinished: the soft mask of this model is {encoder.opening:.0%} open. Only embkit computes it;
sentence-transformers would let every token see every other.
"""
    needs = needed_transformers(encoder)
    if not needs:
        return ""
    own = getattr(encoder.backbone.config, "model_type", "") in OWN_FLAG
    flags = '"use_bidirectional_attention": true' + ("" if own else ' and `"is_causal": false')
    return f"""## Attention

Bidirectional: a language model was turned into an encoder. `config.json` says so by
`{flags}`. **transformers {needs} or newer is needed**: a library
that does not know the key runs the model with causal attention and gives other embeddings, without
an error. To be sure, embed two texts that differ in the last word alone and compare the states of
their first token: they must differ.
"""


def _score_table(card: Card) -> str:
    if not card.scores:
        return ""
    widths = list(dict.fromkeys(w for found in card.scores.values() for w in found["widths"]))
    rows = [
        f"| {name} | {found['metric']} | "
        + " | ".join(f"{found['widths'][w]:.2f}" if w in found["widths"] else "" for w in widths)
        + " |"
        for name, found in card.scores.items()
    ]
    head = f"| test set | metric | {' | '.join(map(str, widths))} |"
    line = "|---|---|" + "---:|" * len(widths)
    return "\n".join(["## Scores by width (percent)\n", head, line, *rows, ""])


def _training(card: Card) -> str:
    parts = []
    if card.base_model:
        parts.append(f"It began with `{card.base_model}`.\n")
    if card.data:
        parts.append("| training data | examples | licence |\n|---|---:|---|")
        for one in card.data:
            name = f"[{one.name}]({one.url})" if one.url else one.name
            parts.append(f"| {name} | {one.examples or ''} | {one.license or 'not stated'} |")
        parts.append("")
    if card.soup.get("kept"):
        parts.append(
            f"The weights are an average ({card.soup.get('select', 'soup')}) of {_kept(card)}."
        )
        tried = [c for c in card.soup.get("candidates", []) if c.get("dev") is not None]
        scores = [f"{c['run']} {c['dev']:.2f}" for c in tried if "run" in c]
        if scores and card.soup.get("dev") is not None:
            parts.append(f"On dev alone: {', '.join(scores)}; the average: {card.soup['dev']:.2f}.")
        parts.append("")
    if card.recipe:
        parts.append(
            "<details><summary>The recipe (<code>embkit run</code> repeats it)</summary>\n\n"
            f"```toml\n{card.recipe.strip()}\n```\n\n</details>\n"
        )
    return "\n".join(["## Training\n", *parts]) if parts else ""


def _kept(card: Card) -> str:
    """The runs of a soup, each with its weight."""
    kept, weights = list(card.soup["kept"]), list(card.soup.get("weights") or [])
    if len(weights) != len(kept):
        return ", ".join(map(str, kept))
    return ", ".join(f"{name} ({w:.3g})" for name, w in zip(kept, weights, strict=True))


def _environment() -> str:
    import tokenizers
    import torch
    import transformers

    versions = {
        "embkit": embkit.__version__, "Python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }  # fmt: skip
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"## Environment\n\nExported with {said}.\n"


def _scores(scores: Mapping[str, Any], model: str) -> dict[str, dict[str, Any]]:
    """The main score of each test set at each width, widest first."""
    from embkit.evaluate import MAIN

    out: dict[str, dict[str, Any]] = {}
    for name, found in scores.get("test", {}).get(model, {}).get("tasks", {}).items():
        widths: dict[str, float] = {}
        metric = str(MAIN.get(str(found.get("type", "")), ""))
        for width in sorted(found.get("widths", {}), key=int, reverse=True):
            main = found["widths"][width].get(metric)
            if isinstance(main, int | float):
                widths[str(width)] = float(main)
        if widths:
            out[str(name)] = {
                "type": str(found.get("type", "")), "metric": metric, "widths": widths
            }  # fmt: skip
    return out


def _merged(said: Sequence[Data], known: Sequence[Data]) -> list[Data]:
    """The user's words on each set, with the counts of the run."""
    counts = {one.name: one.examples for one in known}
    out = [dataclasses.replace(d, examples=d.examples or counts.get(d.name, 0)) for d in said]
    return out + [one for one in known if one.name not in {d.name for d in said}]


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file()


def _hub_id(name: str) -> str:
    """The name where it can be a hub id, else ``""``: a path of this machine says nothing there."""
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) else ""


def _without_paths(text: str) -> str:
    """A recipe without the folders of the machine it ran on."""
    return _LOCAL.sub(r'".../\1"', text)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
