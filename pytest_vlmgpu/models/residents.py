"""The models that are loaded now, which of them goes next, and whether their memory came back."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from vlm_doctor.machine import Machine
    from vlm_doctor.placement import Plan

    from ..requirements import VlmSpec
    from ..watching.meter import Meter
    from .loads import Load

CONTEXT_BYTES = 2**30
"""What may stay after the first model on a GPU: CUDA context and library workspaces, 0.6 GiB measured on H200."""


@dataclass
class Resident:
    """One loaded model."""

    spec: VlmSpec
    plan: Plan | None
    value: Any
    """Of the fixture ``vlm``."""
    load: Load
    stack: ExitStack
    """Unloads the model when it is closed."""
    meter: Meter
    before: dict[str, int] = field(default_factory=dict)
    """UUID of each of its GPUs to the memory that was free before it was loaded, in bytes."""
    uuids: tuple[str, ...] = ()
    """Its GPUs; empty on the CPU."""


class Residents:
    """Models that are loaded, in the order in which they came."""

    def __init__(self) -> None:
        self._models: dict[VlmSpec, Resident] = {}
        self._awaited: dict[str, tuple[int, Load]] = {}
        """GPU UUID to the free memory that should be back, and the load that had it."""
        self.uses: Mapping[VlmSpec, Sequence[int]] = {}
        """Positions of the tests that use each model."""
        self.now = -1
        """Position of the test that is set up."""

    def get(self, spec: VlmSpec) -> Resident | None:
        """The model, if it is loaded."""
        return self._models.get(spec)

    def __len__(self) -> int:
        return len(self._models)

    def add(self, resident: Resident) -> None:
        """Note a model that was loaded."""
        self._models[resident.spec] = resident

    def forget(self, resident: Resident) -> None:
        """Take back :meth:`add`: the model is unloaded by whoever loaded it."""
        self._models.pop(resident.spec, None)

    def remove(self, resident: Resident) -> None:
        """Unload a model."""
        self._models.pop(resident.spec, None)
        if not self._models:  # beside another model, nobody can tell whose memory it is
            self._awaited.update({uuid: (size, resident.load) for uuid, size in resident.before.items()})
        resident.stack.close()

    def remove_all(self) -> None:
        """Unload every model, the last one first."""
        for resident in reversed(list(self._models.values())):
            self.remove(resident)

    def remove_least_useful(self, in_use: Collection[VlmSpec] = ()) -> bool:
        """Unload the model whose next test is furthest away, or that no test needs any more; False when there is none.

        Args:
            in_use: Models that must stay.
        """
        removable = [resident for resident in self._models.values() if resident.spec not in in_use]
        if not removable:
            return False
        self.remove(max(removable, key=lambda resident: self.next_use(resident.spec)))
        return True

    def next_use(self, spec: VlmSpec) -> float:
        """Position of the next test that uses a model; infinite when there is none."""
        return min((position for position in self.uses.get(spec, ()) if position > self.now), default=math.inf)

    def missing(self, machine: Machine) -> int:
        """Bytes that models which were unloaded have not given back, beyond what a CUDA context keeps.

        Args:
            machine: Read after they were unloaded, before anything else is loaded. Memory that other processes have taken
                since is theirs.
        """
        missing = 0
        for gpu in machine.gpus:
            if gpu.uuid in self._awaited and gpu.memory_free_bytes is not None:
                others = sum(process.used_bytes or 0 for process in gpu.processes if process.pid != os.getpid())
                expected, load = self._awaited[gpu.uuid]
                short = expected - gpu.memory_free_bytes - CONTEXT_BYTES - others
                load.missing_bytes = max(short, 0)
                missing += max(0, short)
        return missing

    def settle(self) -> None:
        """Stop waiting for memory: what is missing was noted."""
        self._awaited.clear()


def free_before(plan: Plan | None, machine: Machine | None, *, is_open: bool = False) -> dict[str, int]:
    """Memory that is free on the GPUs of a plan, without that of other processes, which come and go.

    Args:
        plan: ``None`` where no GPU is used.
        machine: As last read.
        is_open: Any other GPU may be used too.
    """
    if plan is None or machine is None:
        return {}
    wanted = {gpu.uuid for gpu in machine.gpus} if is_open else {stage.uuid for stage in plan.stages}
    return {
        gpu.uuid: gpu.memory_free_bytes
        + sum(process.used_bytes or 0 for process in gpu.processes if process.pid != os.getpid())
        for gpu in machine.gpus
        if gpu.uuid in wanted and gpu.memory_free_bytes is not None
    }
