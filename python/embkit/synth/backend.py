"""A backend from settings: a server for an address, else a model in this process."""

from __future__ import annotations

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
    from embkit.synth.local import Local

    return Local(
        settings.model, gguf=settings.gguf, chat=False if settings.plain else None,
        name=settings.name,
    )  # fmt: skip
