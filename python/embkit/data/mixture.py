"""The share of the steps that each task gets."""

from __future__ import annotations

from collections.abc import Mapping

from embkit.errors import UsageError, nearest


def weights_for(
    sizes: Mapping[str, int],
    asked: Mapping[str, float],
    *,
    temperature: float = 1.0,
    cap: int = 0,
) -> dict[str, float]:
    """The weight of each task: what was asked, or by size when nothing was.

    Args:
        sizes: examples by task.
        asked: weights by task, any scale; tasks that are not named get 0. Empty: by size, as
            ``min(size, cap) ** (1 / temperature)`` (examples-proportional mixing with a limit and a
            temperature, T5, arXiv:1910.10683, section 3.5.2).
        temperature: 1 is proportional to size; larger values go towards equal shares.
        cap: size from which a task counts no more; 0 is no limit.

    Raises:
        UsageError: a task that is not there (names the nearest), a temperature or cap out of range.
    """
    if temperature <= 0 or cap < 0:
        raise UsageError(
            f"A mixture of temperature {temperature} and cap {cap}.",
            where="mixture",
            fix="a temperature above 0, and a cap of 0 (none) or more",
        )
    for name in asked:
        if name not in sizes:
            raise UsageError(
                f"The recipe weights task {name!r}, which the store does not have.",
                where="tasks",
                fix=nearest(name, sizes),
            )
    if asked:
        return {name: float(asked.get(name, 0.0)) for name in sizes}
    limit = cap or max(sizes.values(), default=0)
    return {name: float(min(n, limit)) ** (1.0 / temperature) for name, n in sizes.items()}
