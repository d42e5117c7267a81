"""Every split there is, and the best of them by the planner's objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlm_doctor.planner.fleet import Fleet
from vlm_doctor.planner.memory import Footprint
from vlm_doctor.planner.order import Split
from vlm_doctor.planner.search import MARGIN_STEP, longest_text_tokens
from vlm_doctor.workload import Preference


def all_splits(atoms: int, gpus: int, count: int) -> Iterator[Split]:
    for order in itertools.permutations(range(gpus), count):
        for cuts in itertools.combinations(range(1, atoms), count - 1):
            yield Split(order, (*cuts, atoms))


class Judged(NamedTuple):
    """A split that holds, and what the objective looks at."""

    split: Split
    stages: int
    longest: int
    margin_steps: int
    total: int


def holding_splits(footprint: Footprint, fleet: Fleet, counts: range, most_text_tokens: int) -> list[Judged]:
    """All splits that hold the workload and use no broken link."""
    wanted = footprint.needs(footprint.workload.text_tokens)
    result = []
    for count in counts:
        for split in all_splits(len(footprint.atoms), len(fleet.rooms), count):
            if any(fleet.ranks[a][b] is None for a, b in itertools.pairwise(split.gpus)):
                continue
            longest = longest_text_tokens(footprint, fleet.rooms, split, most_text_tokens)
            if longest is not None:
                steps = split.margin(wanted, fleet.rooms) // MARGIN_STEP
                result.append(Judged(split, count, longest, steps, fleet.total(split.gpus)))
    return result


def best_of(splits: list[Judged], prefer: Preference) -> tuple[int, ...]:
    """What the best split reaches, in the order in which it counts."""
    orders: dict[Preference, Callable[[Judged], tuple[int, ...]]] = {
        "balanced": lambda split: (split.stages, -split.longest, -split.margin_steps, split.total),
        "speed": lambda split: (split.stages, split.total, -split.longest, -split.margin_steps),
        "context": lambda split: (-split.longest, split.stages, -split.margin_steps, split.total),
    }
    return min(map(orders[prefer], splits))
