"""A backend from settings: a server for an address, else a model in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from embkit.errors import UsageError
from embkit.recipe.llm import Llm
from embkit.synth.llm import LLM


def open_llm(settings: Llm) -> LLM:
    """Open what a recipe or the command line names; a model in this process is loaded.

    Raises:
        UsageError: no model, settings of a server for a model in this process, or the reverse.
    """
    if settings.model is None:
        raise UsageError(
            "There is no language model.", fix="--llm http://HOST:PORT/v1, or --llm DIRECTORY"
        )
    if settings.served:
        if settings.gguf:
            raise UsageError(
                "A GGUF file is that of a model in this process; a server has its own.",
                where=settings.model,
            )
        from embkit.synth.server import Server

        return Server(
            settings.model, settings.name, chat=not settings.plain,
            concurrency=settings.concurrency, structured=settings.structured, cache=settings.cache,
            token_budget=settings.token_budget, timeout=settings.timeout,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute, retries=settings.retries,
        )  # fmt: skip
    rates = settings.token_budget or settings.requests_per_minute or settings.tokens_per_minute
    if settings.cache or rates or settings.structured:
        raise UsageError(
            "Cache, budget, rates and enforced forms are those of a server.", where=settings.model
        )
    _check_model(settings.model, settings.gguf)
    from embkit.synth.local import Local

    return Local(
        settings.model, gguf=settings.gguf, chat=False if settings.plain else None,
        name=settings.name,
    )  # fmt: skip


def _check_model(model: str, gguf: str | None) -> None:
    """Say in our words what loading a directory would stumble over; ids of a hub pass."""
    if gguf and importlib.util.find_spec("gguf") is None:
        raise UsageError("A GGUF file needs the package gguf.", fix="pip install gguf")
    path = Path(model).expanduser()
    if not path.exists():
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise FileNotFoundError(2, "No such model directory", model)
        return
    if gguf:
        if not (path / gguf).is_file():
            there = sorted(p.name for p in path.glob("*.gguf"))
            raise UsageError(
                f"There is no file {gguf!r} in the model directory.",
                where=path,
                fix=f"--gguf {there[0]}" if there else "name a file that is there",
            )
        return
    if not (path / "config.json").is_file():
        there = sorted(p.name for p in path.glob("*.gguf"))
        raise UsageError(
            "This is no model directory: it has no config.json.",
            where=path,
            fix=f"--gguf {there[0]}" if there else "give the directory of a causal language model",
        )
