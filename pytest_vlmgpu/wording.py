"""How a sentence counts and names several things. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def plural(count: int, word: str) -> str:
    """``1 test``, ``2 tests``."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def first(texts: Sequence[str], most: int = 10) -> list[str]:
    """The first of many, and how many more there are."""
    return [*texts[:most], f"and {len(texts) - most} more"] if len(texts) > most else list(texts)
