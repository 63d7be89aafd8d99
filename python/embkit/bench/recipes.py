"""The group `recipes`: what each ingredient of a recipe does on real data, and how far it goes.

Every row is a mean over seeds of a small encoder that was trained for minutes on one core, beside
the same without one ingredient, or beside sentence-transformers in the same CPU seconds
(:mod:`embkit.bench.recipes_quality`). The difference comes with its 95% interval, by drawing
queries again. Rows share cells, and cells are kept (:mod:`embkit.bench.recipes_cells`).
"""

from __future__ import annotations

from embkit.bench import recipes_ablations, recipes_causal, recipes_quality, recipes_systems

CASES = (
    *recipes_ablations.CASES,
    *recipes_quality.CASES,
    *recipes_systems.CASES,
    *recipes_causal.CASES,
)
