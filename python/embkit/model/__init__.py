"""Encoders: a transformer, pooling and an optional projection; loading, encoding and export."""

from embkit.model.encoder import Encoder
from embkit.model.export import check_export, export
from embkit.model.tokens import TextTokenizer
from embkit.model.tuning import Tuning

__all__ = ["Encoder", "TextTokenizer", "Tuning", "check_export", "export"]
