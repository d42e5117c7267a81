"""The GPUs as the search sees them: room, atoms that are kept off each, and ranks of the links between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

Rank = Callable[[int, int], "int | None"]
"""Rank of the link between two GPUs by their positions; 0 is best, ``None`` forbids that one follows the other."""

MAX_SETS = 1_024
"""Most sets of GPUs that are looked at: 10 GPUs with different room. Beyond it capacities are rounded down until fewer
differ, which can only make a plan more careful."""
_FIRST_STEP = 16 * 2**20
_ENDS = 4
"""GPUs that a set of eight may end with, on average."""
_UNFIT = -(2**60)
"""Margin of a stage with an atom that is barred from its GPU: below any real one."""


class Room(NamedTuple):
    """What one GPU can take."""

    capacity_bytes: int
    barred: int = 0
    """Numbers of the atoms that must not be on it, as bits: they are pinned to other GPUs."""

    def margin(self, need: Callable[[int, int], int], first: int, end: int) -> int:
        """What is left beside the atoms from ``first`` to ``end``, in bytes; negative when they cannot be here."""
        if self.barred >> first & ((1 << (end - first)) - 1):
            return _UNFIT
        return self.capacity_bytes - need(first, end)

    def mirrored(self, atoms: int) -> Room:
        """The same for a chain of so many atoms that is read from its end."""
        barred = int(f"{self.barred:0{atoms}b}"[::-1], 2) if self.barred else 0
        return self._replace(barred=barred)


def no_preference(_a: int, _b: int) -> int:
    """A rank that makes all links equal."""
    return 0


class Fleet:
    """GPUs with their rooms and links. Positions count from 0; equal questions have equal answers for equal GPUs."""

    def __init__(self, rooms: Sequence[Room | int], rank: Rank = no_preference) -> None:
        """Look at every link once.

        Args:
            rooms: Of each GPU; a number is its capacity in bytes.
            rank: Of the link between two positions.
        """
        self.rooms = tuple(room if isinstance(room, Room) else Room(room) for room in rooms)
        numbers = range(len(self.rooms))
        self.ranks = [[None if a == b else rank(a, b) for b in numbers] for a in numbers]

    @cached_property
    def has_broken(self) -> bool:
        """Whether some GPUs must not be neighbors."""
        return any(rank is None for a, row in enumerate(self.ranks) for b, rank in enumerate(row) if a != b)

    @cached_property
    def has_preference(self) -> bool:
        """Whether some links are better than others."""
        return len({rank for a, row in enumerate(self.ranks) for b, rank in enumerate(row) if a != b} - {None}) > 1

    @cached_property
    def kinds(self) -> list[tuple[int, ...]]:
        """Groups of positions with the same room and the same links to every other position."""
        kinds: list[tuple[int, ...]] = []
        for position in range(len(self.rooms)):
            alike = next((number for number, kind in enumerate(kinds) if self._is_like(position, kind[0])), None)
            if alike is None:
                kinds.append((position,))
            else:
                kinds[alike] += (position,)
        return kinds

    def _is_like(self, a: int, b: int) -> bool:
        return self.rooms[a] == self.rooms[b] and all(
            self.ranks[a][other] == self.ranks[b][other] for other in range(len(self.rooms)) if other not in (a, b)
        )

    @cached_property
    def without_preference(self) -> Fleet:
        """The same GPUs with links that are either broken or all equal."""
        return Fleet(self.rooms, lambda a, b: None if self.ranks[a][b] is None else 0)

    @cached_property
    def kinds_for_room(self) -> list[tuple[int, ...]]:
        """Groups of positions that the question whether the chain fits cannot tell apart."""
        return self.without_preference.kinds

    @cached_property
    def followers(self) -> dict[int, list[int]]:
        """For each number of a group of :attr:`kinds_for_room`, those that may follow it; -1 is before the first stage."""
        kinds = self.kinds_for_room
        numbers = range(len(kinds))
        allowed = {a: [b for b in numbers if self.step(kinds[a], kinds[b]) is not None or a == b] for a in numbers}
        for number, members in enumerate(kinds):
            if len(members) > 1 and self.step(members, members) is None:
                allowed[number].remove(number)
        return {-1: list(numbers), **allowed}

    def step(self, kind: tuple[int, ...], following: tuple[int, ...]) -> int | None:
        """Rank of the link from one group of positions to the next, which may be the same; ``None`` when it is broken."""
        if kind == following:
            return self.ranks[kind[0]][kind[1]] if len(kind) > 1 else None
        return self.ranks[kind[0]][following[0]]

    def total(self, gpus: Sequence[int]) -> int:
        """Sum of the ranks along a chain of positions none of whose links is broken."""
        return sum(self.ranks[a][b] or 0 for a, b in pairwise(gpus))

    def rounded(self) -> Fleet:
        """The same where few enough GPUs differ, else with capacities rounded down to the smallest step that makes it so.

        Where it is broken links that tell too many apart, GPUs at such links are left out, those with the most first.
        """
        fleet = self
        while fleet._states > MAX_SETS and fleet.has_broken:
            fleet = fleet._without_worst()
        step = 1
        rooms = fleet.rooms
        while fleet._states > MAX_SETS:
            step = max(_FIRST_STEP, 2 * step)
            coarse = [room._replace(capacity_bytes=room.capacity_bytes // step * step) for room in rooms]
            fleet = fleet.with_rooms(coarse)
        return fleet

    def only(self, gpus: Collection[int]) -> Fleet:
        """The same with no room on the other GPUs."""
        rooms = [room if position in gpus else Room(-1) for position, room in enumerate(self.rooms)]
        return Fleet(rooms, lambda a, b: self.ranks[a][b] if a in gpus and b in gpus else 0)

    def with_rooms(self, rooms: Sequence[Room | int]) -> Fleet:
        """The same links between GPUs with other rooms."""
        return Fleet(rooms, lambda a, b: self.ranks[a][b])

    @property
    def _states(self) -> int:
        """Sets of GPUs; where links are broken each counts for the several GPUs that it may end with."""
        sets = math.prod(len(members) + 1 for members in self.kinds_for_room)
        return sets * _ENDS if self.has_broken else sets

    def _without_worst(self) -> Fleet:
        """Make the GPU with the most broken links unusable, and its links of no interest."""
        broken = [sum(rank is None for rank in row) for row in self.ranks]
        worst = broken.index(max(broken))
        return self.only([position for position in range(len(self.rooms)) if position != worst])
