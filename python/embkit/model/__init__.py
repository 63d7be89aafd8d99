"""Encoders: a transformer, pooling and an optional projection; loading, encoding and export."""

from embkit.model.encoder import Encoder
from embkit.model.export import check_export, export
from embkit.model.tokens import TextTokenizer

__all__ = ["Encoder", "TextTokenizer", "check_export", "export"]
