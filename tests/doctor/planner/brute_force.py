"""Every split there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from vlm_doctor.planner.order import Split


def all_splits(atoms: int, gpus: int, count: int) -> Iterator[Split]:
    for order in itertools.permutations(range(gpus), count):
        for cuts in itertools.combinations(range(1, atoms), count - 1):
            yield Split(order, (*cuts, atoms))
