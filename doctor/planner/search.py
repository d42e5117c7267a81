"""Choose a split by the planner's objective, step by step; each step keeps what the earlier ones reached.

1. It fits the workload. 2. What the policy prefers:

- ``balanced``: fewest GPUs, at least the policy's; then the longest prompt; then the largest margin in the tightest GPU;
  then the fastest links.
- ``speed``: fewest GPUs; then the fastest links; then the longest prompt; then the largest margin.
- ``context``: the longest prompt; then fewest GPUs; then the largest margin; then the fastest links.

3. The lowest indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from ..units import MIB
from ..workload import Preference
from .fleet import Fleet, Room
from .memory import Footprint
from .order import Split, even_out, fastest_split
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
    coarse = fleet.rounded()
    wanted = footprint.needs(text_tokens)
    count = smallest_count(atoms, wanted, coarse, counts)
    if count is None:
        return None

    def holds_on(allowed: range, need: Need) -> bool:
        return smallest_count(atoms, need, coarse, allowed) is not None

    def longest_prompt(holds: Callable[[Need], bool]) -> int:
        most = max(text_tokens, most_text_tokens)
        return largest(text_tokens, most, lambda tokens: holds(footprint.needs(tokens)))

    if prefer == "context":
        longest = longest_prompt(lambda need: holds_on(counts, need))
        count = smallest_count(atoms, footprint.needs(longest), coarse, counts)
        assert count is not None
    exactly = range(count, count + 1)

    total = None
    if prefer == "speed" and coarse.has_preference:
        total = _fastest(atoms, wanted, coarse, count)

    def holds(need: Need) -> bool:
        return holds_on(exactly, need) and (total is None or _fastest(atoms, need, coarse, count) <= total)

    if prefer != "context":
        longest = longest_prompt(holds)
    at_longest = footprint.needs(longest)

    def with_margin(steps: int) -> Need:
        return lambda first, end: max(at_longest(first, end), wanted(first, end) + steps * MARGIN_STEP)

    margin = largest(0, _WORST_MARGIN, lambda steps: holds(with_margin(steps)))
    split = fastest_split(atoms, with_margin(margin), coarse, count)
    split = even_out(split, wanted, coarse.rooms, lambda candidate: candidate.margin(at_longest, coarse.rooms) >= 0)
    return Choice(split, longest, is_rounded=coarse.rooms != fleet.rooms)


def _fastest(atoms: int, need: Need, fleet: Fleet, count: int) -> int:
    """Sum of the link ranks of the fastest split."""
    return fleet.total(fastest_split(atoms, need, fleet, count).gpus)


def closest(footprint: Footprint, fleet: Fleet, counts: range) -> tuple[int, Split] | None:
    """The largest margin in the tightest GPU that any split has, in bytes, and such a split over the fewest GPUs.

    The margin is negative when nothing fits, and exact to :data:`MARGIN_STEP`. ``None`` when no split has as many stages.
    """
    atoms = len(footprint.atoms)
    wanted = footprint.needs(footprint.workload.text_tokens)
    coarse = fleet.rounded()

    def with_margin(steps: int) -> Need:
        return lambda first, end: wanted(first, end) + steps * MARGIN_STEP

    def count(steps: int) -> int | None:
        return smallest_count(atoms, with_margin(steps), coarse, counts)

    if count(-_WORST_MARGIN) is None:
        return None
    if count(0) is None:
        margin = -1 - largest(0, _WORST_MARGIN, lambda steps: count(-steps) is None)
    else:
        margin = largest(0, _WORST_MARGIN, lambda steps: count(steps) is not None)
    needed = count(margin)
    assert needed is not None
    return margin * MARGIN_STEP, fastest_split(atoms, with_margin(margin), coarse, needed)


def longest_text_tokens(footprint: Footprint, rooms: Sequence[Room], split: Split, most_text_tokens: int) -> int | None:
    """Most text tokens of one prompt that a given split can take; ``None`` when the workload itself does not fit."""
    low = footprint.workload.text_tokens

    def holds(tokens: int) -> bool:
        return split.margin(footprint.needs(tokens), rooms) >= 0

    return largest(low, max(low, most_text_tokens), holds) if holds(low) else None
