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

    def count_for(need: Need, allowed: range = counts) -> int | None:
        return smallest_count(atoms, need, coarse, allowed)

    if prefer == "context" and count_for(wanted) is not None:
        most = largest(text_tokens, most, lambda tokens: count_for(footprint.needs(tokens)) is not None)
    count = count_for(footprint.needs(most) if prefer == "context" else wanted)
    if count is None:
        return None
    exactly = range(count, count + 1)
    total = None
    if prefer == "speed" and coarse.has_preference:
        coarse, total = _fastest(atoms, wanted, coarse, count)

    def good_split(need: Need) -> Split:
        split = any_split(atoms, need, coarse, exactly.start)
        if total is not None:
            split = fastest_split(atoms, need, coarse, exactly.start)
        return even_out(split, wanted, rooms, lambda candidate: candidate.margin(need, rooms) >= 0)

    def holds(need: Need) -> bool:
        if count_for(need, exactly) is None:
            return False
        return total is None or coarse.total(fastest_split(atoms, need, coarse, exactly.start).gpus) <= total

    # Both searches start from what a good split reaches, which makes them short.
    start = good_split(wanted)
    reached = longest_text_tokens(footprint, rooms, start, most)
    assert reached is not None
    longest = most
    if prefer != "context":
        longest = largest(reached, most, lambda tokens: holds(footprint.needs(tokens)))
    at_longest = footprint.needs(longest)

    def with_margin(steps: int) -> Need:
        return lambda first, end: max(at_longest(first, end), wanted(first, end) + steps * MARGIN_STEP)

    if longest > reached:
        start = good_split(at_longest)
    margin = largest(start.margin(wanted, rooms) // MARGIN_STEP, _WORST_MARGIN, lambda steps: holds(with_margin(steps)))
    split = fastest_split(atoms, with_margin(margin), coarse, count)
    split = even_out(split, wanted, rooms, lambda candidate: candidate.margin(at_longest, rooms) >= 0)
    return Choice(split, longest, is_rounded=rooms != fleet.rooms)


def _fastest(atoms: int, need: Need, fleet: Fleet, count: int) -> tuple[Fleet, int | None]:
    """The GPUs to choose among, and the smallest sum of link ranks that a split over so many has.

    Where not every order can be compared, only the GPUs of the best that was found stay, and when even their orders are too
    many, the sum is ``None``.
    """
    split = fastest_split(atoms, need, fleet, count)
    if not split.is_exact:
        fleet = fleet.only(split.gpus)
        split = fastest_split(atoms, need, fleet, count)
    return fleet, fleet.total(split.gpus) if split.is_exact else None


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
    start = even_out(any_split(atoms, with_margin(-_WORST_MARGIN), coarse, possible), wanted, coarse.rooms)
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
