"""1xx, first part: is there a GPU, and is its driver loaded?"""

from __future__ import annotations

import re

from ..findings import Finding, Fix, Severity
from ..machine import PciDevice
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import is_debian, is_red_hat, start_anew

_BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.ASCII)
_NVML_MISMATCH = 18
"""NVML_ERROR_LIB_RM_VERSION_MISMATCH."""


def no_gpu(facts: Facts) -> Result:
    """No NVIDIA GPU was found on this computer.

    ## What it checks
    Whether the PCI bus, the driver or the device files show any NVIDIA GPU.

    ## Why it matters
    Everything about GPUs is skipped without one. Planning for other machines (`--machine 2xL4`) still works.

    ## Example
    `info VLM101 No NVIDIA GPU: the PCI bus shows none, and no driver is loaded.`

    ## What to do
    On a laptop or a CI runner without GPU: nothing. In a virtual machine, ask whether a GPU was attached to it.
    By hand: `lspci -d 10de:`.

    ## When it is fine
    Always, unless you know that there is a GPU. It is never an error.

    ## Sources
    `/sys/bus/pci/devices` (vendor 10de, class 03), `/proc/driver/nvidia`, NVML.
    """
    if facts.has_hardware:
        return ()
    host = facts.machine.host
    where = " (in WSL2 the GPU comes from the driver of Windows)" if host is not None and host.is_wsl else ""
    return (
        found(
            "info",
            f"No NVIDIA GPU: the PCI bus shows none, and no driver is loaded{where}.",
            evidence=facts.evidence("driver.kernel_module_version", "driver.nvml_state"),
        ),
    )


def driver_not_loaded(facts: Facts) -> Result:
    """A GPU is on the PCI bus, but no driver is loaded.

    ## What it checks
    NVIDIA devices on the PCI bus while the kernel module `nvidia` is not loaded and no other driver owns them.

    ## Why it matters
    Without the kernel module nothing can use the GPU: nvidia-smi fails with exit status 9, torch sees no GPU.

    ## Example
    `error VLM102 2 NVIDIA GPUs are on the PCI bus (0000:01:00.0, 0000:02:00.0), but the NVIDIA driver is not loaded.`

    ## What to do
    Load it with `sudo modprobe nvidia`. Where the module does not exist, install the driver. Where it is refused,
    look at Secure Boot (`mokutil --sb-state`: the module must be signed) and at the kernel headers (a kernel update
    without them leaves DKMS unable to build it).

    ## When it is fine
    On a host whose GPUs are handed to virtual machines, where no driver is wanted.

    ## Sources
    `/sys/bus/pci/devices`, `/proc/driver/nvidia/version`, `/sys/module/nvidia`; NVML error 9 (driver not loaded).
    """
    machine = facts.machine
    if machine.gpus or not machine.pci_devices or machine.driver.kernel_module_version is not None:
        return ()
    count = len(machine.pci_devices)
    subject = "1 NVIDIA GPU is" if count == 1 else f"{count} NVIDIA GPUs are"
    return (
        found(
            "error",
            f"{subject} on the PCI bus ({addresses(machine.pci_devices)}), but the NVIDIA driver is not loaded.",
            cause="The kernel module is not installed, was not built for this kernel, or was refused (Secure Boot).",
            evidence=facts.evidence(
                "pci_devices[0].bus_id", "pci_devices[0].kernel_driver", "driver.kernel_module_version"
            ),
            fix=Fix(
                text="Load the driver; if modprobe finds no such module, install the driver and reboot.",
                commands=("sudo modprobe nvidia", "nvidia-smi"),
                who="administrator",
            ),
        ),
    )


def other_kernel_driver(facts: Facts) -> Result:
    """A kernel driver other than NVIDIA's owns the GPU.

    ## What it checks
    The kernel driver bound to each NVIDIA device on the PCI bus.

    ## Why it matters
    nouveau (the free driver, often loaded by default) and vfio-pci (for virtual machines) keep NVIDIA's driver away
    from the GPU: CUDA cannot use it.

    ## Example
    `error VLM103 0000:01:00.0 belongs to the kernel driver nouveau, not to nvidia.`

    ## What to do
    nouveau: block it, rebuild the initial file system, reboot. vfio-pci: take the device out of the pass-through
    configuration, unless a virtual machine is meant to have it.

    ## When it is fine
    A GPU set aside for a virtual machine: it is only mentioned (info) while other GPUs work.

    ## Sources
    The `driver` link of each device under `/sys/bus/pci/devices`; DCGM's check for denied drivers.
    """
    machine = facts.machine
    taken = [device for device in machine.pci_devices if device.kernel_driver not in (None, "nvidia")]
    return tuple(_taken(facts, device) for device in taken)


def _taken(facts: Facts, device: PciDevice) -> Finding:
    owner = plain(device.kernel_driver or "")
    position = facts.machine.pci_devices.index(device)
    is_aside = owner == "vfio-pci"
    if is_aside:
        text, commands = "Give it back to the nvidia driver, unless a virtual machine is to have it.", _rebind(device)
    else:
        text, commands = _block(facts, owner)
    severity: Severity = "info" if is_aside else "warning"
    return found(
        severity if facts.working else "error",
        f"{plain(device.bus_id)} belongs to the kernel driver {owner}, not to nvidia.",
        cause="It was set aside for a virtual machine." if is_aside else f"{owner} was loaded first.",
        evidence=facts.evidence(f"pci_devices[{position}].kernel_driver"),
        fix=Fix(text=text, commands=commands, who="administrator"),
    )


def _block(facts: Facts, owner: str) -> tuple[str, tuple[str, ...]]:
    """Text and commands that keep a kernel driver from being loaded; no commands for a name that is not one."""
    if not re.fullmatch(r"[a-z0-9_-]{1,40}", owner, re.ASCII):
        return f"Keep {owner} from being loaded, and reboot.", ()
    lines = f"blacklist {owner}\\n" + ("options nouveau modeset=0\\n" if owner == "nouveau" else "")
    rebuild = "sudo dracut --force" if is_red_hat(facts) else "sudo update-initramfs -u"
    hint = "" if is_red_hat(facts) or is_debian(facts) else " (Fedora, RHEL: dracut --force)"
    return f"Block {owner}, rebuild the initial file system{hint} and reboot.", (
        f"printf '{lines}' | sudo tee /etc/modprobe.d/blacklist-{owner}.conf",
        rebuild,
        "sudo reboot",
    )


def _rebind(device: PciDevice) -> tuple[str, ...]:
    """Commands that move a device to the nvidia driver; none for an address that is not one."""
    bus_id = device.bus_id
    if not _BUS_ID.fullmatch(bus_id):
        return ()
    return (
        f"echo {bus_id} | sudo tee /sys/bus/pci/drivers/vfio-pci/unbind",
        f"echo nvidia | sudo tee /sys/bus/pci/devices/{bus_id}/driver_override",
        f"echo {bus_id} | sudo tee /sys/bus/pci/drivers_probe",
    )


def driver_mismatch(facts: Facts) -> Result:
    """The driver's library and its kernel module have different versions.

    ## What it checks
    NVML's answer 18, "Driver/library version mismatch".

    ## Why it matters
    After a driver update the old kernel module stays loaded until it is reloaded; until then every new process that
    wants the GPU fails, while processes that already ran go on.

    ## Example
    `error VLM104 NVML refuses to work: the loaded kernel module is 570.86.15, the installed library is of another version.`

    ## What to do
    Reboot (or stop all GPU processes and reload the modules). In a container: stop it and create it anew, since it
    holds the library of the host as it was at its start.

    ## When it is fine
    Never.

    ## Sources
    NVML error 18; `/proc/driver/nvidia/version`.
    """
    driver = facts.machine.driver
    if driver.nvml_state not in ("ok", "error"):
        return skipped("NVML did not answer")
    if driver.nvml_error_code != _NVML_MISMATCH:
        return ()
    in_container = facts.container is not None
    return (
        found(
            "error",
            f"NVML refuses to work: the loaded kernel module is {plain(driver.kernel_module_version or 'unknown')}, "
            "the installed library is of another version.",
            cause="The driver was updated, and the old kernel module is still loaded.",
            evidence=facts.evidence("driver.kernel_module_version", "driver.nvml_error_code", "driver.nvml_message"),
            fix=start_anew(facts, "Create the container anew; if that does not help, have the host rebooted.")
            if in_container
            else Fix(
                text="Reboot, so that the new kernel module is loaded.", commands=("sudo reboot",), who="administrator"
            ),
        ),
    )


def addresses(devices: tuple[PciDevice, ...]) -> str:
    """PCI addresses for a message."""
    return plain(", ".join(device.bus_id for device in devices))


CHECKS = (
    Check(code="VLM101", title="no NVIDIA GPU", run=no_gpu, needs=("pci_devices",)),
    Check(
        code="VLM102",
        title="driver not loaded",
        run=driver_not_loaded,
        needs=("pci_devices",),
        explained_by=("VLM103",),
    ),
    Check(code="VLM103", title="GPU owned by another kernel driver", run=other_kernel_driver, needs=("pci_devices",)),
    Check(code="VLM104", title="driver and library versions differ", run=driver_mismatch),
)
