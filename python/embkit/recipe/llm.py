"""What says which language model is asked (docs/synth.md)."""

from __future__ import annotations

from dataclasses import dataclass

from embkit.recipe.schema import require


@dataclass(frozen=True, kw_only=True)
class Llm:
    """The language model that synth, relabel and judge ask.

    Attributes:
        model: address of an OpenAI-compatible server, or a directory of a model to load; None:
            there is none, and no stage may ask one.
        name: the model's name on the server, or for provenance.
        gguf: name of a GGUF file inside the directory.
        plain: completions, without a chat template.
        structured: let the server enforce the form of answers.
        concurrency: requests at a time.
        cache: file of answers, so that nothing is asked twice.
        token_budget: tokens after which no request is sent.
        requests_per_minute, tokens_per_minute: rates that are not passed.
        timeout: seconds for one response. retries: attempts after the first.
    """

    model: str | None = None
    name: str | None = None
    gguf: str | None = None
    plain: bool = False
    structured: bool = False
    concurrency: int = 8
    cache: str | None = None
    token_budget: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 120.0
    retries: int = 6

    def __post_init__(self) -> None:
        require(
            self.concurrency > 0 and self.timeout > 0 and self.retries >= 0,
            f"llm.concurrency = {self.concurrency}, timeout = {self.timeout}, retries = "
            f"{self.retries}: one is out of range.",
            "the first two are above 0, retries at least 0",
        )

    @property
    def served(self) -> bool:
        """Whether the model is behind an address."""
        return self.model is not None and "://" in self.model
