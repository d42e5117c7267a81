"""The exact search: which GPUs can hold the chain of atoms as contiguous stages.

A stage is priced by a function ``need(first, end)`` that grows with every atom. For one GPU that makes a table of extents:
how far a stage that begins at each atom can reach. A set of GPUs is then described by the prefixes of the chain that it can
hold with every one of them in use, kept as the bits of an integer; sets grow by one GPU at a time. GPUs with equal room
are interchangeable, so a set is a count for each kind. Where some GPUs must not be neighbors, a state is a set and its last
GPU. Nothing here knows about models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .fleet import Fleet, Room

Need = Callable[[int, int], int]
"""Bytes that the atoms from the first number up to, not including, the second need."""


class Extents(NamedTuple):
    """How far stages on one GPU reach."""

    ends: list[int]
    """For each first atom, the end of the longest stage that fits; the atom itself where not even that one fits."""
    begins: int
    """Atoms that fit on their own, as bits."""


def extents(atoms: int, need: Need, room: Room) -> Extents:
    """How far stages on a GPU reach, in one sweep: an end never falls when the first atom moves on."""
    ends = []
    begins = end = 0
    for first in range(atoms):
        end = max(end, first)
        while end < atoms and not room.barred >> end & 1 and need(first, end + 1) <= room.capacity_bytes:
            end += 1
        ends.append(end)
        if end > first:
            begins |= 1 << first
    return Extents(ends, begins)


def extend(prefixes: int, stage: Extents) -> int:
    """Prefixes that can be held after one more stage of at least one atom, as bits.

    Works on runs of neighboring prefixes: since ends never fall, the stages that begin in a run end in one range.
    """
    prefixes &= stage.begins
    reached = 0
    while prefixes:
        lowest = prefixes & -prefixes
        behind_run = (prefixes + lowest) & ~prefixes
        first, last = lowest.bit_length() - 1, behind_run.bit_length() - 2
        reached |= (1 << (stage.ends[last] + 1)) - (1 << (first + 1))
        prefixes &= ~(behind_run - lowest)
    return reached


def smallest_count(atoms: int, need: Need, fleet: Fleet, counts: range) -> int | None:
    """Fewest GPUs, among the counts allowed, that can hold all atoms with each of them in use; ``None`` when none can."""
    kinds = fleet.kinds_for_room
    tables = [extents(atoms, need, fleet.rooms[kind[0]]) for kind in kinds]
    followers = fleet.followers
    radix = [1]
    for members in kinds:
        radix.append(radix[-1] * (len(members) + 1))
    states = {(0, -1): 1}
    for count in range(1, counts.stop):
        grown: dict[tuple[int, int], int] = {}
        for (used, last), prefixes in states.items():
            for kind in followers[last]:
                if used // radix[kind] % (len(kinds[kind]) + 1) < len(kinds[kind]):
                    reached = extend(prefixes, tables[kind])
                    if reached:
                        larger = used + radix[kind], kind if fleet.has_broken else -1
                        grown[larger] = grown.get(larger, 0) | reached
        if count in counts and any(prefixes >> atoms & 1 for prefixes in grown.values()):
            return count
        states = grown
    return None


def largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number from ``low`` to ``high`` for which ``holds`` is true; ``low`` is taken to hold.

    ``holds`` must not become true again once it is false. Doubles its step first, since the answer is often near ``low``.
    """
    step = 1
    while low + step <= high and holds(low + step):
        low += step
        step *= 2
    high = min(high, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
