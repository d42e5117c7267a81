"""The exact search: which GPUs can hold the chain of atoms as contiguous stages.

A stage is priced by a function ``need(first, end)`` that grows with every atom. For one GPU that makes a table of extents:
how far a stage that begins at each atom can reach. A set of GPUs is then described by the prefixes of the chain that it can
hold with every one of them in use, kept as the bits of an integer; sets grow by one GPU at a time. GPUs with equal room
are interchangeable, so a set is a count for each kind. Where some GPUs must not be neighbors, a state is a set and its last
GPU. Nothing here knows about models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def extents(atoms: int, need: Need, room: Room, slack_bytes: int = 0) -> Extents:
    """How far stages on a GPU reach, in one sweep: an end never falls when the first atom moves on."""
    ends = []
    barred, capacity_bytes = room.barred, room.capacity_bytes - slack_bytes
    begins = end = 0
    for first in range(atoms):
        end = max(end, first)
        while end < atoms and not barred >> end & 1 and need(first, end + 1) <= capacity_bytes:
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


def smallest_count(atoms: int, need: Need, fleet: Fleet, counts: range, *, slack_bytes: int = 0) -> int | None:
    """Fewest GPUs, among the counts allowed, that can hold all atoms with each of them in use; ``None`` when none can.

    Args:
        atoms: Length of the chain.
        need: Bytes of a run of atoms.
        fleet: The GPUs.
        counts: Numbers of GPUs allowed.
        slack_bytes: What each GPU has to keep beside; negative gives it more than it has.
    """
    kinds = fleet.kinds_for_room
    tables = [extents(atoms, need, fleet.rooms[kind[0]], slack_bytes) for kind in kinds]
    useful = [number for number, table in enumerate(tables) if table.begins]
    everything = (1 << atoms) - 1
    radix = [1]
    for members in kinds:
        radix.append(radix[-1] * (len(members) + 1))
    if not fleet.has_broken and all(tables[number].begins == everything for number in useful):
        ends = [(radix[number], len(kinds[number]) + 1, tables[number].ends) for number in useful]
        return _count_by_longest(atoms, ends, counts)
    return _count_by_prefixes(atoms, fleet, tables, radix, counts)


def _count_by_longest(atoms: int, kinds: Sequence[tuple[int, int, list[int]]], counts: range) -> int | None:
    """The same where every atom fits on every GPU, so that a set holds all prefixes up to its longest.

    Args:
        atoms: Length of the chain.
        kinds: Radix, members and one, and ends of each kind of GPU.
        counts: Numbers of GPUs allowed.
    """
    sets = {0: 0}
    for count in range(1, min(counts.stop, atoms + 1)):
        grown: dict[int, int] = {}
        for used, longest in sets.items():
            first = min(longest, atoms - 1)
            for radix, base, ends in kinds:
                if used // radix % base < base - 1 and grown.get(used + radix, 0) < ends[first]:
                    grown[used + radix] = ends[first]
        if count in counts and atoms in grown.values():
            return count
        sets = grown
    return None


def _count_by_prefixes(
    atoms: int, fleet: Fleet, tables: Sequence[Extents], radix: Sequence[int], counts: range
) -> int | None:
    """The same with all prefixes of each set, and with its last GPU where some GPUs must not be neighbors."""
    kinds, followers, has_broken = fleet.kinds_for_room, fleet.followers, fleet.has_broken
    states = {(0, -1): 1}
    for count in range(1, counts.stop):
        grown: dict[tuple[int, int], int] = {}
        for (used, last), prefixes in states.items():
            for kind in followers[last]:
                if used // radix[kind] % (len(kinds[kind]) + 1) < len(kinds[kind]):
                    reached = extend(prefixes, tables[kind])
                    if reached:
                        larger = used + radix[kind], kind if has_broken else -1
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
