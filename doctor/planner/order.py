"""The order of the GPUs: among all splits that hold, the one whose neighboring stages have the fastest links.

The chain is searched from its end, so that the stages can afterwards be laid out from its beginning. A state is the set of
GPUs behind a border and the first of them; for each total of link ranks it keeps, as bits, where those GPUs can begin.
GPUs with equal room and equal links to all others are interchangeable, which keeps 16 of them as quick as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from .fleet import Fleet, Room
from .place import Extents, Need, extend, extents

BEAM_WIDTH = 700
"""Most states kept for each number of stages. Nine GPUs without any symmetry have at most 630 and never meet it."""

_State = tuple[tuple[int, ...], int]
"""How many GPUs of each kind are used, and the kind of the first of them."""
_Level = dict[_State, dict[int, int]]
"""State to total rank to where its stages can begin, as bits counted from the end of the chain."""


class Split(msgspec.Struct, frozen=True):
    """Contiguous stages on GPUs."""

    gpus: tuple[int, ...]
    """Position of each stage's GPU among the capacities."""
    ends: tuple[int, ...]
    """End of each stage in the chain; the last is the number of atoms."""
    is_exact: bool = True
    """False when not every order of the GPUs was compared."""

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """First atom and end of each stage."""
        return tuple(zip((0, *self.ends[:-1]), self.ends, strict=True))

    def moved(self, border: int, by: int) -> Split | None:
        """The split with the end of stage ``border`` moved by so many atoms; ``None`` when that would empty a stage."""
        ends = list(self.ends)
        ends[border] += by
        if all(first < end for first, end in zip((0, *ends), ends, strict=False)):
            return msgspec.structs.replace(self, ends=tuple(ends))
        return None

    def margin(self, need: Need, rooms: Sequence[Room]) -> int:
        """What the tightest GPU keeps, in bytes; negative when a stage does not fit."""
        return min(rooms[gpu].margin(need, *run) for gpu, run in zip(self.gpus, self.runs, strict=True))


def fastest_split(atoms: int, need: Need, fleet: Fleet, count: int, *, width: int = BEAM_WIDTH) -> Split:
    """Split the chain over exactly ``count`` GPUs with the smallest sum of link ranks.

    Ties go to lower positions, then to longer early stages.

    Args:
        atoms: Length of the chain.
        need: Bytes of a run of atoms.
        fleet: The GPUs; some ``count`` of them can hold the chain.
        count: Number of stages.
        width: Most states kept for each number of stages.
    """
    search = _Search(atoms, need, fleet)
    is_exact = search.run(count, width)
    split = search.best()
    if split is None:
        # The states that were kept are all dead ends: give up the links rather than the split.
        assert width < 2**63, "No split holds the chain."
        split = fastest_split(atoms, need, fleet.without_preference, count, width=2**63)
    return msgspec.structs.replace(split, is_exact=is_exact)


def any_split(atoms: int, need: Need, fleet: Fleet, count: int) -> Split:
    """A split over exactly ``count`` GPUs that holds; the same arguments as :func:`fastest_split`, links not compared."""
    kinds = fleet.kinds_for_room
    if fleet.has_broken:
        return fastest_split(atoms, need, fleet.without_preference, count, width=2**63)
    stages = [extents(atoms, need, fleet.rooms[kind[0]]) for kind in kinds]
    levels: list[dict[tuple[int, ...], int]] = [{(0,) * len(kinds): 1}]
    for _ in range(count):
        grown: dict[tuple[int, ...], int] = {}
        for used, prefixes in levels[-1].items():
            for kind, stage in enumerate(stages):
                if used[kind] < len(kinds[kind]) and (reached := extend(prefixes, stage)):
                    larger = _changed(used, kind, 1)
                    grown[larger] = grown.get(larger, 0) | reached
        levels.append(grown)
    end = atoms
    used = next(used for used, prefixes in levels.pop().items() if prefixes >> atoms & 1)
    gpus: list[int] = []
    ends: list[int] = []
    for level in reversed(levels):
        kind, begins = next(
            (kind, begins)
            for kind, members in enumerate(used)
            if members and (begins := _begins(level.get(_changed(used, kind, -1), 0), stages[kind], end))
        )
        gpus.insert(0, kinds[kind][used[kind] - 1])
        ends.insert(0, end)
        used, end = _changed(used, kind, -1), begins.bit_length() - 1
    return Split(tuple(gpus), tuple(ends))


def _begins(prefixes: int, stage: Extents, end: int) -> int:
    """Prefixes from which one more stage reaches ``end``, as bits."""
    return prefixes & sum(1 << first for first in range(end) if stage.ends[first] >= end)


class _Search:
    """One search through the sets of GPUs, from the end of the chain."""

    def __init__(self, atoms: int, need: Need, fleet: Fleet) -> None:
        self._atoms = atoms
        self._kinds = fleet.kinds
        numbers = range(len(self._kinds))
        self._steps = [[fleet.step(self._kinds[a], self._kinds[b]) for b in numbers] for a in numbers]
        rooms = (fleet.rooms[kind[0]] for kind in self._kinds)
        self._stages = [
            extents(atoms, lambda first, end: need(atoms - end, atoms - first), room.mirrored(atoms)) for room in rooms
        ]
        self._levels: list[_Level] = []

    def run(self, count: int, width: int) -> bool:
        """Find all states of ``count`` GPUs; false when some were dropped on the way."""
        is_exact = True
        none_used = (0,) * len(self._kinds)
        level: _Level = {}
        for kind, stage in enumerate(self._stages):
            level[_changed(none_used, kind, 1), kind] = {0: extend(1, stage)}
        self._levels = [level]
        while len(self._levels) < count:
            level = self._grown(level)
            if len(level) > width:
                is_exact = False
                kept = sorted(level.items(), key=lambda item: (min(item[1]), -max(item[1].values()), item[0]))
                level = dict(kept[:width])
            self._levels.append(level)
        return is_exact

    def _grown(self, level: _Level) -> _Level:
        """Put one more GPU in front of every state."""
        grown: _Level = {}
        for (used, first), totals in level.items():
            for kind, stage in enumerate(self._stages):
                step = self._steps[kind][first]
                if used[kind] == len(self._kinds[kind]) or step is None:
                    continue
                for total, begins in totals.items():
                    reached = extend(begins, stage)
                    if reached:
                        known = grown.setdefault((_changed(used, kind, 1), kind), {})
                        known[total + step] = known.get(total + step, 0) | reached
        return grown

    def best(self) -> Split | None:
        """The split of the smallest total, or ``None`` when none is complete."""
        complete = [
            (total, self._positions(used), kind, used)
            for (used, kind), totals in self._levels[-1].items()
            for total, begins in totals.items()
            if begins >> self._atoms & 1
        ]
        if not complete:
            return None
        total, _, kind, used = min(complete)
        members = [iter(positions) for positions in self._kinds]
        gpus, ends = [next(members[kind])], []
        rest = self._atoms
        for level in reversed(self._levels[:-1]):
            used = _changed(used, kind, -1)
            kind, total, borders = self._following(level, used, kind, total, rest)
            rest = (borders & -borders).bit_length() - 1
            ends.append(self._atoms - rest)
            gpus.append(next(members[kind]))
        return Split(tuple(gpus), (*ends, self._atoms))

    def _following(self, level: _Level, used: tuple[int, ...], kind: int, total: int, rest: int) -> tuple[int, int, int]:
        """The next stage's kind, the total behind it, and the borders at which a stage of ``kind`` can hand over to it."""
        ends = self._stages[kind].ends
        holds = sum(1 << border for border in range(rest) if ends[border] >= rest)
        return next(
            (following, total - step, borders)
            for following, members in enumerate(used)
            if members
            and (step := self._steps[kind][following]) is not None
            and (borders := level.get((used, following), {}).get(total - step, 0) & holds)
        )

    def _positions(self, used: tuple[int, ...]) -> tuple[int, ...]:
        """The GPUs of a set: the lowest positions of each kind."""
        return tuple(sorted(position for number, kind in zip(used, self._kinds, strict=True) for position in kind[:number]))


def _changed(used: tuple[int, ...], kind: int, by: int) -> tuple[int, ...]:
    """The set with one GPU of a kind more or fewer."""
    return (*used[:kind], used[kind] + by, *used[kind + 1 :])


def even_out(
    split: Split, need: Need, rooms: Sequence[Room], is_allowed: Callable[[Split], bool] = lambda _: True
) -> Split:
    """Move borders by single atoms while that leaves more in the tighter of the two stages that they part.

    The search settles only the tightest GPU of all; this settles the others.

    Args:
        split: A split that holds.
        need: Bytes of a run of atoms.
        rooms: Of each GPU.
        is_allowed: What must stay true of the split.
    """
    has_moved = True
    while has_moved:
        has_moved = False
        for border in range(len(split.gpus) - 1):
            pair = slice(border, border + 2)

            def tighter(candidate: Split, pair: slice = pair) -> int:
                runs = zip(candidate.gpus[pair], candidate.runs[pair], strict=True)
                return min(rooms[gpu].margin(need, *run) for gpu, run in runs)

            for by in (-1, 1):
                candidate = split.moved(border, by)
                if candidate and tighter(candidate) > tighter(split) and is_allowed(candidate):
                    split, has_moved = candidate, True
    return split
