"""The report of a run: a table for the terminal and one self-contained HTML page."""

from __future__ import annotations

from embkit.report.page import write_report
from embkit.report.plots import load_results, save_plots
from embkit.report.scores import table

__all__ = ["load_results", "save_plots", "table", "write_report"]
