"""A model that is too large for the GPUs, with its last layers in host memory.

A GPU that others use is never made up for by host memory: that is a matter of waiting, and of an error.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from msgspec.structs import replace

from vlm_doctor.units import format_gib

if TYPE_CHECKING:
    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.placement import Plan


class Ask(Protocol):
    """Plans one model on a machine."""

    def __call__(self, machine: Machine, *, offload: bool) -> Plan:
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
    if not plan.fits or plan.offloaded is None:
        return found
    without_others = given_back(machine)
    ideal = ask(without_others, offload=True) if without_others is not machine else plan
    least_bytes = ideal.offloaded.weights_bytes if ideal.offloaded is not None else 0
    if not ideal.fits or plan.offloaded.weights_bytes <= least_bytes or found.shortage is None:
        return plan
    message = (
        f"{plan.model} would leave {format_gib(plan.offloaded.weights_bytes)} in host memory, and only "
        f"{format_gib(least_bytes)} if others held nothing."
    )
    return replace(found, shortage=replace(found.shortage, message=message, is_permanent=False))


def given_back(machine: Machine) -> Machine:
    """The machine with the memory that other processes hold on its GPUs; itself, if none does."""
    gpus = tuple(map(_without_others, machine.gpus))
    return machine if gpus == machine.gpus else replace(machine, gpus=gpus)


def _without_others(gpu: Gpu) -> Gpu:
    others = sum(process.used_bytes or 0 for process in gpu.processes if process.pid != os.getpid())
    if not others or gpu.memory_free_bytes is None:
        return gpu
    return replace(gpu, memory_free_bytes=gpu.memory_free_bytes + others, processes=())
