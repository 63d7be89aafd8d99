"""Encoders: a transformer, pooling and an optional projection; loading, encoding and export."""

from embkit.model.card import Card, Data
from embkit.model.encoder import Encoder
from embkit.model.export import check_export, export
from embkit.model.hub import push_to_hub
from embkit.model.serving import check_serving
from embkit.model.tokens import TextTokenizer
from embkit.model.tuning import Tuning

__all__ = [
    "Card",
    "Data",
    "Encoder",
    "TextTokenizer",
    "Tuning",
    "check_export",
    "check_serving",
    "export",
    "push_to_hub",
]
