"""ONNX export: one graph for readers that pool themselves, and for those that do not.

``input_ids`` and ``attention_mask`` int64 [B, L], both axes free, to ``last_hidden_state``
[B, L, H], which optimum, sentence-transformers (``backend="onnx"``) and TEI pool, and to
``sentence_embedding`` [B, D]: pooled, projected and of unit length. A model whose prompts do not
count in the mean has the first alone: the graph cannot know where a prompt ends.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from embkit.errors import EmbkitError, UsageError
from embkit.model.encoder import Encoder
from embkit.model.load import quiet
from embkit.model.tuning import merge

FILE, INT8_FILE = "onnx/model.onnx", "onnx/model_qint8.onnx"
_OPSET = 17
_MOST = 2 * 1024**3 - 1  # bytes of one protobuf, in which all weights are


class _Graph(nn.Module):
    """What is traced: transformers' eager attention, without embkit's kernels."""

    def __init__(self, encoder: Encoder, *, pooled: bool) -> None:
        super().__init__()
        plain = copy.deepcopy(encoder)  # the caller's stays as it is, adapters apart
        if plain.tuning.lora:
            merge(plain)
        self.backbone, self.projection = plain.backbone, plain.projection
        self.backbone.set_attn_implementation("eager")
        self.pooling, self.pooled = encoder.pooling, pooled

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        h_BLH = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if not self.pooled:
            return h_BLH
        mask_BL = attention_mask.to(h_BLH.dtype)
        if self.pooling == "mean":
            weight_BL = mask_BL
        else:  # the one token that counts: the first of the mask, or its last
            place_BL = attention_mask.cumsum(1)
            wanted = 1 if self.pooling == "cls" else attention_mask.sum(1, keepdim=True)
            weight_BL = mask_BL * (place_BL == wanted).to(h_BLH.dtype)
        total = weight_BL.sum(1, keepdim=True).clamp(min=1e-9)
        x_BD = (h_BLH * weight_BL[:, :, None]).sum(1) / total
        if self.projection is not None:
            x_BD = self.projection(x_BD)
        return h_BLH, x_BD / x_BD.norm(dim=1, keepdim=True).clamp(min=1e-12)


def write_onnx(encoder: Encoder, folder: Path, *, int8: bool = False) -> list[str]:
    """Write ``onnx/model.onnx`` into an export's directory, in fp32.

    Args:
        int8: also ``onnx/model_qint8.onnx``, whose matrix weights are 8-bit integers, one scale a
            column, and whose activations are quantised as they come.

    Returns:
        The files written, relative to ``folder``.

    Raises:
        UsageError: the packages of ``embkit[onnx]`` are missing, the soft mask is not open, the
            weights do not fit in one file, or a model that cannot be traced.
    """
    _need("onnx", "onnxruntime")
    if encoder.opening < 1.0:
        raise UsageError(
            "The soft mask of this model is not open; ONNX has no such mask.",
            fix="export it when its training is done",
        )
    weights = sum(p.numel() * 4 for p in encoder.parameters())
    if weights > _MOST:
        raise UsageError(
            f"The weights are {weights / 1e9:.1f} GB, and one ONNX file holds 2 GB.",
            fix="serve this model from model.safetensors (docs/export.md)",
        )
    pooled = encoder.include_prompt or not any(encoder.prompts.values())
    axes = {0: "batch", 1: "length"}
    outputs = ["last_hidden_state", *(["sentence_embedding"] if pooled else [])]
    names = {"input_ids": axes, "attention_mask": axes, "last_hidden_state": axes}
    path = folder / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.full((3, 11), 5) + torch.arange(11)
    ids %= encoder.backbone.get_input_embeddings().num_embeddings
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    graph = _Graph(encoder, pooled=pooled).eval().cpu().float()
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about branches that shapes decide
            torch.onnx.export(
                graph, (ids, mask), str(path), dynamo=False, opset_version=_OPSET,
                input_names=["input_ids", "attention_mask"], output_names=outputs,
                dynamic_axes={**names, **({"sentence_embedding": {0: "batch"}} if pooled else {})},
            )  # fmt: skip
    except Exception as error:
        raise UsageError(
            f"{type(encoder.backbone).__name__} cannot be traced: {error}".splitlines()[0],
            where="onnx",
            fix="export without ONNX; the families that work are in docs/export.md",
        ) from error
    files = [FILE]
    if int8:
        _quantise(path, folder / INT8_FILE)
        files.append(INT8_FILE)
    _check(graph, path)
    return files


def encode_onnx(
    path: Path | str, encoder: Encoder, texts: Sequence[str], *, prompt: str = ""
) -> np.ndarray:
    """Unit embeddings by ONNX Runtime, for checks: tokens as the encoder makes them, one batch.

    Args:
        path: an ``.onnx`` file of an export. prompt: put before each text.

    Returns:
        float32 [n, D].

    Raises:
        UsageError: a graph without ``sentence_embedding``.
    """
    from embkit.model.tokens import pad

    session = _session(path)
    if "sentence_embedding" not in {o.name for o in session.get_outputs()}:
        raise UsageError("This graph gives states alone.", where=path, fix="pool them yourself")
    longest = max(encoder.max_length.values())
    flat, offsets = encoder.tokenizer.ids([prompt + t for t in texts], max_length=longest)
    ids, mask = pad(flat, offsets, np.arange(len(texts)), encoder.tokenizer.pad_id)
    (out,) = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    return np.asarray(out, np.float32)


def _session(path: Path | str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _check(graph: nn.Module, path: Path) -> None:
    """Other shapes than the traced one give what torch gives: nothing was frozen by the tracer."""
    session = _session(path)
    for rows, length in ((1, 1), (2, 5), (4, 14)):
        ids = (torch.arange(rows * length).reshape(rows, length) * 7 + 3) % 5 + 5
        mask = torch.ones_like(ids)
        mask[rows - 1, (length + 1) // 2 :] = 0
        with torch.no_grad():
            out = graph(ids, mask)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        theirs = session.run(None, feeds)
        real = mask.bool().numpy()
        pairs = [((out[0] if len(theirs) > 1 else out).numpy()[real], theirs[0][real])]
        if len(theirs) > 1:
            pairs.append((out[1].numpy(), theirs[1]))
        for ours, other in pairs:
            worst = float(np.abs(ours - other).max())
            if worst > 1e-4 * max(1.0, float(np.abs(ours).max())):
                raise EmbkitError(
                    f"ONNX differs from torch by {worst:.1e} on {rows} x {length} tokens.",
                    where=path,
                    fix="export without ONNX, and report it with the model's config.json",
                )


def _quantise(path: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises a pass that fuses nothing here
    try:
        # The word table stays in fp32: it is looked up, not multiplied.
        quantize_dynamic(
            str(path), str(out), weight_type=QuantType.QInt8, per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )  # fmt: skip
    finally:
        logging.disable(logging.NOTSET)


def _need(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX needs {' and '.join(missing)}.", where="onnx", fix="pip install 'embkit[onnx]'"
        )
