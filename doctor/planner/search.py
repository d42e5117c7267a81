"""Choose a split by the planner's objective, step by step; each step keeps what the earlier ones reached.

1. It fits the workload. 2. Fewest GPUs, at least the policy's. 3. The longest prompt. 4. The largest margin in the tightest
GPU. 5. The fastest links. 6. The lowest indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..units import MIB
from .memory import Footprint
from .order import Rank, Split, even_out, fastest_split
from .place import Need, largest, rounded, smallest_count

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
    footprint: Footprint, capacities: Sequence[int], counts: range, most_text_tokens: int, rank: Rank
) -> Choice | None:
    """The best split that fits, or ``None``.

    Args:
        footprint: The model and its workload.
        capacities: Bytes that each GPU can give to it.
        counts: Numbers of GPUs allowed.
        most_text_tokens: Text tokens beyond which a longer prompt is of no use.
        rank: Rank of the link between two positions among the capacities.
    """
    atoms = len(footprint.atoms)
    text_tokens = footprint.workload.text_tokens
    caps = rounded(capacities)
    wanted = footprint.needs(text_tokens)
    count = smallest_count(atoms, wanted, caps, counts)
    if count is None:
        return None
    exactly = range(count, count + 1)

    def holds_prompt(tokens: int) -> bool:
        return smallest_count(atoms, footprint.needs(tokens), caps, exactly) is not None

    longest = largest(text_tokens, max(text_tokens, most_text_tokens), holds_prompt)
    at_longest = footprint.needs(longest)

    def with_margin(steps: int) -> Need:
        return lambda first, end: max(at_longest(first, end), wanted(first, end) + steps * MARGIN_STEP)

    def holds_margin(steps: int) -> bool:
        return smallest_count(atoms, with_margin(steps), caps, exactly) is not None

    margin = largest(0, _WORST_MARGIN, holds_margin)
    split = fastest_split(atoms, with_margin(margin), caps, count, rank)
    split = even_out(split, wanted, caps, lambda candidate: candidate.margin(at_longest, caps) >= 0)
    return Choice(split, longest, is_rounded=list(capacities) != caps)


def closest(footprint: Footprint, capacities: Sequence[int], counts: range, rank: Rank) -> tuple[int, Split] | None:
    """The largest margin in the tightest GPU that any split has, in bytes, and such a split over the fewest GPUs.

    The margin is negative when nothing fits, and exact to :data:`MARGIN_STEP`. ``None`` when no split has as many stages.
    """
    atoms = len(footprint.atoms)
    wanted = footprint.needs(footprint.workload.text_tokens)
    caps = rounded(capacities)

    def with_margin(steps: int) -> Need:
        return lambda first, end: wanted(first, end) + steps * MARGIN_STEP

    def count(steps: int) -> int | None:
        return smallest_count(atoms, with_margin(steps), caps, counts)

    if count(-_WORST_MARGIN) is None:
        return None
    if count(0) is None:
        margin = -1 - largest(0, _WORST_MARGIN, lambda steps: count(-steps) is None)
    else:
        margin = largest(0, _WORST_MARGIN, lambda steps: count(steps) is not None)
    needed = count(margin)
    assert needed is not None
    return margin * MARGIN_STEP, fastest_split(atoms, with_margin(margin), caps, needed, rank)


def longest_text_tokens(footprint: Footprint, capacities: Sequence[int], split: Split, most_text_tokens: int) -> int | None:
    """Most text tokens of one prompt that a given split can take; ``None`` when the workload itself does not fit."""
    low = footprint.workload.text_tokens

    def holds(tokens: int) -> bool:
        return split.margin(footprint.needs(tokens), capacities) >= 0

    return largest(low, max(low, most_text_tokens), holds) if holds(low) else None
