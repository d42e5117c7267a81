"""What each GPU can give: its memory, less the driver, other processes, the CUDA context, libraries and headroom."""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec

from ..calibration import calibration_of
from ..data.contexts import Overhead, overhead_of
from ..health import fault_of_gpu
from ..machine import Gpu, Machine
from ..units import format_gib
from ..visibility import visible_gpus
from ..workload import Policy

CONTEXT_BYTES, WORKSPACE_BYTES = overhead_of(None).context_bytes, overhead_of(None).workspace_bytes
"""On a GPU of unknown kind; ``data/contexts.py`` has the others."""


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one GPU, before anything of the model is on it. All in bytes."""

    gpu: Gpu
    total_bytes: int
    driver_bytes: int
    others_bytes: int
    context_bytes: int
    workspace_bytes: int
    headroom_fraction: float
    headroom_min_bytes: int
    total_source: str
    context_source: str
    workspace_source: str = overhead_of(None).workspace_source
    cap_bytes: int | None = None
    """Most bytes that our process may take here, CUDA context included; ``None`` is no such limit."""
    fault: str | None = None
    """Why the GPU should be left alone where others suffice."""

    @property
    def free_bytes(self) -> int:
        """Free now, as the driver sees it."""
        return self.total_bytes - self.driver_bytes - self.others_bytes

    @property
    def headroom_bytes(self) -> int:
        """Left free on purpose."""
        return max(self._usual_headroom_bytes, self._withheld_bytes)

    @property
    def _usual_headroom_bytes(self) -> int:
        return max(math.ceil(self.headroom_fraction * self.free_bytes), self.headroom_min_bytes)

    @property
    def _withheld_bytes(self) -> int:
        """What is free and beyond the limit of our process."""
        return 0 if self.cap_bytes is None else self.free_bytes - self.cap_bytes

    @property
    def headroom_source(self) -> str:
        """Which rule of the policy set the headroom."""
        if self.cap_bytes is not None and self._withheld_bytes >= self._usual_headroom_bytes:
            return f"policy: at most {format_gib(self.cap_bytes)} for this process"
        if self.headroom_bytes > self.headroom_min_bytes:
            return f"policy: {self.headroom_fraction:.0%} of the free memory"
        return "policy: least headroom"

    @property
    def available_bytes(self) -> int:
        """What weights, KV cache, activations and fragmentation may take; negative when not even a context fits."""
        return self.free_bytes - self.context_bytes - self.workspace_bytes - self.headroom_bytes

    def without_others(self) -> Budget:
        """The same GPU, were no other process on it."""
        return msgspec.structs.replace(self, others_bytes=0)


class Exclusion(msgspec.Struct, frozen=True):
    """A GPU that cannot be used."""

    gpu: int
    """Its index."""
    reason: str
    """One phrase."""
    is_permanent: bool
    """True for a setting of the machine or the process; False for a fault, or for use by others."""


class Budgets(msgspec.Struct, frozen=True):
    """The GPUs that can be used, and why the others cannot."""

    usable: tuple[Budget, ...]
    excluded: tuple[Exclusion, ...]

    def sparing(self, needed: Collection[int] = ()) -> Budgets:
        """The same without the GPUs that have a fault, those in ``needed`` excepted."""
        spared = [budget for budget in self.usable if budget.fault is not None and budget.gpu.index not in needed]
        excluded = (Exclusion(budget.gpu.index, f"{budget.fault}, and the others suffice", False) for budget in spared)
        return Budgets(
            usable=tuple(budget for budget in self.usable if budget not in spared),
            excluded=tuple(sorted((*self.excluded, *excluded), key=lambda exclusion: exclusion.gpu)),
        )


def budgets(machine: Machine, policy: Policy) -> Budgets:
    """Make the budget of every GPU that may and can be used, in the order of their indices."""
    visible = visible_gpus(machine).gpus
    usable: list[Budget] = []
    excluded: list[Exclusion] = []
    for gpu in sorted(machine.gpus, key=lambda gpu: gpu.index):
        if gpu.index in policy.exclude or (policy.gpus is not None and gpu.index not in policy.gpus):
            continue
        shares_host = any(budget.gpu.has_unified_memory for budget in usable)
        obstacle = _obstacle(gpu, machine, is_visible=gpu.index in visible, is_host_memory_taken=shares_host)
        if obstacle:
            excluded.append(obstacle)
        else:
            usable.append(_budget(gpu, machine, policy))
    return Budgets(tuple(usable), tuple(excluded))


def _obstacle(gpu: Gpu, machine: Machine, *, is_visible: bool, is_host_memory_taken: bool) -> Exclusion | None:
    """Why a GPU cannot take part in a plan, or ``None``."""
    total_bytes, free_bytes = _memory(gpu, machine)
    is_exclusive = gpu.compute_mode in ("exclusive_process", "exclusive_thread")
    is_used = any(process.kind == "compute" for process in gpu.processes)
    obstacles = (
        (gpu.error is not None, f"fails when asked ({gpu.error})", False),
        (bool(gpu.mig_enabled), "MIG is enabled, and a slice cannot be joined with other GPUs", True),
        (not is_visible, "hidden by CUDA_VISIBLE_DEVICES", True),
        (gpu.compute_mode == "prohibited", "its compute mode is prohibited", True),
        (is_exclusive and is_used, f"its compute mode is {gpu.compute_mode} and a process uses it", False),
        (bool(gpu.has_unified_memory) and is_host_memory_taken, "a GPU that is used already has the host's memory", True),
        (total_bytes is None or free_bytes is None, "its free memory is unknown", False),
    )
    return next((Exclusion(gpu.index, reason, permanent) for applies, reason, permanent in obstacles if applies), None)


def _memory(gpu: Gpu, machine: Machine) -> tuple[int | None, int | None]:
    """Total and free bytes: of the host where the GPU has no memory of its own."""
    if not gpu.has_unified_memory:
        return gpu.memory_total_bytes, gpu.memory_free_bytes
    host = machine.host
    return (host.memory_total_bytes, host.memory_available_bytes) if host else (None, None)


def _budget(gpu: Gpu, machine: Machine, policy: Policy) -> Budget:
    total_bytes, free_bytes = _memory(gpu, machine)
    assert total_bytes is not None
    assert free_bytes is not None
    free_bytes = min(free_bytes, total_bytes)
    reserved_bytes = 0 if gpu.has_unified_memory else gpu.memory_reserved_bytes or 0
    driver_bytes = min(reserved_bytes, total_bytes - free_bytes)
    overhead = _overhead(gpu, machine, policy)
    return Budget(
        gpu=gpu,
        total_bytes=total_bytes,
        driver_bytes=driver_bytes,
        others_bytes=total_bytes - driver_bytes - free_bytes,
        context_bytes=overhead.context_bytes,
        workspace_bytes=overhead.workspace_bytes,
        headroom_fraction=policy.headroom_fraction,
        headroom_min_bytes=policy.headroom_min_bytes,
        total_source="host memory (the GPU has none of its own)" if gpu.has_unified_memory else "NVML",
        context_source=overhead.context_source,
        workspace_source=overhead.workspace_source,
        cap_bytes=dict(policy.max_memory).get(gpu.index),
        fault=fault_of_gpu(gpu),
    )


def _overhead(gpu: Gpu, machine: Machine, policy: Policy) -> Overhead:
    """What torch takes of a GPU beside tensors: as the policy says, else as was measured here, else by its generation."""
    overhead = overhead_of(gpu.compute_capability)
    known = calibration_of((*policy.calibrations, *machine.calibrations), gpu.name, machine.driver.kernel_module_version)
    if known is not None:
        source = f"calibrated on this machine, {known.date}"
        overhead = Overhead(known.context_bytes, known.workspace_bytes, source, source)
    if policy.context_bytes is not None:
        overhead = msgspec.structs.replace(overhead, context_bytes=policy.context_bytes, context_source="policy")
    return overhead
