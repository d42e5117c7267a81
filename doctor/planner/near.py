"""Splits that are nearly as good as the best, for a finer judge than the formulas to choose among."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, permutations

from .fleet import Fleet
from .memory import Footprint
from .order import Split
from .place import Need, extents
from .search import Choice

MOST_REORDERED = 4
"""Stages up to which every order of the chosen GPUs is tried: 24 orders."""


def near_best(footprint: Footprint, fleet: Fleet, choice: Choice, *, share: float = 0.05) -> Iterator[Split]:
    """Every split over the chosen GPUs that holds the workload and a prompt at most ``share`` shorter than the longest.

    The chosen split comes first, then the others by falling margin at that prompt. With up to :data:`MOST_REORDERED`
    stages all orders of the GPUs are tried, with more only the chosen one; GPUs that are interchangeable are not swapped.

    Args:
        footprint: The model and its workload.
        fleet: The GPUs.
        choice: What :func:`~vlm_doctor.planner.search.choose` found for them.
        share: From 0 to 1; of the prompt's tokens, images included.
    """
    atoms, images = len(footprint.atoms), footprint.images.tokens
    shortest = int((choice.text_tokens + images) * (1 - share)) - images
    need = footprint.needs(max(footprint.workload.text_tokens, shortest))
    chosen = choice.split
    orders = permutations(chosen.gpus) if len(chosen.gpus) <= MOST_REORDERED else iter([chosen.gpus])
    kind = {position: number for number, members in enumerate(fleet.kinds) for position in members}
    seen: set[tuple[int, ...]] = {tuple(kind[gpu] for gpu in chosen.gpus)}
    found = list(_splits(atoms, need, fleet, chosen.gpus))
    for order in orders:
        likeness = tuple(kind[gpu] for gpu in order)
        if likeness not in seen and all(fleet.ranks[a][b] is not None for a, b in pairwise(order)):
            seen.add(likeness)
            found += _splits(atoms, need, fleet, order)
    yield chosen
    others = (split for split in found if (split.gpus, split.ends) != (chosen.gpus, chosen.ends))
    yield from sorted(others, key=lambda split: -split.margin(need, fleet.rooms))


def _splits(atoms: int, need: Need, fleet: Fleet, order: tuple[int, ...]) -> Iterator[Split]:
    """All splits over the GPUs in this order that fit, shorter early stages first."""
    stages = [extents(atoms, need, fleet.rooms[gpu]).ends for gpu in order]
    # Where each stage may begin so that it and those behind it reach the end of the chain.
    begins = [{atoms}]
    for ends in reversed(stages):
        reachable = begins[-1]
        begins.append({first for first, end in enumerate(ends) if not reachable.isdisjoint(range(first + 1, end + 1))})
    begins.reverse()

    def grow(number: int, first: int) -> Iterator[tuple[int, ...]]:
        if number == len(order):
            yield ()
            return
        for end in range(first + 1, stages[number][first] + 1):
            if end in begins[number + 1]:
                for rest in grow(number + 1, end):
                    yield (end, *rest)

    if 0 in begins[0]:
        yield from (Split(order, borders) for borders in grow(0, 0))
