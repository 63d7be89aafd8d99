"""Model soups: averages of the weights of runs that started from the same initialisation.

Which runs and which weights is decided on dev sets; the merge itself streams (docs/soup.md).
"""

from __future__ import annotations

from embkit.soup.checks import check_compatible, model_of
from embkit.soup.merge import merge, slerp
from embkit.soup.run import ALL, SELECT, soup

__all__ = ["ALL", "SELECT", "check_compatible", "merge", "model_of", "slerp", "soup"]
