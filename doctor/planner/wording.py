"""How a sentence names several things. Pure."""

from __future__ import annotations

from collections.abc import Sequence

_MANY = 4


def listed(names: Sequence[str], *, most: int = _MANY) -> str:
    """``a, b and c``; of many the first, and how many more."""
    kept = list(names[:most])
    if len(names) > most:
        return f"{', '.join(kept)} and {len(names) - most:,} more"
    return kept[0] if len(kept) == 1 else f"{', '.join(kept[:-1])} and {kept[-1]}"
