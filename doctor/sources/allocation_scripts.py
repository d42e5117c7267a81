"""The allocation scripts that come with the doctor: ``doctor/data/allocations.json``."""

from __future__ import annotations

import functools

import msgspec

from ..allocation import AllocationScript, TowerScript
from .data_files import read_data


class _Scripts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known. Entries are decoded when they are asked for: a plan needs one of each."""

    source: str
    """Tool and versions that wrote them."""
    bodies: dict[str, msgspec.Raw]
    """By ``model_type`` of the text body."""
    towers: dict[str, msgspec.Raw]
    """By ``model_type`` of the whole model."""
    older_towers: dict[str, msgspec.Raw]
    """The same of transformers 5.17, whose models hold less of what a tower gives than those since 5.18."""


@functools.cache
def body_script(body: str) -> AllocationScript | None:
    """The script of a text body, by its ``model_type``; ``None`` where there is none."""
    entry = _scripts().bodies.get(body)
    return None if entry is None else msgspec.json.decode(entry, type=AllocationScript)


@functools.cache
def tower_script(family: str, vision: str | None = None, *, is_older: bool = False) -> TowerScript | None:
    """The script of a vision tower, or ``None`` where there is none.

    Args:
        family: ``model_type`` of the whole model.
        vision: That of its ``vision_config``; ``None`` where it has none, which means the family's first one.
        is_older: That of transformers before 5.18.
    """
    entry = (_scripts().older_towers if is_older else _scripts().towers).get(family)
    script = None if entry is None else msgspec.json.decode(entry, type=TowerScript)
    return script if script is None or not script.vision or vision in (script.vision, None) else None


@functools.cache
def _scripts() -> _Scripts:
    return msgspec.json.decode(read_data("allocations.json"), type=_Scripts)
