"""Place a vision-language model on the GPUs of a machine: exact, explained, and pure arithmetic on records.

``model profile + machine + workload + policy -> plan``. The parts, in the order they act:

- ``validate``: refuse what cannot be meant.
- ``image_tokens``: pixels to patches and tokens.
- ``constraints``: units to a chain of atoms, which no cut may part.
- ``memory``: what any run of atoms needs.
- ``budget``: what each GPU can give.
- ``place``, ``order``, ``search``: the split.
- ``account``: its ledger, cuts and reasons.
- ``levers``: what would help when nothing fits.

``map_check`` asks the other way round: what becomes of a map that somebody wrote.
"""

from __future__ import annotations

from typing import Any

from .planning import plan
from .validate import validate_policy, validate_workload

__all__ = ["check_map", "plan", "validate_policy", "validate_workload"]


def __getattr__(name: str) -> Any:
    # Late: a plan has no use for it.
    if name != "check_map":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .map_check import check_map

    return check_map
