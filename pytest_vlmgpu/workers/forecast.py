"""Which worker of pytest-xdist would get which GPUs and models, for ``--vlm-plan``; nothing is leased."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..gating.selection import judge
from ..gating.slices import has_slices
from ..leasing.sets import by_preference, demands_of, divide, owners_of
from ..leasing.shares import Wish
from ..requirements import Requirements
from ..wording import plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlm_doctor.machine import Machine

    from ..leasing.sets import Need, PlanOf
    from ..options import GpuChoice


def lines(needs: Sequence[Need], machine: Machine, choice: GpuChoice, workers: int, plan_of: PlanOf) -> list[str]:
    """``worker 0 with GPU 0: org/model (3 tests)``, as if no other run had leased anything.

    Args:
        needs: Of all groups of tests.
        machine: On which they would run.
        choice: ``--vlm-gpus``; ``none`` is not asked here.
        workers: How many there would be.
        plan_of: Places a model.
    """
    usable = judge(Requirements(), machine, choice, is_busy_decided_later=True)
    by_group = {number: demands_of(need, machine, choice, plan_of) for number, need in enumerate(needs)}
    running = {number: wanted for number, wanted in by_group.items() if wanted}
    if usable.action != "run" or not running:
        return []
    everything = [demand for wanted in running.values() for demand in wanted]
    wish = Wish(len(usable.gpus), choice.kind == "auto", everything, workers)
    leased = wish.pick(by_preference(usable.gpus, everything, machine), is_last=True)
    indices = {str(index): index for index in usable.gpus if index in leased}
    largest = [max(wanted, key=lambda demand: demand.gpus).gpus for wanted in running.values()]
    most = 1 if has_slices(machine, leased) else None
    sets = [[indices[name] for name in names] for names in divide(list(indices), largest, workers, most=most)]
    owners = owners_of(running, {number: needs[number].tests for number in running}, sets)
    told = []
    for worker, own in enumerate(sets):
        groups = [_group(needs[number]) for number in running if owners[number] == worker]
        gpu = f"GPU {', '.join(map(str, own))}" if own else "no GPU"
        told.append(f"worker {worker} with {gpu}: {', '.join(groups) or 'tests without a GPU'}")
    return told


def _group(need: Need) -> str:
    count = plural(need.tests, "test")
    return f"{need.specs[0].label} ({count})" if need.specs else f"{count} of GPUs"
