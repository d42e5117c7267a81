"""Which GPUs a run takes, and which of them each worker gets. Pure: names of GPUs and needs in, sets out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..gating.selection import judge
from ..gating.slices import has_slices
from ..requirements import Requirements, VlmSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..options import GpuChoice

    PlanOf = Callable[[VlmSpec, Machine, tuple[int, ...]], Plan | None]


@dataclass(frozen=True)
class Need:
    """What the GPUs of one group of tests must offer: tests that share a load, or one test that loads nothing."""

    specs: tuple[VlmSpec, ...]
    """The model that they share; of a test that loads nothing, the models it names."""
    requirements: tuple[Requirements, ...]
    """Of each of these tests that asks for something else than the others."""
    takes_all: bool = False
    """True with the fixture ``vlm_gpus``: such a test may use every GPU of the run."""
    tests: int = 1


class Demand(NamedTuple):
    """How many GPUs one group of tests takes, and which will do."""

    gpus: int
    able: tuple[int, ...] = ()
    """GPU indices, in CUDA order."""
    preferred: tuple[int, ...] = ()
    """Those that a plan would choose, if all could be had."""

    def is_met_by(self, gpus: Iterable[int]) -> bool:
        """True when these GPUs are enough."""
        return len(set(gpus).intersection(self.able)) >= self.gpus


def demands_of(need: Need, machine: Machine, choice: GpuChoice, plan_of: PlanOf) -> list[Demand]:
    """Tell how many GPUs a group of tests takes of those that the run may use.

    Args:
        need: Of one group of tests.
        machine: As last read.
        choice: ``--vlm-gpus``.
        plan_of: Places a model; a model that it cannot place counts as its markers say.

    Returns:
        Nothing, when the tests will not run here anyway; several, when no GPU meets what they ask for together.
    """
    single = [_demand(need, each, machine, choice, plan_of) for each in need.requirements]
    runnable = [each for each, demand in zip(need.requirements, single, strict=True) if demand is not None]
    joint = _demand(need, Requirements.strictest(runnable), machine, choice, plan_of) if len(runnable) > 1 else None
    return [joint] if joint is not None else [demand for demand in single if demand is not None]


def _demand(need: Need, requirements: Requirements, machine: Machine, choice: GpuChoice, plan_of: PlanOf) -> Demand | None:
    verdict = judge(requirements, machine, choice, is_busy_decided_later=True)
    if verdict.action != "run":
        return None
    count = max(1, requirements.gpus)
    preferred: tuple[int, ...] = ()
    if requirements.total_vram_bytes:
        count = max(count, _count_with(requirements.total_vram_bytes, verdict.gpus, machine))
    for spec in need.specs:
        count = max(count, spec.min_gpus)
        plan = plan_of(spec, machine, verdict.gpus)
        if plan is not None and plan.fits:
            chosen = tuple(stage.gpu for stage in plan.stages)
            count, preferred = max(count, len(chosen)), (*preferred, *chosen)
    count = len(verdict.gpus) if need.takes_all else min(count, len(verdict.gpus))
    if has_slices(machine, verdict.gpus):
        count = 1
    return Demand(count, verdict.gpus, tuple(dict.fromkeys(preferred)))


def _count_with(total_bytes: int, gpus: Sequence[int], machine: Machine) -> int:
    """The fewest of these GPUs that have so much memory in all."""
    sizes = sorted((gpu.memory_free_bytes or 0 for gpu in machine.gpus if gpu.index in gpus), reverse=True)
    sums = [sum(sizes[:count]) for count in range(1, len(sizes) + 1)]
    return next((count for count, size in enumerate(sums, start=1) if size >= total_bytes), len(sizes))


def total_demand(demands: Iterable[Demand], workers: int) -> int:
    """GPUs that so many workers can use at once: the largest needs, one a worker."""
    return sum(sorted((demand.gpus for demand in demands), reverse=True)[:workers])


def cover(ranked: Sequence[int], demands: Iterable[Demand]) -> list[int]:
    """The first GPUs with which every demand is met; those that can be met, where not all can.

    Args:
        ranked: GPU indices that may be taken, best first.
        demands: Of all groups of tests.
    """
    chosen: set[int] = set()
    for demand in sorted(demands, key=lambda demand: len(demand.able)):
        missing = demand.gpus - len(chosen.intersection(demand.able))
        chosen.update([index for index in ranked if index in demand.able and index not in chosen][: max(0, missing)])
    return [index for index in ranked if index in chosen]


def by_preference(gpus: Sequence[int], demands: Iterable[Demand], machine: Machine) -> list[int]:
    """Order GPUs: first those that plans would choose, then those with most free memory, then as CUDA counts them."""
    preferred = {index for demand in demands for index in demand.preferred}
    free_gib = {gpu.index: (gpu.memory_free_bytes or 0) >> 30 for gpu in machine.gpus}
    return sorted(gpus, key=lambda index: (index not in preferred, -free_gib[index], gpus.index(index)))


def divide(gpus: Sequence[str], sizes: Iterable[int], workers: int, *, most: int | None = None) -> list[tuple[str, ...]]:
    """Make disjoint sets, one a worker.

    The first set is as large as the largest need, so that every group of tests has a worker that can run it. What is left
    is shared out evenly among as many workers as there are groups. Where GPUs run out, the other workers get none.

    Args:
        gpus: Names, in the order in which they are given out.
        sizes: GPUs of each need.
        workers: How many there are.
        most: GPUs that any worker can use; ``None`` is any number.

    Returns:
        One set a worker, empty ones last.
    """
    wanted = [min(size, len(gpus)) for size in sizes if size]
    largest = max(wanted, default=1)
    owners = max(1, min(workers, len(wanted), len(gpus) - largest + 1)) if gpus else 0
    spare = len(gpus) - largest
    counts = [largest] * bool(owners)
    for position in range(owners - 1):
        counts.append(spare // (owners - 1) + (position < spare % (owners - 1)))
    if owners == 1:
        counts = [len(gpus)]
    elif owners > 1 and max(counts) > counts[0]:
        # Needs are small beside what there is: nobody is to have more than one GPU more than another.
        counts = [len(gpus) // owners + (position < len(gpus) % owners) for position in range(owners)]
    if most is not None:
        counts = [min(count, most) for count in counts]
    sets, start = [], 0
    for count in counts:
        sets.append(tuple(gpus[start : start + count]))
        start += count
    return sets + [()] * (workers - len(sets))


def owners_of(
    demands: Mapping[int, Sequence[Demand]], tests: Mapping[int, int], sets: Sequence[Sequence[int]]
) -> dict[int, int]:
    """Give each group of tests one worker whose GPUs will do, so that the most tests of any worker are few.

    Args:
        demands: Number of a group to what it takes.
        tests: Number of a group to its tests.
        sets: GPU indices of each worker.

    Returns:
        Number of a group to the position of its worker. A group that nobody can take goes to the worker with most GPUs,
        which reports why it cannot run.
    """
    load = [0] * len(sets)
    largest = max(range(len(sets)), key=lambda worker: (len(sets[worker]), -worker))
    owners = {}
    for number, wanted in sorted(demands.items(), key=lambda item: (-_gpus(item[1]), -tests[item[0]], item[0])):
        able = [worker for worker, gpus in enumerate(sets) if all(demand.is_met_by(gpus) for demand in wanted)]
        chosen = min(able or [largest], key=lambda worker: (load[worker], len(sets[worker]), worker))
        load[chosen] += tests[number]
        owners[number] = chosen
    return owners


def _gpus(demands: Iterable[Demand]) -> int:
    return max((demand.gpus for demand in demands), default=0)
