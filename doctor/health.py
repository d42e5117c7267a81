"""What is wrong with a GPU or a link, from the facts alone: the checks report it, and the planner keeps away from it."""

from __future__ import annotations

from .machine import Gpu, Machine

_RECOVERY = {
    "reset_gpu": "a reset of the GPU",
    "reboot_node": "a reboot",
    "drain_p2p": "an end of peer traffic",
    "drain_and_reset": "a reset of the GPU when it is idle",
}
_FABRIC_MASK = {
    0: "bandwidth is degraded",
    2: "a route is being recovered",
    4: "a route is unhealthy",
    6: "it recovers from an access timeout",
}
"""Bit position of a two-bit field in the fabric's health mask to what it means when the field is 1 (true); 2 is false, 0
not supported. Source: NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_* of nvidia-ml-py 13.615."""
_DEGRADED = 0
"""The field that means slow, not broken."""


def faults_of_memory(gpu: Gpu) -> list[str]:
    """Faults that the GPU or its driver reports, one phrase each; worst first."""
    faults = []
    if gpu.remap_failed:
        faults.append("row remapping has failed")
    if gpu.recovery_action is not None and gpu.recovery_action != "none":
        faults.append(f"the driver asks for {_RECOVERY[gpu.recovery_action]}")
    if gpu.remap_pending:
        faults.append("row remapping is pending")
    if gpu.ecc_uncorrected:
        faults.append(f"{gpu.ecc_uncorrected} uncorrectable ECC error{'s' if gpu.ecc_uncorrected != 1 else ''}")
    return faults


def failure_of_fabric(gpu: Gpu) -> str | None:
    """Why the NVSwitch fabric of the GPU cannot be used, as the end of a sentence about it; ``None`` when it can."""
    fabric = gpu.fabric
    if fabric is None or fabric.state in ("not_supported", "unknown"):
        return None
    if fabric.state != "completed":
        return f"is not up: {fabric.state.replace('_', ' ')}"
    return f"failed with NVML error {fabric.status}" if fabric.status else None


def ills_of_fabric(gpu: Gpu) -> list[str]:
    """What ails an NVSwitch fabric that is up, one phrase each."""
    return [text for _, text in _ills(gpu)]


def _ills(gpu: Gpu) -> list[tuple[int, str]]:
    mask = gpu.fabric.health_mask if gpu.fabric is not None else None
    return [(shift, text) for shift, text in _FABRIC_MASK.items() if mask >> shift & 3 == 1] if mask else []


def fault_of_gpu(gpu: Gpu) -> str | None:
    """Why a GPU should not be used where others suffice, as one phrase; ``None`` when nothing speaks against it."""
    faults = faults_of_memory(gpu)
    failure = failure_of_fabric(gpu)
    if failure is not None:
        faults.append(f"its NVSwitch fabric {failure}")
    return ", ".join(faults) or None


def fault_of_link(machine: Machine, a: int, b: int) -> str | None:
    """Why data must not go from one GPU straight to another, as one phrase; ``None`` when nothing is known against it.

    A pair without peer access is not faulty: its copies go through the host.

    Args:
        machine: The machine.
        a: GPU index.
        b: Another GPU index.
    """
    link = machine.link(a, b)
    for gpu in filter(None, map(machine.gpu, sorted((a, b)))):
        if gpu.recovery_action in ("drain_p2p", "drain_and_reset"):
            return f"the driver asks for an end of peer traffic of GPU {gpu.index}"
        # What the fabric says of a GPU matters to pairs that NVLink joins: others do not go through it.
        broken = [text for shift, text in _ills(gpu) if shift != _DEGRADED]
        if broken and link is not None and link.nvlinks:
            return f"in the NVSwitch fabric of GPU {gpu.index} {broken[0]}"
    return None
