"""Maps that load and then fail: blocks cut through, and bare parameters parted from what they are joined with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..data.joins import JOINS, is_moved
from ..model import ModelProfile, Registered
from ..placement import CutBlock
from .auto_replay import Device, Placed

_BLOCK = re.compile(r"(?:.*\.)?(?P<list>[^.]+)\.\d+(?=\.)")
"""The innermost item of a numbered list that a name lies in."""
_BLOCK_LISTS = frozenset({"layers", "layer", "blocks", "block", "h", "resblocks", "encoder_layers"})
_ATTENTION = re.compile(r"att(?:entio)?n", re.IGNORECASE)


def cut_blocks(items: Sequence[Registered], placed: Placed, gpus: Sequence[int]) -> tuple[CutBlock, ...]:
    """Repeated blocks that are on several devices.

    A block with attention adds its input to its output, so that a cut through it raises ``Expected all tensors to be on the
    same device``: hooks move what enters a module, not what is added outside of one.
    """
    members: dict[str, list[Registered]] = {}
    for item in items:
        match = _BLOCK.match(item.unit.key)
        if match and match["list"] in _BLOCK_LISTS and item.unit.elements:
            members.setdefault(match[0], []).append(item)
    found = []
    for key, parts in members.items():
        devices = list(dict.fromkeys(placed.devices[item.unit.key] for item in parts))
        if len(devices) > 1:
            fails = any(_ATTENTION.search(item.unit.key[len(key) :]) for item in parts)
            found.append(CutBlock(key=key, devices=tuple(_named(device, gpus) for device in devices), fails=fails))
    return tuple(found)


def parted_parameters(profile: ModelProfile, items: Sequence[Registered], placed: Placed) -> tuple[str, ...]:
    """Bare parameters of a tower of remote code on another device than the tower's last module, and other parted joins.

    Such code joins them with the tower's output (``boi`` and ``eoi`` of GLM-4V-9B and CogVLM: GLM-4#350), unless a newer
    revision is known to move them first, as the classes of transformers itself do.
    """
    if not profile.is_remote_code:
        return ()
    parted = []
    for unit in profile.units:
        if unit.role == "vision":
            own = [item for item in items if item.owner == unit.key]
            last = next((placed.devices[item.unit.key] for item in reversed(own) if not item.is_parameter), None)
            parted += [
                item.unit.key
                for item in own
                if item.is_parameter
                and item.unit.key.rpartition(".")[0] == unit.key
                and placed.devices[item.unit.key] != last
                and item.unit.key not in (profile.moved_joins or ())
            ]
    return tuple(dict.fromkeys([*parted, *_parted_joins(profile, items, placed)]))


def _parted_joins(profile: ModelProfile, items: Sequence[Registered], placed: Placed) -> list[str]:
    """What the family's code joins, in every revision and every call, where its two sides share no device."""
    found = []
    for join in JOINS.get(profile.model_type, ()):
        one, other = (_on(items, placed, key) for key in (join.result or join.moves, join.meets))
        may_be_moved = join.is_patched and (profile.moved_joins is None or is_moved(join, profile.moved_joins))
        if one and other and not one & other and not may_be_moved and not join.when:
            found.append(join.moves)
    return found


def _on(items: Sequence[Registered], placed: Placed, key: str) -> set[Device]:
    return {placed.devices[item.unit.key] for item in items if f"{item.unit.key}.".startswith(f"{key}.")}


def _named(device: Device, gpus: Sequence[int]) -> str:
    return f"GPU {gpus[device]}" if isinstance(device, int) else "CPU" if device == "cpu" else "disk"
