"""Names that are nearly the word somebody wrote. Pure."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], *, most: int, cutoff: float) -> list[str]:
    """Known names like ``word``, the most alike first.

    Args:
        word: What was written.
        known: What could have been meant.
        most: How many to give.
        cutoff: Likeness from which a name counts, from 0 to 1 (``difflib.SequenceMatcher.ratio``).
    """
    # Late: only somebody's mistake needs it, and a verdict has 0.3 s.
    from difflib import get_close_matches

    return get_close_matches(word, list(known), n=most, cutoff=cutoff)
