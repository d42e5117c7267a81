"""1xx, third part: does the driver's library fit the kernel module, and what does the kernel log say?"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence

from ..data.xids import MINOR_XIDS, XID_ADVICE, XIDS
from ..findings import Finding, Fix
from ..machine import Driver, Gpu, KernelEvent, PciDevice
from ..units import format_age
from ._check import Check, Facts, Result, found, ids, names, plain, skipped, unknown
from ._remedy import branch, is_debian, is_red_hat, without_folders
from .driver import addresses

_LIBRARY_VERSION = re.compile(r"libcuda\.so\.([0-9]{3,4}\.[0-9.]+)$")
_WSL_FOLDER = "/usr/lib/wsl/"
_CONSUMER = ("GeForce", "TITAN")
"""Cards for which NVIDIA does not support forward compatibility. Source: NVIDIA, CUDA Compatibility."""
_FIRST_BLACKWELL = 0x2900
"""PCI device numbers from here on are Blackwell and newer (GB100 is 0x2901, GB202 0x2b85), which only the open kernel
modules drive. Source: open-gpu-kernel-modules, README, "Compatible GPUs"."""
_FAULTS = ("xid", "init_failed", "gsp_failed")
_RECENT_S = 86_400
_MOST_EVENTS = 20
_DMESG = "sudo dmesg | grep -iE 'nvrm|xid'"


def wrong_libcuda(facts: Facts) -> Result:
    """The libcuda that programs load does not belong to this driver.

    ## What it checks
    What the loader finds for `libcuda.so.1`: a stub of the toolkit, the forward-compatibility library, a Linux driver
    inside WSL2, or a version other than that of the kernel module.

    ## Why it matters
    CUDA then fails to start with error 34 (stub), 803 (versions differ) or 804 (forward compatibility on a card that does
    not support it), and torch sees no GPU, while nvidia-smi looks fine.

    ## Example
    `error VLM112 Programs load a stub instead of the driver: /usr/local/cuda/lib64/stubs/libcuda.so.1.`

    ## What to do
    Take the folder out of `LD_LIBRARY_PATH`. In WSL2 remove the Linux driver; in a container remove the driver packages
    that the image brings. By hand: `ldconfig -p | grep libcuda`.

    ## When it is fine
    Forward compatibility on a data center card. It is not reported there, nor where torch can use CUDA all the same.

    ## Sources
    dlopen("libcuda.so.1") in a child process; CUDA runtime API, cudaError_t; NVIDIA, CUDA Compatibility; microsoft/WSL
    issue 8102; nvidia-docker issue 1294.
    """
    driver, torch = facts.machine.driver, facts.machine.torch
    if driver.libcuda_path is None:
        return skipped("libcuda is not found")
    if torch.is_available:
        return ()
    trouble = _trouble_of_library(facts, driver.libcuda_path)
    if trouble is None:
        return ()
    message, cause, fix = trouble
    return (
        found(
            "error",
            message,
            cause=cause,
            evidence=facts.evidence("driver.libcuda_path", "driver.kernel_module_version", "environment.LD_LIBRARY_PATH"),
            fix=fix,
        ),
    )


def _trouble_of_library(facts: Facts, path: str) -> tuple[str, str, Fix] | None:
    shown, module = plain(path), facts.machine.driver.kernel_module_version
    version = _LIBRARY_VERSION.search(path)
    is_wsl = facts.machine.host is not None and facts.machine.host.is_wsl
    if "/stubs/" in path:
        cause = "The toolkit's folder for linking stands in LD_LIBRARY_PATH."
        fix = Fix(text="Take the stubs out of LD_LIBRARY_PATH.", commands=(without_folders(facts, ("/stubs/",)),))
        return f"Programs load a stub instead of the driver: {shown}.", cause, fix
    if is_wsl and not path.startswith(_WSL_FOLDER):
        cause = "A Linux driver was installed in WSL2, where the driver of Windows must be used."
        remove = "dnf remove 'nvidia-driver*'" if is_red_hat(facts) else "apt purge 'libnvidia-compute-*' 'nvidia-driver-*'"
        fix = Fix(text="Remove the Linux driver.", commands=(f"sudo {remove}",))
        return f"In WSL2 programs load {shown} instead of {_WSL_FOLDER}lib/libcuda.so.1.", cause, fix
    if "/compat/" in path:
        consumer = [gpu for gpu in facts.visible if any(word in gpu.name for word in _CONSUMER)]
        if not consumer:
            return None
        cause = "The image brings the forward-compatibility library, which works on data center cards only (error 804)."
        where = " from the image" if facts.container is not None else ""
        fix = Fix(
            text=f"Remove the package cuda-compat{where}, or update the driver.",
            commands=("sudo dnf remove 'cuda-compat-*'" if is_red_hat(facts) else "sudo apt purge 'cuda-compat-*'",),
        )
        return f"Programs load {shown}, which {names(consumer)} cannot use.", cause, fix
    if version is None or module is None or version[1] == module:
        return None
    if facts.container is not None:
        cause = "The image brings a driver library of its own (error 803)."
        which = "rpm -qf" if is_red_hat(facts) else "dpkg -S"
        text = "Remove the package that brings it (the command names it) from the image, and start the container anew."
        fix = Fix(text=text, commands=(f"{which} {shlex.quote(path)}",))
    else:
        cause = "The driver was updated without a reboot (error 803)."
        fix = Fix(text="Reboot, so that the new kernel module is loaded.", commands=("sudo reboot",), who="administrator")
    return f"Programs load libcuda {version[1]}, but the kernel module is {plain(module)}.", cause, fix


def open_modules_needed(facts: Facts) -> Result:
    """A GPU needs the open kernel modules, and the closed ones are loaded.

    ## What it checks
    The kernel log's own words, and NVIDIA devices of the Blackwell generation or newer that the driver does not list while
    the closed kernel modules are loaded.

    ## Why it matters
    nvidia-smi says "No devices were found", although lspci shows the card.

    ## Example
    `error VLM113 The GPU at 0000:01:00.0 needs the open kernel modules, and the closed ones are loaded.`

    ## What to do
    Install the flavor of the driver that ends in `-open`, and reboot. By hand: `cat /proc/driver/nvidia/version`.

    ## When it is fine
    Never, unless the card is set aside.

    ## Sources
    `/proc/driver/nvidia/version` ("Open Kernel Module"), kernel log; open-gpu-kernel-modules issue 862.
    """
    machine, driver = facts.machine, facts.machine.driver
    if driver.kernel_module_version is None:
        return skipped("the NVIDIA driver is not loaded")
    if driver.is_open_kernel_module is not False:
        return skipped("the open kernel modules are loaded, or it is not known which")
    lost = tuple(d for d in machine.pci_devices if d.bus_id in facts.counts.lost_by_driver and _is_new(d))
    has_said_so = any(event.kind == "needs_open_modules" for event in driver.kernel_events or ())
    if not lost and not has_said_so:
        return ()
    subject = f"The GPU{'s' if len(lost) > 1 else ''} at {addresses(lost)}" if lost else "A GPU"
    verb = "need" if len(lost) > 1 else "needs"
    major = branch(driver.kernel_module_version) if not is_red_hat(facts) else None
    commands = (f"sudo apt install nvidia-driver-{major}-open", "sudo reboot") if major else ("sudo reboot",)
    system = " (the command is for Debian and Ubuntu)" if major and not is_debian(facts) else ""
    return (
        found(
            "error",
            f"{subject} {verb} the open kernel modules, and the closed ones are loaded.",
            cause="Blackwell and newer GPUs are supported by the open kernel modules only.",
            evidence=facts.evidence("driver.is_open_kernel_module", "driver.kernel_module_version"),
            fix=Fix(
                text=f"Install the open flavor of the driver and reboot{system}.",
                commands=commands,
                who="administrator",
            ),
        ),
    )


def _is_new(device: PciDevice) -> bool:
    is_number = re.fullmatch(r"[0-9a-f]{4}", device.device_id, re.ASCII) is not None
    return is_number and int(device.device_id, 16) >= _FIRST_BLACKWELL


def faults_in_kernel_log(facts: Facts) -> Result:
    """The driver reported faults in the kernel log.

    ## What it checks
    `NVRM: Xid` messages since boot, failures to start a GPU or its firmware, by GPU and number.

    ## Why it matters
    What a program sees is "CUDA error: unknown error" or a hang; the Xid says whether the program, the card, the link or
    the driver is at fault.

    ## Example
    `warning VLM114 The kernel log has Xid 79 of GPU 1 (2 times, 5 min ago): the GPU has fallen off the bus.`

    ## What to do
    By number: 13, 31, 43 and 45 are about a program; 48, 63, 94 and 95 about memory: reset the GPU when it is idle; 64:
    replace the card; 74: NVLink; 79: power the machine off and on; 119 and 120: firmware, try another driver branch.

    ## When it is fine
    Faults of a program, and faults older than a day, are only mentioned: a later reset may have dealt with them.

    ## Sources
    `/dev/kmsg`; NVIDIA, Xid Errors. Where the kernel log may not be read, which is usual in containers, the check is
    unknown.
    """
    events = facts.machine.driver.kernel_events
    if not facts.has_hardware:
        return skipped("no GPU")
    if events is None:
        gap = facts.machine.gap("driver.kernel_events")
        return unknown(f"the kernel log could not be read{f' ({plain(gap.reason)})' if gap else ''}")
    told = [event for event in events if event.kind in _FAULTS]
    return tuple(_fault(facts, event) for event in told[:_MOST_EVENTS])


def said_by_kernel(
    facts: Facts, bus_ids: Collection[str | None], xids: Collection[int] | None = None
) -> tuple[str, dict[str, str]] | None:
    """What the kernel log has of these devices: the newest fault that is not a program's as a sentence, and all as
    evidence.

    Args:
        facts: What is known.
        bus_ids: PCI addresses of the devices.
        xids: Only faults of these numbers.

    Returns:
        ``None`` when it has none. :data:`~vlm_doctor.checks._check.Check.told_by` makes VLM114 silent about them.
    """
    told = [
        (at, event)
        for at, event in enumerate(facts.machine.driver.kernel_events or ())
        if event.kind in _FAULTS and event.bus_id is not None and event.bus_id in bus_ids
        if xids is None or event.code in xids
    ]
    if not told:
        return None
    newest = next((event for _, event in told if event.code not in MINOR_XIDS), told[0][1])
    what, meaning = _meaning(newest)
    evidence = facts.evidence(*(_path(at, name) for at, _ in told[:_MOST_EVENTS] for name in ("kind", "code", "count")))
    whose = "it" if len(bus_ids) == 1 else _whose(facts, newest)
    return f"The kernel log has {what} of {whose} ({_times(newest)}): {meaning}.", evidence


def _whose(facts: Facts, event: KernelEvent) -> str:
    """``GPU 0``, or the address where the driver lists no GPU there."""
    gpus = [gpu for gpu in facts.machine.gpus if gpu.bus_id == event.bus_id]
    return names(gpus) if gpus else plain(event.bus_id or "a GPU")


def _meaning(event: KernelEvent) -> tuple[str, str]:
    if event.kind == "xid":
        return f"Xid {event.code}", XIDS.get(event.code or 0, "NVIDIA's list of Xid errors tells what it means")
    what = "a failed start" if event.kind == "init_failed" else "a failed start of the firmware"
    return what, "the driver could not start the GPU"


def _fault(facts: Facts, event: KernelEvent) -> Finding:
    gpus = [gpu for gpu in facts.machine.gpus if event.bus_id is not None and gpu.bus_id == event.bus_id]
    whose = f" of {names(gpus)}" if gpus else f" of {plain(event.bus_id)}" if event.bus_id else ""
    what, meaning = _meaning(event)
    is_minor = event.kind == "xid" and event.code in MINOR_XIDS
    is_old = event.last_s_ago is None or event.last_s_ago > _RECENT_S
    position = _position(facts.machine.driver, event)
    fields = ("kind", "code", "bus_id", "count", "last_s_ago")
    return found(
        "info" if is_minor or is_old else "warning",
        f"The kernel log has {what}{whose} ({_times(event)}): {meaning}.",
        evidence=facts.evidence(*(_path(position, name) for name in fields)),
        fix=_remedy(event, gpus),
        gpus=gpus,
    )


def _remedy(event: KernelEvent, gpus: Sequence[Gpu]) -> Fix:
    """What NVIDIA recommends for the number; else the messages around it say more."""
    advice = XID_ADVICE.get(event.code or 0) if event.kind == "xid" else None
    if advice is None:
        return Fix(text="Read the messages around it.", commands=(_DMESG,), who="administrator")
    text, command = advice
    one = ids(gpus) if gpus else None
    commands = (command.format(gpu=one),) if one is not None or "{gpu}" not in command else ()
    return Fix(text=text, commands=(_DMESG, *commands), who="administrator")


def _position(driver: Driver, event: KernelEvent) -> int:
    events: Sequence[KernelEvent] = driver.kernel_events or ()
    return events.index(event)


def _path(position: int, name: str) -> str:
    return f"driver.kernel_events[{position}].{name}"


def _times(event: KernelEvent) -> str:
    """``9 times, 2 h ago``."""
    age = f", {format_age(event.last_s_ago)} ago" if event.last_s_ago is not None else ""
    return f"{event.count} time{'s' if event.count != 1 else ''}{age}"


CHECKS = (
    Check(code="VLM112", title="libcuda of another driver", run=wrong_libcuda, explained_by=("VLM104", "VLM102", "VLM205")),
    Check(code="VLM113", title="open kernel modules needed", run=open_modules_needed, needs=("pci_devices",)),
    Check(
        code="VLM114",
        title="faults in the kernel log",
        run=faults_in_kernel_log,
        explained_by=("VLM113",),
        told_by=("VLM107", "VLM108", "VLM111", "VLM402", "VLM409"),
    ),
)
