"""1xx, second half: is each GPU there, does it work, and in a mode that lets a model use it?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..data.xids import MEMORY_XIDS
from ..findings import Finding, Fix
from ..health import faults_of_memory
from ..machine import Gpu
from ..units import format_gib
from ._check import Check, Facts, Result, alike, found, ids, label, labels, names, plain, skipped, unknown
from .driver import addresses
from .kernel import said_by_kernel


def gpus_lost(facts: Facts) -> Result:
    """A GPU is on the PCI bus, but the driver does not list it.

    ## What it checks
    PCI addresses of the NVIDIA devices against those of the GPUs that NVML lists: the first step of the count
    PCI, driver, visible, torch.

    ## Why it matters
    A GPU that fell off the bus (Xid 79) or failed to start disappears quietly: programs go on with fewer GPUs, and the
    numbers of the rest may shift.

    ## Example
    `error VLM107 The PCI bus has 8 NVIDIA GPUs, the driver lists 7: 0000:5d:00.0 is missing.`

    ## What to do
    Look for `NVRM` and `Xid` in the kernel log. Off the bus: power the machine off and on, then reseat the card. Not
    supported: newer drivers drop old GPUs, and the newest GPUs need the open kernel modules.

    ## When it is fine
    In a container or a scheduled job that was given only some of the GPUs: it is skipped there. A card without a driver
    beside working ones (an old display card) is only a warning.

    ## Sources
    `/sys/bus/pci/devices`, nvmlDeviceGetPciInfo.
    """
    machine, counted = facts.machine, facts.counts
    if machine.driver.nvml_state != "ok" or counted.pci is None:
        return skipped("PCI bus and driver cannot be compared")
    lost = [d for d in machine.pci_devices if d.bus_id in counted.lost_by_driver and d.kernel_driver in (None, "nvidia")]
    if not lost:
        return ()
    if facts.container is not None:
        return skipped(f"a container need not be given every GPU: it has {counted.driver} of {counted.pci}")
    refused = [name for name in machine.driver.forbidden_device_files if re.fullmatch(r"/dev/nvidia[0-9]+", name, re.ASCII)]
    if len(refused) >= len(lost):
        return skipped(f"this job was not given {len(refused)} of the GPUs")
    is_bound = any(device.kernel_driver == "nvidia" for device in lost)
    cause, log = said_by_kernel(facts, {device.bus_id for device in lost}) or (_usual_cause(is_bound=is_bound), {})
    position, plural = machine.pci_devices.index(lost[0]), "s" if counted.pci != 1 else ""
    return (
        found(
            "error" if is_bound or not machine.gpus else "warning",
            f"The PCI bus has {counted.pci} NVIDIA GPU{plural}, the driver lists {counted.driver}: "
            f"{addresses(tuple(lost))} {'is' if len(lost) == 1 else 'are'} missing.",
            cause=cause,
            evidence=facts.evidence(f"pci_devices[{position}].bus_id", f"pci_devices[{position}].kernel_driver") | log,
            fix=Fix(
                text="Find out why in the kernel log; a GPU that fell off the bus needs the machine powered off and on.",
                commands=("sudo dmesg | grep -iE 'nvrm|xid'",),
                who="administrator",
            ),
        ),
    )


def _usual_cause(*, is_bound: bool) -> str:
    if is_bound:
        return "It fell off the bus or failed to start."
    return "This driver does not support it, or it failed to start."


def gpu_fails(facts: Facts) -> Result:
    """The driver lists a GPU, but it fails when asked.

    ## What it checks
    Whether each GPU answers NVML, or says that it is lost or needs a reset.

    ## Why it matters
    Such a GPU can stop CUDA from starting on all the others, and accelerate drops it from a `device_map` without a
    word.

    ## Example
    `error VLM108 GPU 3 (NVIDIA H100) fails when asked: GPU is lost.`

    ## What to do
    Hide it (`CUDA_VISIBLE_DEVICES` with the others' UUIDs) to go on. Reset required: `sudo nvidia-smi --gpu-reset -i
    3`. Lost: only powering the machine off and on helps; look for Xid 79 in the kernel log.

    ## When it is fine
    Never.

    ## Sources
    NVML errors 15 (GPU is lost) and 16 (reset required); NVIDIA's Xid catalog.
    """
    if not facts.machine.gpus:
        return skipped("no GPU")
    return tuple(_failing(facts, gpu) for gpu in facts.machine.gpus if gpu.error is not None)


def _failing(facts: Facts, gpu: Gpu) -> Finding:
    text = plain(gpu.error or "")
    if "reset" in text.lower():
        fix = Fix(
            text="Stop what uses the GPU and reset it.",
            commands=(f"sudo nvidia-smi --gpu-reset -i {gpu.index}",),
            who="administrator",
        )
    else:
        fix = Fix(
            text="Look for Xid messages in the kernel log, then power the machine off and on.",
            commands=("sudo dmesg | grep -iE 'nvrm|xid'", "sudo poweroff"),
            who="administrator",
        )
    cause, log = said_by_kernel(facts, _places(facts, gpu)) or ("It fell off the bus, or a fault stopped it.", {})
    return found(
        "error",
        f"{label(gpu)} fails when asked: {text.rstrip('.')}.",
        cause=cause,
        evidence=facts.evidence(facts.path(gpu, "error")) | log,
        fix=fix,
        gpus=(gpu,),
    )


def _places(facts: Facts, gpu: Gpu) -> set[str | None]:
    """PCI address of a GPU; a lost one may not tell it: then every address that no other GPU has."""
    if gpu.bus_id is not None:
        return {gpu.bus_id}
    events = facts.machine.driver.kernel_events or ()
    return {event.bus_id for event in events} - {other.bus_id for other in facts.machine.gpus}


def compute_mode(facts: Facts) -> Result:
    """A GPU lets in only one process, or none.

    ## What it checks
    The compute mode of each visible GPU.

    ## Why it matters
    `exclusive_process`: a second process (another pytest worker, a notebook, a monitor that opens CUDA) gets
    "CUDA-capable device(s) is/are busy or unavailable". `prohibited`: nobody may compute on it.

    ## Example
    `error VLM109 GPU 0 (NVIDIA A100) takes one process only, and process 4711 has it.`

    ## What to do
    `sudo nvidia-smi -i 0 -c DEFAULT`, or run one process per GPU, or share it through MPS.

    ## When it is fine
    On a cluster that gives whole GPUs to single processes: it is a warning as long as nobody else is on the GPU.

    ## Sources
    nvmlDeviceGetComputeMode; pytorch issue 3871.
    """
    restricted = [gpu for gpu in facts.visible if gpu.compute_mode not in (None, "default")]
    return tuple(_restricted(facts, gpus) for gpus in alike(restricted, lambda gpu: (gpu.compute_mode, _holder(gpu))))


def _holder(gpu: Gpu) -> int | None:
    return next((process.pid for process in gpu.processes if process.kind == "compute"), None)


def _restricted(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    mode, holder, is_one = gpus[0].compute_mode, _holder(gpus[0]), len(gpus) == 1
    take, it = ("takes", "it") if is_one else ("take", "them")
    if mode == "prohibited":
        says = f"{take} no process: {'its' if is_one else 'their'} compute mode is prohibited"
    elif holder is not None:
        says = f"{take} one process only, and process {holder} has {it}"
    else:
        says = f"{take} one process only: {'its' if is_one else 'their'} compute mode is {mode}"
    return found(
        "error" if holder is not None or mode == "prohibited" else "warning",
        f"{labels(gpus)} {says}.",
        evidence=facts.evidence(*(facts.path(gpu, "compute_mode") for gpu in gpus)),
        fix=Fix(
            text="Set the compute mode back to default.",
            commands=(f"sudo nvidia-smi -i {ids(gpus)} -c DEFAULT",),
            who="administrator",
        ),
        gpus=gpus,
    )


def mig_mode(facts: Facts) -> Result:
    """A GPU is cut into MIG slices, or a change of that is pending.

    ## What it checks
    MIG mode of each visible GPU, now and after the next reset, and whether slices exist.

    ## Why it matters
    A process sees one slice only, with that slice's memory, and slices have no NVLink and no peer access: a model
    cannot be split over them. With MIG on and no slice, CUDA sees nothing at all.

    ## Example
    `warning VLM110 GPU 0 (NVIDIA A100) is cut into 2 MIG slices: a process can use one of them, 19.5 GiB at most.`

    ## What to do
    For a whole GPU: `sudo nvidia-smi -i 0 -mig 0` while nothing runs on it. To use a slice: name its MIG UUID
    (`nvidia-smi -L`) in CUDA_VISIBLE_DEVICES.

    ## When it is fine
    Where a model is meant to live in one slice: ignore it with `--ignore VLM110`.

    ## Sources
    nvmlDeviceGetMigMode; NVIDIA MIG user guide, device enumeration.
    """
    sliced = [gpu for gpu in facts.visible if gpu.mig_enabled or gpu.mig_pending]
    return tuple(_sliced(facts, gpus) for gpus in alike(sliced, lambda gpu: (gpu.mig_enabled, _slices(gpu))))


def _slices(gpu: Gpu) -> tuple[int, int]:
    """How many, and the bytes of the largest."""
    return len(gpu.mig_devices), max((part.memory_total_bytes or 0 for part in gpu.mig_devices), default=0)


def _sliced(facts: Facts, gpus: Sequence[Gpu]) -> Finding:
    count, largest = _slices(gpus[0])
    is_enabled, is_one = bool(gpus[0].mig_enabled), len(gpus) == 1
    are, it, each = ("is", "it", "") if is_one else ("are", "them", " each")
    if not is_enabled:
        says = f"will be cut into MIG slices at {'its' if is_one else 'their'} next reset"
    elif not count:
        says = f"{are} in MIG mode without any slice, so CUDA cannot use {it}"
    else:
        size = f", {format_gib(largest)} at most" if largest else ""
        says = f"{are} cut into {count} MIG slice{'s' if count != 1 else ''}{each}: a process can use one of them{size}"
    switch_off = Fix(
        text="Switch MIG off while nothing runs on the GPU; a pending change needs a reset.",
        commands=(f"sudo nvidia-smi -i {ids(gpus)} -mig 0",),
        who="administrator",
    )
    return found(
        "error" if is_enabled and not count else "warning",
        f"{labels(gpus)} {says}.",
        evidence=facts.evidence(*(facts.path(gpu, name) for gpu in gpus for name in ("mig_enabled", "mig_pending"))),
        fix=switch_off,
        gpus=gpus,
    )


def memory_faults(facts: Facts) -> Result:
    """A GPU reports faults of its memory, or the driver asks for a reset.

    ## What it checks
    Uncorrectable ECC errors since the driver was loaded, pending and failed row remapping, and the recovery action
    that the driver itself recommends.

    ## Why it matters
    Faulty memory kills processes or, without ECC, changes results. A failed remapping means that the card is worn out.

    ## Example
    `error VLM111 GPU 1 (NVIDIA A100): row remapping has failed, 2 uncorrectable ECC errors.`

    ## What to do
    Pending: reset the GPU when it is idle. Recovery action: do what the driver says. Failed: have the card replaced.

    ## When it is fine
    Old errors that a reset has dealt with vanish from these counters; what is shown is current.

    ## Sources
    nvmlDeviceGetTotalEccErrors (volatile), nvmlDeviceGetRemappedRows, field 230 (recovery action); NVIDIA GPU memory
    error management guide.
    """
    told = ("ecc_uncorrected", "remap_failed", "recovery_action")
    findings = tuple(_faulty(facts, gpu) for gpu in facts.working if faults_of_memory(gpu))
    silent = [gpu for gpu in facts.working if all(getattr(gpu, name) is None for name in told)]
    if not findings and silent:
        return unknown(f"{names(silent)} {'do' if len(silent) > 1 else 'does'} not report memory faults")
    return findings


def _faulty(facts: Facts, gpu: Gpu) -> Finding:
    is_broken = bool(gpu.remap_failed) or gpu.recovery_action not in (None, "none")
    if gpu.remap_failed:
        fix = Fix(
            text="Have the card replaced.", commands=(f"nvidia-smi -q -d ROW_REMAPPER -i {gpu.index}",), who="administrator"
        )
    elif gpu.recovery_action == "reboot_node":
        fix = Fix(text="Reboot.", commands=("sudo reboot",), who="administrator")
    else:
        fix = Fix(
            text="Stop what uses the GPU and reset it.",
            commands=(f"sudo nvidia-smi --gpu-reset -i {gpu.index}",),
            who="administrator",
        )
    fields = ("ecc_uncorrected", "remap_pending", "remap_failed", "recovery_action")
    cause, log = said_by_kernel(facts, {gpu.bus_id}, MEMORY_XIDS) or (None, {})
    return found(
        "error" if is_broken else "warning",
        f"{label(gpu)}: {', '.join(faults_of_memory(gpu))}.",
        cause=cause,
        evidence=facts.evidence(*(facts.path(gpu, name) for name in fields)) | log,
        fix=fix,
        gpus=(gpu,),
    )


CHECKS = (
    Check(
        code="VLM107",
        title="GPU lost between bus and driver",
        run=gpus_lost,
        needs=("pci_devices",),
        explained_by=("VLM102", "VLM103", "VLM104", "VLM105", "VLM106", "VLM113", "VLM205"),
    ),
    Check(code="VLM108", title="GPU fails when asked", run=gpu_fails),
    Check(code="VLM109", title="compute mode restricted", run=compute_mode, needs=("gpus[].compute_mode",)),
    Check(code="VLM110", title="MIG enabled", run=mig_mode, needs=("gpus[].mig_enabled",)),
    Check(code="VLM111", title="GPU memory faults", run=memory_faults, needs=("gpus",)),
)
