"""Load encoders: embkit exports, other sentence-transformers models, plain Hugging Face models.

A local directory comes first; a hub id is looked for in the local cache, then on the hub with a
short timeout, so that a machine without network gets an answer within seconds. Weights are read
from safetensors only: a pickle is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from embkit.errors import CorruptError, FormatError, UsageError
from embkit.model import foreign
from embkit.model.convert import keep_layers as keep_bottom
from embkit.model.encoder import Encoder
from embkit.model.projection import join, linears, new_projection, seeded
from embkit.model.tokens import load_tokenizer, read_json
from embkit.model.tuning import Tuning

VERSION = 2  # 2 has soft_mask, which a reader of 1 would leave out
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_SECONDS = 5
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*/config.json", "*/model.safetensors"]
_DROPOUTS = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "embedding_dropout",
    "mlp_dropout", "hidden_dropout", "dropout",
)  # fmt: skip


def load_encoder(
    path: Path | str,
    *,
    dims: Sequence[int] | None = None,
    pooling: str | None = None,
    tokenizer: Any = None,
    prompts: Mapping[str, str] | None = None,
    max_length: Mapping[str, int] | None = None,
    dropout: float | None = None,
    seed: int = 0,
    include_prompt: bool | None = None,
    bidirectional: bool | None = None,
    soft_mask_steps: int | None = None,
    keep_layers: int = 0,
    new_head: bool = False,
    projection_hidden: int = 0,
    tuning: Tuning | None = None,
) -> Encoder:
    """Load an encoder; what is not given comes from the directory.

    Args:
        path: a directory (embkit export, sentence-transformers or plain Hugging Face), or a hub id.
        dims: MRL widths; a width above the model's gets a random projection.
        pooling: ``"mean"``, ``"cls"`` or ``"last"``.
        tokenizer: instead of the directory's own.
        prompts: text per role. max_length: tokens per role.
        dropout: of states and attention, for training; default: what the config says.
        seed: of a projection that has to be made.
        include_prompt: whether the prompt's tokens count in the mean.
        bidirectional: let tokens of a causal model see later ones. soft_mask_steps: training steps
            over which they come to, 0 for at once.
        keep_layers: keep the bottom blocks only; 0 keeps all.
        new_head: put a new random projection in place of the directory's, if any.
            projection_hidden: width between its two layers; 0 for one layer.
        tuning: what is trained.

    Raises:
        UsageError: no such directory or id, no tokenizer, a layout that embkit does not speak, or a
            change that the model does not allow.
        CorruptError: no weights, or weights that are damaged or do not fit the config.
    """
    folder = _find(path)
    body = foreign.body(folder)
    if not (body / "config.json").is_file():
        raise CorruptError(
            "The directory has no config.json: it holds no model.",
            where=folder,
            fix="give a directory that Encoder.export, SentenceTransformer or transformers wrote",
        )
    _check_weights(body)
    tokens = load_tokenizer(body if tokenizer is None else tokenizer)
    backbone = _backbone(body, dropout)
    if keep_layers:
        keep_bottom(backbone, keep_layers)
    ours, module = _ours(folder), foreign.read(folder)
    if module.get("lower_case") and tokenizer is None:
        tokens = tokens.lower_cased()
    layers = module.get("projection", [])
    hidden = int(backbone.config.hidden_size)
    if dims is None:
        dims = ours.get("dims") or [linears(join(layers))[-1].out_features if layers else hidden]
    if new_head or projection_hidden or (not layers and max(dims, default=0) > hidden):
        with seeded(seed):
            layers = [*linears(new_projection(hidden, max(dims), between=projection_hidden))]
    opening = ours.get("soft_mask", {})
    if soft_mask_steps is not None:
        opening = {"steps": soft_mask_steps}
    if tuning is None:
        tuning = Tuning.of(ours.get("tuning", {}))
    if include_prompt is None:
        include_prompt = module.get("include_prompt", True)
    lengths = max_length or ours.get("max_length") or module.get("max_length")
    made = Encoder(
        backbone,
        tokens,
        dims=dims,
        pooling=pooling or module.get("pooling", "mean"),
        projection=join(layers),
        include_prompt=include_prompt,
        prompts=prompts or ours.get("prompts") or module.get("prompts"),
        max_length=lengths,
        bidirectional=ours.get("bidirectional", False) if bidirectional is None else bidirectional,
        soft_mask_steps=int(opening.get("steps", 0)),
        tuning=tuning,
    ).eval()
    made.soft_mask_step = int(opening.get("step", 0))
    return made


def _find(path: Path | str) -> Path:
    """The local directory of a path or hub id."""
    folder = Path(path)
    if folder.is_dir():
        inside = folder / "model"  # a training run or soup publishes its model there
        whole = (folder / "config.json").is_file() or not (inside / "config.json").is_file()
        return folder if whole else inside
    if folder.exists():
        raise UsageError("A model is a directory, this is a file.", where=folder, fix="give it")
    nowhere = UsageError(
        f"No model {str(path)!r}: neither a directory nor a model id that can be reached.",
        where=folder,
        fix="check the spelling; without network, download the model first and give its directory",
    )
    if not _HUB_ID.match(str(path)):
        raise nowhere
    from huggingface_hub import HfApi, snapshot_download

    files: dict[str, Any] = {"allow_patterns": _HUB_FILES, "max_workers": 2}
    try:
        return Path(snapshot_download(str(path), local_files_only=True, **files))
    except Exception as error:  # the hub client has a dozen kinds, all of them mean "not here"
        nowhere.__cause__ = error
    try:
        # snapshot_download alone waits for a silent server for minutes, whatever its timeout says.
        HfApi().model_info(str(path), timeout=_HUB_SECONDS)
        return Path(snapshot_download(str(path), etag_timeout=_HUB_SECONDS, **files))
    except Exception as error:
        nowhere.__cause__ = error
    raise nowhere


def _check_weights(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return
    pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise CorruptError(
            f"The weights are a pickle ({pickles[0]}), which embkit does not load.",
            where=folder,
            fix="convert once: AutoModel.from_pretrained(DIR)"
            ".save_pretrained(DIR, safe_serialization=True)",
        )
    raise CorruptError(
        "The model directory has no weights (model.safetensors).",
        where=folder,
        fix="copy the whole directory again, or give another model",
    )


def _backbone(folder: Path, dropout: float | None) -> Any:
    from transformers import AutoConfig, AutoModel

    read_json(folder / "config.json")
    try:
        with quiet(), seeded(0):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            for name in _DROPOUTS if dropout is not None else ():
                if hasattr(config, name):
                    setattr(config, name, dropout)
            model, report = AutoModel.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"transformers cannot build this model: {_first_line(error)}",
            where=folder / "config.json",
            fix="use a model type that transformers knows without remote code",
        ) from error
    except Exception as error:  # SafetensorError, RuntimeError (sizes), OSError of a short file
        raise CorruptError(
            f"The weights cannot be read: {_first_line(error)}",
            where=folder,
            fix="copy the model directory again",
        ) from error
    missing = sorted(k for k in report["missing_keys"] if not k.startswith("pooler."))
    wrong = report.get("mismatched_keys") or []
    if missing or wrong:
        first = missing[0] if missing else str(next(iter(wrong)))
        raise CorruptError(
            f"The weights do not fit config.json: {len(missing)} missing, {len(wrong)} of another "
            f"shape (first: {first}).",
            where=folder,
            fix="give the directory whose config and weights belong together",
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's tanh pooler: never used, and must not be trained or exported
    return model


def _ours(folder: Path) -> dict[str, Any]:
    """embkit.json: what the sentence-transformers files cannot say."""
    path = folder / "embkit.json"
    if not path.is_file():
        return {}
    content = read_json(path)
    if content.get("format") != "embkit.model":
        raise CorruptError("embkit.json is not of a model.", where=path, fix="export it again")
    if int(content.get("version", 0)) > VERSION:
        raise FormatError(
            f"The model was written by a newer embkit (model format {content['version']}, this one "
            f"reads {VERSION}).",
            where=path,
            fix="upgrade embkit",
        )
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading report and bars off the screen: we check the report ourselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
