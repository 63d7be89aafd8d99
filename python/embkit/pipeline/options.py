"""What a recipe says as arguments of the stages, for `embkit run` and the single verbs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import recipe as recipes
from embkit.errors import UsageError, nearest
from embkit.pipeline.llm import written_tasks
from embkit.recipe import Recipe, Task

if TYPE_CHECKING:
    from embkit.data import Records, Store
    from embkit.data.sources import Source
    from embkit.model import Encoder
    from embkit.train import Miner


def data_folder(recipe: Recipe) -> Path:
    """The data folder of a recipe: its own, or the bundled demo data.

    Raises:
        UsageError: a folder without train, dev or test.
    """
    bundled = Path(__file__).parents[1] / "demo" / "data"
    folder = Path(recipe.data.path) if recipe.data.path else bundled
    if not folder.is_dir():
        raise FileNotFoundError(2, "No such data folder", str(folder))
    for part in ("train", "dev", "test"):
        if not (folder / part).is_dir():
            raise UsageError(
                f"The data folder has no {part}/.",
                where=folder,
                fix="lay it out as docs/quickstart.md shows: train/, dev/ and test/",
            )
    return folder


def training_files(folder: Path, *, needed: bool = True) -> list[str]:
    """The record files of a data folder's train/, by name.

    Raises:
        UsageError: there is none, and one is needed.
    """
    files = sorted(
        str(p) for p in (folder / "train").iterdir() if p.is_file() and not p.name.startswith(".")
    )
    if not files and needed:
        raise UsageError(
            "There is no training file.",
            where=folder / "train",
            fix="put one file per task there: .jsonl, .jsonl.zst, .jsonl.gz or .parquet",
        )
    return files


def read_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.read`."""
    return {"max_rejected": recipe.data.max_rejected, "tasks": recipe.tasks}


def kinds_of(records: Records) -> dict[str, str]:
    """The kind of each task of saved records."""
    return {task["name"]: task["kind"] for task in records.manifest["tasks"]}


def mined_tasks(recipe: Recipe, store: Store) -> list[str]:
    """The retrieval tasks of a store whose hard negatives are mined; the others have their own."""
    kinds = {name: store.task(name)["kind"] for name in store.task_names}
    return [
        name
        for name, kind in kinds.items()
        if kind == "retrieval" and recipe.tasks.get(name, Task()).mined
    ]


def mined_classes(recipe: Recipe, tasks: Sequence[str]) -> dict[str, dict[str, str]]:
    """Classes of the texts of those tasks that are labelled sets turned into pairs, whose mined
    negatives must be of other classes; from the files of the data folder."""
    from embkit.data.sources import classes_of, find, of_tasks

    labelled = _labelled(recipe, tasks)
    if not labelled:
        return {}
    files = training_files(data_folder(recipe))
    found: dict[str, dict[str, str]] = {name: {} for name in labelled}
    made = written_tasks(recipe)
    own = {name: task for name, task in recipe.tasks.items() if name not in made}
    for source in of_tasks(find(files, task=None, kind="auto"), own):
        if source.task in found:
            found[source.task] |= classes_of(source)
    return found


def _labelled(recipe: Recipe, tasks: Sequence[str]) -> list[str]:
    rules = {name: recipe.tasks.get(name, Task()).convert.rule for name in tasks}
    return [name for name, rule in rules.items() if rule == "classes"]


def relabelled_tasks(recipe: Recipe, store: Store, mined: Sequence[str]) -> list[str]:
    """The tasks that the relabel stage gives new positives and negatives.

    Args:
        mined: tasks whose hard negatives are mined otherwise; the default, without labelled sets.

    Raises:
        UsageError: there is none, or one that the recipe names is no retrieval task.
    """
    if not recipe.relabel.on:
        return []
    pairs = [name for name in mined if not recipe.tasks.get(name, Task()).convert.on]
    found = list(recipe.relabel.tasks or pairs)
    known = [name for name in store.task_names if store.task(name)["kind"] == "retrieval"]
    for name in found:
        if name not in known:
            raise UsageError(
                f"relabel.tasks names {name!r}, no retrieval task; {nearest(name, known)}"
            )
    if not found:
        raise UsageError(
            "There is no retrieval task to relabel.", fix="name one in relabel.tasks, or leave it"
        )
    return found


def dedup_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.dedup`."""
    return dict(recipes.to_table(recipe)["dedup"])


def filter_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.filter`."""
    from embkit.data import FilterRules, ScoreFilter

    f = recipe.filter
    score = None
    if f.score_model is not None:
        score = ScoreFilter(model=f.score_model, threshold=f.min_score)
    return {
        "rules": FilterRules.preset(f.preset, f.rules),
        "languages": list(f.languages) or None,
        "action": f.action,
        "score": score,
    }


def task_texts(
    recipe: Recipe, tasks: Sequence[str], written: Sequence[Source] = ()
) -> dict[str, str]:
    """What the rows of some tasks say in the place of ``{task_text}``, by query.

    Args:
        written: sources beside the files of the data folder.
    """
    from embkit.data.sources import find, task_texts_of

    files = training_files(data_folder(recipe), needed=False)
    sources = [*(find(files, task=None, kind="auto") if files else []), *written]
    found: dict[str, str] = {}
    for source in sources:
        if source.task in tasks:
            found = {**task_texts_of(source), **found}
    return found


def tokenizer_options(
    recipe: Recipe, kinds: Mapping[str, str], written: Sequence[Source] = ()
) -> dict[str, Any]:
    """Keyword arguments of :func:`embkit.data.tokenize` for records of such tasks.

    Args:
        written: by a language model, where a prompt has what their rows say.
    """
    from embkit.data.task_texts import TASK_TEXT

    t = recipe.tokenizer
    task_prompts = recipe.task_prompts(kinds)
    own = [name for name, sides in task_prompts.items() if TASK_TEXT in sides.get("query", "")]
    return {
        "tokenizer": t.path or recipe.model.path,
        "vocab_size": t.vocab_size,
        "max_length_query": t.max_length_query,
        "max_length_passage": t.max_length_passage,
        "prompts": t.prompts("retrieval"),
        "task_prompts": task_prompts,
        **({"task_texts": task_texts(recipe, own, written)} if own else {}),
        "end_token": t.end_token,
        "prompt_dropout": any(
            train.prompt_dropout > 0
            for train in (recipe.prefinetune, *map(recipe.run_config, range(len(recipe.runs))))
        ),
    }


def miner(recipe: Recipe, store: Path, *, given: Sequence[str] = ()) -> Miner:
    """How a refresh mines during fine-tuning: `embkit mine` with the recipe's rules.

    Args:
        given: tasks whose negatives a language model has chosen.
    """
    from embkit.train import Miner

    options = dict(recipes.to_table(recipe)["mine"])
    settings = [
        word for key, value in options.items() for word in ("--set", f"mine.{key}={_toml(value)}")
    ]

    own = dict.fromkeys([*(n for n, t in recipe.tasks.items() if not t.mined), *given])
    plain = recipes.to_table(recipe)["tasks"]
    mined = [name for name in recipe.tasks if name not in own]
    labelled = _labelled(recipe, mined)
    told = {
        **{name: {"negatives": "given"} for name in own},
        **{name: plain[name] for name in labelled},
    }
    if told:
        settings += ["--set", f"tasks={_toml(told)}"]
    if labelled and recipe.data.path is not None:  # where their classes are
        settings += ["--set", f"data.path={_toml(recipe.data.path)}"]

    def command(model: Path, out: Path) -> list[str]:
        words = [sys.executable, "-m", "embkit", "mine", str(model), str(store)]
        return [*words, "--out", str(out), "--recipe", "quickstart", *settings]

    return Miner(command=command, params={**options, **({"given": sorted(own)} if own else {})})


def start_encoder(recipe: Recipe, store: Store, *, model: str | None = None) -> Encoder:
    """The encoder that training starts from: ``model``, the recipe's path, or a new small BERT."""
    from embkit.model import Encoder, Tuning

    t = recipe.tokenizer
    sides: dict[str, Any] = {
        "max_length": {"query": t.max_length_query, "passage": t.max_length_passage},
        "prompts": recipe.encoder_prompts(),
    }
    path = model or recipe.model.path
    if path is None:
        return Encoder.from_config(recipe.model, store.path / "tokenizer", **sides)
    m = recipe.model
    sides |= {"dims": m.dims, "pooling": m.pooling, "tuning": Tuning.from_recipe(m)}
    if t.end_token:  # the model's own tokenizer does not have it
        sides["tokenizer"] = store.path / "tokenizer"
    if not m.include_prompt:
        sides["include_prompt"] = False
    if model is None:  # a model that is given has had its changes
        sides |= {"bidirectional": m.bidirectional, "soft_mask_steps": m.soft_mask_steps}
        sides |= {"keep_layers": m.keep_layers, "new_head": m.new_head, "seed": m.seed}
        sides["projection_hidden"] = m.projection_hidden
    return Encoder.from_pretrained(path, **sides)


def _toml(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
