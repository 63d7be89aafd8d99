"""What TEI and vLLM do with an export, by the rules of their loaders.

Neither is a Python package that a test could run without a GPU image, so this reads the files as
their loaders do: which keys they need, what they refuse, and what they pass over without a word.
Read from text-embeddings-inference 1.9 and vLLM of 2026; docs/export.md has the rules as a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embkit.model.foreign import read_list
from embkit.model.tokens import read_json

_LEGACY = "sentence_transformers.models."
_MODES = ("cls_token", "mean_tokens", "lasttoken")
_ACTIVATIONS = ("torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Tanh")
_TEI_MODELS = (
    "bert", "xlm-roberta", "camembert", "roberta", "distilbert", "nomic_bert", "mpnet",
    "modernbert", "mistral", "llama", "qwen2", "qwen3", "gemma3_text",
)  # fmt: skip
_TEI_FLAG = ("llama", "mistral", "qwen3", "gemma3_text")
_TEI_ROPE = ("llama", "mistral", "qwen2")
_VLLM_CAUSAL = ("llama", "mistral", "qwen2", "qwen3")


def check_serving(folder: Path | str) -> dict[str, list[str]]:
    """What would go wrong in a server; empty lists when nothing would.

    Args:
        folder: an export, or any directory in the layout of sentence-transformers.

    Returns:
        ``{"tei": [...], "vllm": [...]}``, each entry a sentence.

    Raises:
        CorruptError: a file that is missing or no JSON.
    """
    root = Path(folder)
    config = read_json(root / "config.json")
    modules = read_list(root / "modules.json")
    both = _layout(root, modules)
    return {
        "tei": both + _tei(root, config, modules),
        "vllm": both + _vllm(config),
    }


def _layout(root: Path, modules: list[dict[str, Any]]) -> list[str]:
    """What both read."""
    wrong = []
    for module in modules:
        kind = str(module.get("type", ""))
        if not kind.startswith(_LEGACY):
            wrong.append(f"Module {kind} has the name of a newer layout, which is passed over.")
    for module in modules:
        place = root / str(module.get("path", ""))
        if str(module.get("type", "")).endswith(".Pooling"):
            pooling = read_json(place / "config.json")
            modes = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
            if len(modes) != 1 or modes[0].removeprefix("pooling_mode_") not in _MODES:
                wrong.append(f"Pooling is {modes or 'not said in the legacy keys'}.")
            if pooling.get("include_prompt") is False and any(_prompts(root).values()):
                wrong.append("The prompt counts in the mean there; this model leaves it out.")
        elif str(module.get("type", "")).endswith(".Dense"):
            activation = str(read_json(place / "config.json").get("activation_function", ""))
            if activation not in _ACTIVATIONS:
                wrong.append(f"A Dense module has the activation {activation or 'unsaid'}.")
    return wrong


def _tei(root: Path, config: dict[str, Any], modules: list[dict[str, Any]]) -> list[str]:
    wrong = []
    family = str(config.get("model_type", ""))
    if family not in _TEI_MODELS:
        wrong.append(f"TEI does not know {family}.")
    if not (root / "tokenizer.json").is_file():
        wrong.append("TEI needs tokenizer.json.")
    settings = root / "sentence_bert_config.json"
    if not settings.is_file() or not read_json(settings).get("max_seq_length"):
        wrong.append("TEI needs max_seq_length in sentence_bert_config.json.")
    for module in modules:
        if str(module.get("type", "")).endswith(".Pooling"):
            pooling = read_json(root / str(module.get("path", "")) / "config.json")
            absent = {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} - set(pooling)
            wrong += [f"TEI needs {key} in the pooling's config." for key in sorted(absent)]
    if family in _TEI_ROPE and not isinstance(config.get("rope_theta"), int | float):
        wrong.append("TEI needs rope_theta at the top of config.json.")
    if family == "qwen3" and config.get("use_sliding_window"):
        wrong.append("TEI has no sliding window for qwen3.")
    if _converted(config):
        if family not in _TEI_FLAG:
            wrong.append(f"TEI runs {family} with causal attention; this model looks both ways.")
        elif config.get("use_bidirectional_attention") is not True:
            wrong.append("TEI needs use_bidirectional_attention to look both ways.")
    return wrong


def _vllm(config: dict[str, Any]) -> list[str]:
    wrong = []
    family = str(config.get("model_type", ""))
    if _converted(config):
        if family in _VLLM_CAUSAL and config.get("is_causal") is not False:
            wrong.append("vLLM needs is_causal = false to look both ways.")
        elif family == "gemma3_text" and config.get("use_bidirectional_attention") is not True:
            wrong.append("vLLM needs use_bidirectional_attention to look both ways.")
        elif family not in (*_VLLM_CAUSAL, "gemma3_text"):
            wrong.append(f"vLLM may run {family} with causal attention: compare two texts there.")
    dims = config.get("matryoshka_dimensions")
    if dims is not None and not (isinstance(dims, list) and all(isinstance(d, int) for d in dims)):
        wrong.append("vLLM wants matryoshka_dimensions as a list of widths.")
    return wrong


def _converted(config: dict[str, Any]) -> bool:
    return config.get("is_causal") is False or bool(config.get("use_bidirectional_attention"))


def _prompts(root: Path) -> dict[str, str]:
    file = root / "config_sentence_transformers.json"
    return read_json(file).get("prompts") or {} if file.is_file() else {}
