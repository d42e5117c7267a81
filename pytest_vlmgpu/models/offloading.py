"""A model that is too large for the GPUs, with its last layers in host memory.

A GPU that others use is never made up for by host memory: that is a matter of waiting, and of an error.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from vlm_doctor.units import format_gib

from .residents import CONTEXT_BYTES

if TYPE_CHECKING:
    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan


class Ask(Protocol):
    """Plans one model on a machine."""

    def __call__(self, machine: Machine, /, *, offload: bool) -> Plan:
        """With or without layers in host memory."""


def with_host_memory(found: Plan, machine: Machine, ask: Ask) -> Plan:
    """The plan that leaves layers in host memory, where there is one.

    Args:
        found: Without any; it does not fit, even on empty GPUs.
        machine: It was made for.
        ask: For the same model, workload and policy.

    Returns:
        The plan as it is now; or ``found``, where host memory does not help either, and with a shortage that passes where
        the memory that others hold on the GPUs would keep more of the model off them.
    """
    plan = ask(machine, offload=True)
    empty = emptied(machine)
    ideal = ask(empty, offload=True) if empty is not machine else plan
    if not ideal.fits or found.shortage is None:
        return found
    least_bytes = ideal.offloaded.weights_bytes if ideal.offloaded is not None else 0
    left_bytes = plan.offloaded.weights_bytes if plan.offloaded is not None else 0
    if plan.fits and left_bytes <= least_bytes:
        return plan
    now = f"would leave {format_gib(left_bytes)} in host memory" if plan.fits else "does not fit even with host memory"
    ideally = f"{format_gib(least_bytes)} would have to stay there if others held nothing of the GPUs"
    message = f"{plan.model} {now}, and only {ideally}."
    return replace(found, shortage=replace(found.shortage, message=message, is_permanent=False))


def emptied(machine: Machine) -> Machine:
    """The machine with no process on its GPUs but this one; itself, where there is none."""
    gpus = tuple(map(_without_others, machine.gpus))
    return machine if gpus == machine.gpus else replace(machine, gpus=gpus)


def _without_others(gpu: Gpu) -> Gpu:
    """Holders are not always visible (containers), so what is free is held against what there is."""
    total, free = gpu.memory_total_bytes, gpu.memory_free_bytes
    if total is None or free is None or gpu.has_unified_memory:
        return gpu
    own = sum(process.used_bytes or 0 for process in gpu.processes if process.pid == os.getpid())
    most = total - (gpu.memory_reserved_bytes or 0) - own
    return replace(gpu, memory_free_bytes=most, processes=()) if most - free > CONTEXT_BYTES else gpu
