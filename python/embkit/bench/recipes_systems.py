"""Rows `recipes.NAME` of whole systems: a recipe file run from raw text to exported model.

Each system is its small form (`extends`) with the names of real tasks and the sizes of a run of a
minute or two on one core: nothing of the method is changed. Beside it stands sentence-transformers,
from an encoder with the same random weights, on the same cleaned texts, in two stages as ours, each
in the CPU seconds that ours took. Both are scored on test/ of
:mod:`embkit.bench.recipes_systems_data`. Runs are kept in the cache: a table goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embkit import _rust
from embkit.bench import Case
from embkit.bench import recipes_data as real
from embkit.bench import recipes_systems_data as folders
from embkit.bench.recipes_peer import cpu
from embkit.bench.recipes_rows import case_of, found

if TYPE_CHECKING:
    from embkit.recipe import Recipe

_VERSION = 1  # of what a run is
_SEEDS = (0, 1, 2)
_PROBE = 16  # steps from which the cost of a step is taken
_PREPARED = ("records", "clean", "filtered", "store")  # stages that no seed changes
_MODEL = {"hidden": 128, "layers": 1, "heads": 4, "intermediate": 256}
_PRE = {"steps": 70, "batch_size": 256, "lr": 3e-3}
_FINE = {"steps": 40, "lr": 1e-3, "cosent_scale": 5.0}
_LENGTHS = {"max_length_query": 32, "max_length_passage": 64}
_OTHER = {"classification": "off"}  # the demo's task


@dataclass(frozen=True, kw_only=True)
class System:
    """A recipe on real data.

    Attributes:
        recipe: the paper's form by name; its small form is extended.
        data: english, chinese, three, or demo.
        table: settings over the small form: names of tasks and sizes.
        pre: tasks of the pre-finetuning. fine, sts, labels: of the fine-tuning, by kind, for
            sentence-transformers (:func:`embkit.bench.recipes_peer.export`).
        vocabulary: "xlm-r" for that of a real model, cut to the pieces that the data use.
        runs: of the fine-tuning, for the soup.
    """

    recipe: str
    data: str
    table: Mapping[str, Any]
    pre: tuple[str, ...]
    fine: tuple[str, ...]
    sts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    vocabulary: str = ""
    seeds: tuple[int, ...] = field(default=_SEEDS)
    runs: int = 1


def _even(names: tuple[str, ...], share: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(names, share / len(names))


def systems() -> dict[str, System]:
    """The systems by the name of their row."""
    english: dict[str, Any] = {
        "pre": ("debian_desc", "foldoc", "tldr_page"),
        "fine": ("debian_desc", "foldoc", "tldr_page", "medquad", "tldr_code"),
        "sts": ("stsb",),
        "labels": folders.LABELS,
    }
    longer = {**_FINE, "steps": 80}
    common = {
        "tokenizer": _LENGTHS,
        "model": {**_MODEL, "dims": [128, 64, 32]},
        "prefinetune": {**_PRE, "tasks": _even(english["pre"])},
    }
    own = {"in_batch": False, "same_tower": False}
    classes = {"symmetric": True, "description": "classification", "convert": {"rule": "classes"}}
    gecko = {
        **common,
        "tasks": {**_OTHER, **dict.fromkeys(folders.LABELS, classes)},
        "mine": {"candidates": 64},
        "finetune": {**longer, "losses": {**_OTHER, **dict.fromkeys(folders.LABELS, own)}},
    }
    gemini = {
        **common,
        "mine": {"candidates": 64},
        "finetune": longer,
        "mix": {"candidates": 3, "steps": 15, "alone": 15},
    }
    shares = {**_even(english["fine"], 0.5), **_even(folders.LABELS, 0.2), "stsb": 0.3}
    conan_v2 = {
        **common,
        "tasks": {
            **_OTHER,
            **dict.fromkeys(folders.LABELS, {"convert": {"rule": "classes", "negatives": 40}}),
        },
        "finetune": {**longer, "tasks": shares, "batch_sizes": {"stsb": 256}},
    }
    chinese = ("cmrc", "drcd", "snli", "ocnli")
    conan = {
        "tokenizer": {"max_length_query": 40, "max_length_passage": 96},
        "tasks": {
            **_OTHER,
            "tnews": {"convert": {"rule": "classes", "negatives": 40}},
        },
        "model": _MODEL,
        "prefinetune": {**_PRE, "tasks": _even((*chinese, "debian"))},
        "finetune": {
            **_FINE,
            "parts": [
                {
                    "tasks": {**_even(chinese, 0.8), "tnews": 0.2},
                    "batch_size": 48, "hard_negatives": 4, "in_batch": False,
                },
                {"tasks": {"stsb": 1.0}, "batch_size": 128, "weight": 0.8},
            ],
        },
    }  # fmt: skip
    described = tuple(f"desc-{x}" for x in folders.THREE)
    three = {
        **common,
        "prefinetune": {**_PRE, "tasks": _even(described)},
        "tasks": {**_OTHER, "bitext": {"symmetric": True, "description": "translation"}},
        "mine": {"candidates": 64},
        "finetune": {**_FINE, "losses": _OTHER},
    }
    return {
        "gecko": System(recipe="gecko", data="english", table=gecko, **english),
        "gemini": System(recipe="gemini", data="english", table=gemini, **english),
        "conan": System(
            recipe="conan", data="chinese", table=conan, pre=(*chinese, "debian"), fine=chinese,
            sts=("stsb",), labels=("tnews",),
        ),
        "conan-v2": System(recipe="conan-v2", data="english", table=conan_v2, **english),
        "qwen3": System(
            recipe="qwen3", data="english", table={**common, "finetune": longer}, runs=2, **english
        ),
        "embedding-gemma": System(
            recipe="embedding-gemma", data="english", table=gemini, **english
        ),
        "gecko-three": System(
            recipe="gecko", data="three", table=three, pre=described,
            fine=(*described, "jaquad", "bitext"), vocabulary="xlm-r",
        ),
    }  # fmt: skip


class Bench:
    """Runs of a system and of its peer in one folder, and their scores."""

    def __init__(
        self, home: Path, data: Path, system: System, *,
        tokenizer: Path | None = None, model: Path | None = None,
    ) -> None:  # fmt: skip
        self.data, self.system, self.tokenizer, self.model = data, system, tokenizer, model
        self.home = home / f"{system.recipe}-{system.data}-{self._digest()[:8]}"

    def _digest(self) -> str:
        from embkit.stage import digest_of

        parts = [_VERSION, self.system.table, digest_of(self.data)]
        parts += [digest_of(path) for path in (self.tokenizer, self.model) if path]
        return _rust.blake3(json.dumps(parts, sort_keys=True).encode())

    def recipe(self, seed: int) -> Path:
        """The recipe file of a seed, which decides the weights and the order of both stages."""
        import tomli_w

        table: dict[str, Any] = json.loads(json.dumps(self.system.table))
        table |= {
            "extends": f"{self.system.recipe}-small",
            "name": f"{self.system.recipe} on {self.system.data}",
            "data": {"path": str(self.data)},
            "evaluate": {"bm25": False},
            "runs": [{"seed": seed + 10 * i} for i in range(self.system.runs)],
        }
        table["model"]["seed"] = table["prefinetune"]["seed"] = seed
        if self.tokenizer is not None:
            table["tokenizer"]["path"] = str(self.tokenizer)
        if self.model is not None:
            table["model"]["path"] = str(self.model)
        path = self.home / f"recipe-{seed}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(tomli_w.dumps(table), "utf-8")
        return path

    def ours(self, seed: int) -> dict[str, Any]:
        """Run the recipe; scores of the exported model, and CPU seconds by stage.

        What comes before training is the first seed's: texts, vocabulary and store are the same.
        """
        from embkit import pipeline

        out = self.home / f"ours-{seed}"
        kept = out.with_suffix(".json")
        if not kept.is_file():
            source = self.recipe(seed)
            shutil.rmtree(out, ignore_errors=True)  # what a run that was stopped had used is gone
            for name in _PREPARED if seed != self.system.seeds[0] else ():
                made = self.home / f"ours-{self.system.seeds[0]}" / name
                if made.is_dir():
                    shutil.copytree(made, out / name)
            marks: list[tuple[str, float]] = []
            done = pipeline.run(source, out=out, on_stage=lambda name: marks.append((name, cpu())))
            marks.append(("", cpu()))
            spent = {a: round(t - s, 2) for (a, s), (_, t) in zip(marks, marks[1:], strict=False)}
            about = {"stages": spent, "cpu": sum(self.budgets(spent)), "before": before(done)}
            self._keep(kept, {**about, **self.score(out / "model")})
        return dict(json.loads(kept.read_text()))

    def budgets(self, spent: Mapping[str, float]) -> tuple[float, float]:
        """CPU seconds of our two stages: with tokenization, and with mining and the mixture."""
        late = ("mine", "mix", "finetune")
        return (
            spent["tokenize"] + spent["prefinetune"],
            sum(spent.get(name, 0.0) for name in late),
        )

    def peer(self, seed: int) -> dict[str, Any]:
        """sentence-transformers in two stages; its steps are those of the first seed."""
        from embkit import recipe
        from embkit.bench import recipes_peer
        from embkit.model import Encoder

        out = self.home / f"peer-{seed}"
        kept = out.with_suffix(".json")
        if not kept.is_file():
            out.mkdir(parents=True, exist_ok=True)
            chosen, first = recipe.load(self.recipe(seed)), self.system.seeds[0]
            early, late = self.budgets(self.ours(first)["stages"])
            store = self.home / f"ours-{first}" / "store"
            t = chosen.tokenizer
            lengths = {"query": t.max_length_query, "passage": t.max_length_passage}
            start = Encoder.from_config(chosen.model, store / "tokenizer", max_length=lengths)
            model = start.export(out / "start")
            said: list[dict[str, Any]] = []
            steps = self.peer(first)["steps"] if seed != first else None
            for i, (tasks, config, budget) in enumerate(
                (
                    (_Tasks(fine=self.system.pre), chosen.prefinetune, early),
                    (self.system, chosen.finetune, late),
                )
            ):
                rows = recipes_peer.export(self._clean(), self.home / f"pairs-{i}", tasks)
                settings = {"batch": 256 if i == 0 else 128, "lr": config.lr, "labels": True}
                settings |= {"scale": 1 / config.temperature, "seed": seed}
                stage, dims = out / f"stage-{i}", chosen.model.dims
                asked = steps[i] if steps else _steps(model, rows, stage, settings, dims, budget)
                settings["steps"] = asked
                said.append(
                    {**recipes_peer.run(model, rows, stage, settings, dims=dims), "steps": asked}
                )
                model = stage / "model"
            about = {"cpu": sum(s["cpu"] for s in said), "steps": [s["steps"] for s in said]}
            self._keep(kept, {**about, **self.score(model)})
        return dict(json.loads(kept.read_text()))

    def first(self) -> Recipe:
        """The recipe of the first seed."""
        from embkit import recipe

        return recipe.load(self.recipe(self.system.seeds[0]))

    def _clean(self) -> Path:
        run = self.home / f"ours-{self.system.seeds[0]}"
        return run / "filtered" if (run / "filtered").is_dir() else run / "clean"

    def score(self, model: Path) -> dict[str, Any]:
        """Scores of a model on test/ at the full and the narrowest width."""
        from embkit.bench.recipes_cells import scores_of
        from embkit.evaluate.tasks import load_split
        from embkit.model import Encoder

        chosen = self.first()
        t, dims = chosen.tokenizer, chosen.model.dims  # the peer's model tells neither
        lengths = {"query": t.max_length_query, "passage": t.max_length_passage}
        encoder = Encoder.from_pretrained(model, max_length=lengths)
        widths = sorted({max(dims), min(dims)}, reverse=True)
        return scores_of(encoder, load_split(self.data / "test"), widths)

    def _keep(self, path: Path, content: Mapping[str, Any]) -> None:
        _rust.publish_file(str(path), (json.dumps(content) + "\n").encode())


def _steps(
    model: Path,
    rows: Path,
    out: Path,
    settings: Mapping[str, Any],
    dims: tuple[int, ...],
    budget: float,
) -> int:
    """Steps of sentence-transformers that CPU seconds allow, from a probe that is not counted."""
    from embkit.bench import recipes_peer

    said = recipes_peer.run(model, rows, out, {**settings, "steps": _PROBE}, dims=dims)
    step = (said["cpu"] - said["first"]) / (_PROBE - 1)
    return max(1, round((budget - said["first"]) / step))


@dataclass(frozen=True)
class _Tasks:
    """Names of tasks as :func:`embkit.bench.recipes_peer.export` takes them."""

    fine: tuple[str, ...]
    sts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


def before(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Scores by kind at the full width of the models that came before the exported one."""
    scores = result["scores"]["test"]
    width = str(max(result["dims"]))
    names = ("start" if "start" in scores else "untrained", "pre-finetuned", "fine-tuned 0")
    return {
        name: {kind: by_width[width] for kind, by_width in scores[name]["types"].items()}
        for name in names
    }


def row(name: str, bench: Bench) -> Case:
    """The row of a system beside sentence-transformers."""
    from embkit.bench.rivals import interpreter

    interpreter()  # says what to do where there is none
    seeds = bench.system.seeds
    ours, theirs = [[run(seed) for seed in seeds] for run in (bench.ours, bench.peer)]
    more = {"peer_cpu": [t["cpu"] for t in theirs], "peer_steps": theirs[0]["steps"]}
    return compared(name, bench, ours, theirs, "sentence-transformers", more)


def compared(
    name: str,
    bench: Bench,
    ours: list[dict[str, Any]],
    theirs: list[dict[str, Any]],
    peer: str,
    more: Mapping[str, Any],
) -> Case:
    """Our runs of some seeds beside others, at the full width and, among the facts, the narrow."""
    kinds = tuple(ours[0]["scores"][max(ours[0]["scores"], key=int)])
    narrow = min(map(int, ours[0]["scores"]))
    both = {"embkit": ours, peer: theirs}
    facts = {
        "recipe": f"{bench.system.recipe}-small", "on": bench.system.data, "kinds": list(kinds),
        "table": dict(bench.system.table),
        "cpu_by_stage": ours[0]["stages"],
        "cpu": [o["cpu"] for o in ours],
        "before": [o["before"] for o in ours],
        "sets": {who: [one["sets"] for one in runs] for who, runs in both.items()},
        "narrow": {"width": narrow}
        | {who: found(runs, dim=narrow, kinds=kinds).kinds for who, runs in both.items()},
    }  # fmt: skip
    a, b = (found(runs, kinds=kinds) for runs in both.values())
    return case_of(f"recipes.{name}", a, b, peer, {**facts, **more})


# ---------------------------------------------------------------- data and vocabulary


def cut_vocabulary(tokenizer: Path, texts: list[str], out: Path) -> Path:
    """A Unigram tokenizer with only the pieces that texts use, and all single characters of it.

    A vocabulary of a hundred languages would be most of a small encoder. Texts are cut as before;
    ids are new.

    Args:
        tokenizer: its tokenizer.json. out: the folder that gets the new one.
    """
    from tokenizers import Tokenizer

    table = json.loads(tokenizer.read_text("utf-8"))
    used = {i for one in Tokenizer.from_file(str(tokenizer)).encode_batch(texts) for i in one.ids}
    used |= {token["id"] for token in table["added_tokens"]} | {table["model"]["unk_id"]}
    vocab = table["model"]["vocab"]
    used |= {i for i, (piece, _) in enumerate(vocab) if len(piece) == 1}
    ids = {old: new for new, old in enumerate(sorted(used))}
    table["model"]["vocab"] = [vocab[i] for i in ids]
    table["model"]["unk_id"] = ids[table["model"]["unk_id"]]
    for token in table["added_tokens"]:
        token["id"] = ids[token["id"]]
    for token in table["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[i] for i in token["ids"]]
    table["truncation"] = table["padding"] = None
    out.mkdir(parents=True, exist_ok=True)
    _rust.publish_file(str(out / "tokenizer.json"), json.dumps(table).encode())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tokenizer.parent / name).is_file():
            shutil.copyfile(tokenizer.parent / name, out / name)
    return out


def _xlm_r() -> Path:
    """tokenizer.json of the first Unigram model of EMBKIT_REAL_MODELS."""
    for folder in os.environ.get("EMBKIT_REAL_MODELS", "").split(":"):
        path = Path(folder) / "tokenizer.json"
        if folder and path.is_file():
            table = json.loads(path.read_text("utf-8"))
            if table["model"]["type"] == "Unigram":
                return path
    raise ImportError(
        "EMBKIT_REAL_MODELS names no model with a Unigram tokenizer, such as multilingual-e5-small"
    )


def bench_of(system: System) -> Bench:
    """The bench of a system in the cache.

    Raises:
        ImportError: no real data, or no tokenizer of its kind.
    """
    from embkit.data.readers import read_jsonl

    source = real.source()
    if source is None:
        raise ImportError("EMBKIT_REAL_DATA names no folder with pairs/ (docs/benchmarks.md)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    group = cache / "embkit" / "bench" / "recipes"
    home = group / "systems"
    tokenizer = _xlm_r() if system.vocabulary else None
    out = home / f"data-{system.data}"
    if system.data == "english":
        data = folders.english(source, real.build(source, group / "data"), out)
    else:
        data = {"chinese": folders.chinese, "three": folders.three}[system.data](source, out)
    if tokenizer is not None:
        small = home / f"vocabulary-{system.data}"
        if not (small / "tokenizer.json").is_file():
            rows = [r for p in sorted((data / "train").iterdir()) for r in read_jsonl(p)]
            cut_vocabulary(tokenizer, [r[k] for r in rows for k in ("query", "positive")], small)
        tokenizer = small
    return Bench(home, data, system, tokenizer=tokenizer)


def demo(system: System) -> Bench:
    """The recipe's small form on the demo data, for a few steps."""
    few: dict[str, Any] = {"steps": 3, "batch_size": 32}
    table = {
        "tokenizer": {"vocab_size": 2000},
        "model": {"hidden": 24, "heads": 2, "intermediate": 32},
        "prefinetune": few,
        "finetune": {"steps": 2},
    }
    demo = System(
        recipe=system.recipe, data="demo", table=table, pre=("retrieval",), fine=("retrieval",),
        sts=("sts",), labels=("classification",), seeds=(0,),
    )  # fmt: skip
    data = Path(__file__).parents[1] / "demo" / "data"
    return Bench(Path(tempfile.mkdtemp(prefix="embkit-bench-")), data, demo)


def _maker(name: str, system: System) -> Callable[[bool], Case]:
    def make(quick: bool) -> Case:
        bench = demo(system) if quick else bench_of(system)
        case = row(name, bench)
        if quick:
            case.close = lambda: shutil.rmtree(bench.home.parent, ignore_errors=True)
        return case

    make.__name__ = name
    return make


CASES: tuple[Callable[[bool], Case], ...] = tuple(_maker(n, s) for n, s in systems().items())
