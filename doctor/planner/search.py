"""Choose a split by the planner's objective, step by step; each step keeps what the earlier ones reached.

1. It fits the workload. 2. What the policy prefers:

- ``balanced``: fewest GPUs, at least the policy's; then the longest prompt; then the largest margin in the tightest GPU;
  then the fastest links.
- ``speed``: fewest GPUs; then the fastest links; then the longest prompt; then the largest margin.
- ``context``: the longest prompt; then fewest GPUs; then the largest margin; then the fastest links.

3. The lowest indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..units import MIB
from ..workload import Preference
from .fleet import Fleet, Room
from .memory import Footprint
from .order import Split, any_split, even_out, fastest_split
from .place import Need, largest, smallest_count

MARGIN_STEP = MIB
"""Resolution of the margin: finer than any of the figures it is made of."""
_WORST_MARGIN = 2**50
"""In steps: no stage lacks more, whatever is asked for."""


class Choice(msgspec.Struct, frozen=True):
    """The split chosen for a workload that fits."""

    split: Split
    text_tokens: int
    """Most text tokens of one prompt that it can take, with the workload's images."""
    is_rounded: bool
    """True when so many GPUs differ that their capacities were rounded down."""


def choose(
    footprint: Footprint, fleet: Fleet, counts: range, most_text_tokens: int, prefer: Preference = "balanced"
) -> Choice | None:
    """The best split that fits, or ``None``.

    Args:
        footprint: The model and its workload.
        fleet: The GPUs.
        counts: Numbers of GPUs allowed.
        most_text_tokens: Text tokens beyond which a longer prompt is of no use.
        prefer: What counts among the splits that fit.
    """
    atoms = len(footprint.atoms)
    text_tokens = footprint.workload.text_tokens
    most = max(text_tokens, most_text_tokens)
    coarse = fleet.rounded()
    rooms = coarse.rooms
    wanted = footprint.needs(text_tokens)
    count = smallest_count(atoms, wanted, coarse, counts)
    if count is None:
        return None
    # A good split to begin with makes both searches short: they start from what it reaches.
    start = _evened(atoms, wanted, wanted, coarse, count)
    total = None
    if prefer == "speed" and coarse.has_preference:
        start = even_out(fastest_split(atoms, wanted, coarse, count), wanted, rooms)
        if not start.is_exact:
            coarse = coarse.only(start.gpus)
            start = even_out(fastest_split(atoms, wanted, coarse, count), wanted, rooms)
        total = coarse.total(start.gpus) if start.is_exact else None
    reached = longest_text_tokens(footprint, rooms, start, most)
    assert reached is not None
    if prefer == "context":
        longest = largest(
            reached, most, lambda tokens: smallest_count(atoms, footprint.needs(tokens), coarse, counts) is not None
        )
        count = smallest_count(atoms, footprint.needs(longest), coarse, counts)
        assert count is not None

    def holds(need: Need) -> bool:
        if smallest_count(atoms, need, coarse, range(count, count + 1)) is None:
            return False
        return total is None or coarse.total(fastest_split(atoms, need, coarse, count).gpus) <= total

    if prefer != "context":
        longest = largest(reached, most, lambda tokens: holds(footprint.needs(tokens)))
    at_longest = footprint.needs(longest)

    def with_margin(steps: int) -> Need:
        return lambda first, end: max(at_longest(first, end), wanted(first, end) + steps * MARGIN_STEP)

    if longest > reached:
        start = _evened(atoms, at_longest, wanted, coarse, count)
    margin = largest(start.margin(wanted, rooms) // MARGIN_STEP, _WORST_MARGIN, lambda steps: holds(with_margin(steps)))
    split = fastest_split(atoms, with_margin(margin), coarse, count)
    split = even_out(split, wanted, rooms, lambda candidate: candidate.margin(at_longest, rooms) >= 0)
    return Choice(split, longest, is_rounded=rooms != fleet.rooms)


def _evened(atoms: int, need: Need, wanted: Need, fleet: Fleet, count: int) -> Split:
    """A split that holds ``need``, its borders moved to where its stages have the most room for ``wanted``."""
    split = any_split(atoms, need, fleet, count)
    return even_out(split, wanted, fleet.rooms, lambda candidate: candidate.margin(need, fleet.rooms) >= 0)


def closest(footprint: Footprint, fleet: Fleet, counts: range) -> tuple[int, Split] | None:
    """The largest margin in the tightest GPU that any split has, in bytes, and such a split over the fewest GPUs.

    The margin is negative when nothing fits, and exact to :data:`MARGIN_STEP`. ``None`` when no split has as many stages.
    """
    atoms = len(footprint.atoms)
    wanted = footprint.needs(footprint.workload.text_tokens)
    coarse = fleet.rounded()

    def with_margin(steps: int) -> Need:
        return lambda first, end: wanted(first, end) + steps * MARGIN_STEP

    def count(steps: int, allowed: range = counts) -> int | None:
        return smallest_count(atoms, wanted, coarse, allowed, slack_bytes=steps * MARGIN_STEP)

    possible = next((n for n in reversed(counts) if count(-_WORST_MARGIN, range(n, n + 1)) is not None), None)
    if possible is None:
        return None
    start = _evened(atoms, with_margin(-_WORST_MARGIN), wanted, coarse, possible)
    margin = largest(
        start.margin(wanted, coarse.rooms) // MARGIN_STEP, _WORST_MARGIN, lambda steps: count(steps) is not None
    )
    needed = count(margin)
    assert needed is not None
    return margin * MARGIN_STEP, fastest_split(atoms, with_margin(margin), coarse, needed)


def longest_text_tokens(footprint: Footprint, rooms: Sequence[Room], split: Split, most_text_tokens: int) -> int | None:
    """Most text tokens of one prompt that a given split can take; ``None`` when the workload itself does not fit."""
    low = footprint.workload.text_tokens

    def holds(tokens: int) -> bool:
        return split.margin(footprint.needs(tokens), rooms) >= 0

    return largest(low, max(low, most_text_tokens), holds) if holds(low) else None
