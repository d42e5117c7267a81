"""Place a vision-language model on the GPUs of a machine: exact, explained, and pure arithmetic on records.

``model profile + machine + workload + policy -> plan``. The parts, in the order they act:

- ``validate``: refuse what cannot be meant.
- ``image_tokens``: pixels to patches and tokens, by ``image_sizes`` or ``image_tiles``.
- ``constraints``: units to a chain of atoms, which no cut may part; ``pins``: those that must be on a GPU.
- ``memory``: what any run of atoms needs.
- ``budget``: what each GPU can give.
- ``problem``: all of that as one question.
- ``fleet``, ``place``, ``order``, ``search``: the split; ``near``: others that are nearly as good.
- ``offload``: the last layers in host memory, where that is allowed.
- ``account``: ledger, cuts and reasons; ``limits``: how far the workload can grow.
- ``auto``: what ``device_map="auto"`` would have done.
- ``levers``, ``cards``: what would help when nothing fits.

``map_check`` asks the other way round: what becomes of a map that somebody wrote.
"""

from __future__ import annotations

from typing import Any

from .planning import plan, sketch
from .validate import validate_policy, validate_workload

__all__ = ["check_map", "plan", "sketch", "suggest_gpus", "validate_policy", "validate_workload"]


def __getattr__(name: str) -> Any:
    # Late: a plan that fits has no use for them.
    if name == "check_map":
        from .map_check import check_map

        return check_map
    if name == "suggest_gpus":
        from .cards import suggest_gpus

        return suggest_gpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
