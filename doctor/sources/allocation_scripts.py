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


@functools.cache
def body_script(body: str) -> AllocationScript | None:
    """The script of a text body, by its ``model_type``; ``None`` where there is none."""
    entry = _scripts().bodies.get(body)
    return None if entry is None else msgspec.json.decode(entry, type=AllocationScript)


@functools.cache
def tower_script(family: str) -> TowerScript | None:
    """The script of a family's vision tower, by the ``model_type`` of the whole model; ``None`` where there is none."""
    entry = _scripts().towers.get(family)
    return None if entry is None else msgspec.json.decode(entry, type=TowerScript)


@functools.cache
def _scripts() -> _Scripts:
    return msgspec.json.decode(read_data("allocations.json"), type=_Scripts)
