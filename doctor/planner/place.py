"""The exact search: which GPUs can hold the chain of atoms as contiguous stages.

A stage is priced by a function ``need(first, end)`` that grows with every atom. For one GPU that makes a table of extents:
how far a stage that begins at each atom can reach. A set of GPUs is then described by the prefixes of the chain that it can
hold with every one of them in use, kept as the bits of an integer; sets grow by one GPU at a time. GPUs of equal capacity
are interchangeable, so a set is a count for each capacity. Nothing here knows about models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

Need = Callable[[int, int], int]
"""Bytes that the atoms from the first number up to, not including, the second need."""

MAX_SETS = 1_024
"""Most sets of GPUs that are looked at: 10 GPUs of different capacity. Beyond it capacities are rounded down until fewer
differ, which can only make a plan more careful."""
_FIRST_STEP = 16 * 2**20


class Extents(NamedTuple):
    """How far stages on one GPU reach."""

    ends: list[int]
    """For each first atom, the end of the longest stage that fits; the atom itself where not even that one fits."""
    begins: int
    """Atoms that fit on their own, as bits."""


def extents(atoms: int, need: Need, capacity: int) -> Extents:
    """How far stages on a GPU of this capacity reach, in one sweep: an end never falls when the first atom moves on."""
    ends = []
    begins = end = 0
    for first in range(atoms):
        end = max(end, first)
        while end < atoms and need(first, end + 1) <= capacity:
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


def smallest_count(atoms: int, need: Need, capacities: Sequence[int], counts: range) -> int | None:
    """Fewest GPUs, among the counts allowed, that can hold all atoms with each of them in use; ``None`` when none can."""
    kinds = list(Counter(capacities).items())
    tables = [extents(atoms, need, capacity) for capacity, _ in kinds]
    radix = [1]
    for _, members in kinds:
        radix.append(radix[-1] * (members + 1))
    sets = {0: 1}
    for count in range(1, counts.stop):
        grown: dict[int, int] = {}
        for used, prefixes in sets.items():
            for kind, (_, members) in enumerate(kinds):
                if used // radix[kind] % (members + 1) < members:
                    reached = extend(prefixes, tables[kind])
                    if reached:
                        larger = used + radix[kind]
                        grown[larger] = grown.get(larger, 0) | reached
        if count in counts and any(prefixes >> atoms & 1 for prefixes in grown.values()):
            return count
        sets = grown
    return None


def rounded(capacities: Sequence[int]) -> list[int]:
    """Capacities as they are when few enough differ, else rounded down to the smallest step that makes it so."""
    step = 1
    result = list(capacities)
    while _sets(result) > MAX_SETS:
        step = max(_FIRST_STEP, 2 * step)
        result = [capacity // step * step for capacity in capacities]
    return result


def _sets(capacities: Sequence[int]) -> int:
    product = 1
    for members in Counter(capacities).values():
        product *= members + 1
    return product


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
