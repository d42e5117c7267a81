"""A model in the pieces that a map may part: units, and inside a tower the blocks and what is around them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import msgspec

from ..data.joins import TOWER_ENTRY, TOWER_ROTARY
from ..model import ModelProfile, Unit
from ..workload import Workload
from .map_names import ROOT, Names, prefixes
from .memory import unit_bytes


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit()


class Piece(msgspec.Struct, frozen=True):
    """What a sound map never cuts."""

    key: str
    unit: str
    """Key of the unit it belongs to; its own for a whole unit."""
    is_block: bool
    """True for one of a list of repeated blocks, which add what goes in to what comes out."""

    @property
    def list_key(self) -> str:
        """The list that a block is in; of lists in lists the outermost one in the unit."""
        below = self.key[len(self.unit) + 1 :].split(".")
        at = next((index for index, part in enumerate(below) if _is_number(part)), 0)
        return ".".join([self.unit, *below[:at]]) if self.key != self.unit else self.key.rpartition(".")[0]


_EARLY = ("embed", "patch", "pre_", "post_conv")
"""Parts of names of what runs before the blocks of a tower: CLIP's ``pre_layrnorm``, GLM-4.1V's ``post_conv_layernorm``."""


def _when(piece: Piece) -> tuple[int, int]:
    """When a piece of a tower runs, as far as names tell: embeddings, blocks by number, the rest."""
    last = piece.key.rpartition(".")[2]
    if piece.is_block:
        return 1, next(int(part) for part in reversed(piece.key.split(".")) if _is_number(part))
    return (0 if any(word in last for word in _EARLY) else 2), 0


def _inner(path: Sequence[str], at: int) -> int:
    """How many components further in a list's item stands what is a block itself.

    In ``stages.2.5`` the second number, in ``down.4.block.0`` the item of the inner list, in ``blocks.5.channel_block`` the
    part of that name; 0 for none.
    """
    if at + 3 < len(path) and _is_number(path[at + 1]):
        return 1
    if at + 4 < len(path) and _is_number(path[at + 2]):
        return 2
    return 1 if at + 3 < len(path) and path[at + 1].endswith("_block") else 0


class Anatomy:
    """A model's tensors, its pieces in execution order, and what they weigh."""

    def __init__(self, profile: ModelProfile, workload: Workload) -> None:
        """Cut a profile. Without names of tensors, each unit (or part) counts as one tensor."""
        self.profile = profile
        self.workload = workload
        leaves = [leaf for unit in profile.units for leaf in (unit.parts or (unit,))]
        self.elements = {name: elements for name, (_, elements) in profile.tensors.items()}
        if not self.elements:
            self.elements = {leaf.key: leaf.elements for leaf in leaves if leaf.elements}
        towers = [unit.key for unit in profile.units if unit.role == "vision" and profile.model_type in TOWER_ENTRY]
        modules = [leaf.key for leaf in (*profile.units, *leaves) if leaf.key not in profile.tensors]
        known = [*modules, *(f"{tower}.{TOWER_ROTARY}" for tower in towers)]
        self.names = Names(self.elements, known)
        self.units = {unit.key: unit for unit in profile.units}
        self._bytes = {unit.key: unit_bytes(unit, profile, workload) for unit in profile.units}

    @cached_property
    def tensors_of(self) -> dict[str, list[str]]:
        """Unit to its tensors; a unit without any (rotary tables, a tied head) stands for itself."""
        found: dict[str, list[str]] = {key: [] for key in self.units}
        for name in self.elements:
            # Every tensor of a checkpoint is in a unit.
            found[next(prefix for prefix in prefixes(name) if prefix in self.units)].append(name)
        return {key: names or [key] for key, names in found.items()}

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces in execution order."""
        return tuple(piece for unit in self.profile.units for piece in self._pieces(unit))

    def pieces_of(self, unit: str) -> list[Piece]:
        """Pieces of one unit."""
        return [piece for piece in self.pieces if piece.unit == unit]

    def _pieces(self, unit: Unit) -> Iterable[Piece]:
        if unit.parts and not self._has_inner_blocks(unit):
            return [Piece(part.key, unit.key, part.layer is not None) for part in unit.parts]
        if unit.role not in ("vision", "projector", "other"):
            return [Piece(unit.key, unit.key, unit.role == "layer")]
        blocks = self._blocks(unit.key)
        if not blocks:
            return [Piece(unit.key, unit.key, is_block=False)]
        above = {prefix for block in blocks for prefix in prefixes(block)} - set(blocks)
        keys: dict[str, None] = {}
        for name in self.tensors_of[unit.key]:
            keys[next(p for p in reversed(list(prefixes(name))) if p in blocks or p not in above)] = None
        return sorted((Piece(key, unit.key, key in blocks) for key in keys), key=_when)

    def _has_inner_blocks(self, unit: Unit) -> bool:
        """True where the parts of a tower hold blocks of their own, so that a cut in a part need not be one in a block."""
        parts = [f"{part.key}." for part in unit.parts if part.layer is not None]
        return any(block.startswith(tuple(parts)) for block in self._blocks(unit.key)) if parts else False

    def _blocks(self, unit: str) -> set[str]:
        """Items of numbered lists in a unit that have at least two modules with tensors in them.

        Of lists in lists, and of items that are called blocks in an item, the inner ones: each adds its own input.
        """
        below: dict[str, set[str]] = {}
        for name in self.tensors_of[unit]:
            path = name[len(unit) + 1 :].split(".")
            at = next((index for index, part in enumerate(path) if _is_number(part)), None)
            while at is not None and (step := _inner(path, at)):
                at += step
            if at is not None and at + 2 < len(path):
                below.setdefault(".".join([unit, *path[: at + 1]]), set()).add(path[at + 1])
        return {block for block, modules in below.items() if len(modules) > 1}

    def tensors_under(self, key: str) -> list[str]:
        """Tensors of a piece, a unit or any module in a unit."""
        unit = next((prefix for prefix in prefixes(key) if prefix in self.units), None)
        if unit is None:
            return list(self.elements) if key == ROOT else [n for n in self.elements if n.startswith(f"{key}.")]
        if key == unit:
            return self.tensors_of[unit]
        return [name for name in self.tensors_of[unit] if name == key or name.startswith(f"{key}.")]

    def size_of(self, names: Iterable[str]) -> int:
        """Bytes of some tensors once they are loaded."""
        total = 0.0
        for name in names:
            unit = next(prefix for prefix in prefixes(name) if prefix in self.units)
            total += self._bytes[unit] * self.elements[name] / self.units[unit].elements
        return math.ceil(total)

    def weights(self, device_of: dict[str, int | str]) -> Counter[int | str]:
        """Bytes of the loaded weights on each device; a unit on several is shared out by its elements."""
        total: Counter[int | str] = Counter()
        for unit, names in self.tensors_of.items():
            share: Counter[int | str] = Counter()
            for name in names:
                share[device_of[name]] += self.elements.get(name, 0)
            elements = sum(share.values())
            for device, count in share.items():
                # At least one device, and all of the unit where it is whole: the sum is never below the unit's bytes.
                total[device] += math.ceil(self._bytes[unit] * count / elements) if elements else self._bytes[unit]
        return total
