"""1xx, first half: is there a GPU, and does its driver answer?"""

from __future__ import annotations

import re

from ..findings import Finding, Fix, Severity
from ..machine import PciDevice
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import WITH_NVML, branch, is_debian, is_red_hat, pip, start_anew

_BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.ASCII)
_NVML_MISMATCH = 18
"""NVML_ERROR_LIB_RM_VERSION_MISMATCH."""
_NVML_CAUSES = {
    4: "This user may not use the driver.",
    9: "NVML does not reach the kernel driver.",
    15: "A GPU has fallen off the bus.",
    17: "The operating system refused NVML access to the device files.",
    999: "Inside a container this is what happens when the host reloads its service manager: the GPUs are taken away.",
}
"""nvmlReturn_t of nvmlInit. 999 in containers: NVIDIA/nvidia-container-toolkit issue 48."""


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


def nvml_unusable(facts: Facts) -> Result:
    """NVML, the library that answers for the driver, cannot be used.

    ## What it checks
    Whether nvidia-ml-py can be imported, libnvidia-ml.so.1 loads, and NVML answers in time without an error or a crash.

    ## Why it matters
    NVML is where names, memory, processes and links come from. Without it the doctor is blind, and so is nvidia-smi.

    ## Example
    `error VLM105 NVML crashed (SIGSEGV).`

    ## What to do
    By state: `no_binding`: reinstall nvidia-ml-py. `no_library`: install the driver's user-space libraries. `error`:
    see the message; in a container, start it anew. `crashed`, `timed_out`: look for `NVRM` and `Xid` in the kernel
    log, then reboot.

    ## When it is fine
    Where torch can use the GPUs all the same, or NVML failed only half-way, it is a warning.

    ## Sources
    nvmlInit and its `nvmlReturn_t`, asked in a child process with a deadline.
    """
    driver = facts.machine.driver
    if not facts.has_hardware or driver.nvml_state == "ok":
        return ()
    said = f": {plain(driver.nvml_message)}" if driver.nvml_message else ""
    message = {
        "no_binding": f"The Python binding of NVML (nvidia-ml-py) cannot be used{said}.",
        "no_library": f"libnvidia-ml.so.1 cannot be loaded{said}.",
        "error": f"NVML answers with error {driver.nvml_error_code}{said}.",
        "crashed": f"NVML crashed{said}.",
        "timed_out": f"NVML did not answer in time{said}.",
    }[driver.nvml_state]
    return (
        found(
            "warning" if facts.machine.torch.is_available or facts.machine.gpus else "error",
            message,
            cause=_NVML_CAUSES.get(driver.nvml_error_code or 0),
            evidence=facts.evidence("driver.nvml_state", "driver.nvml_error_code", "driver.kernel_module_version"),
            fix=_nvml_fix(facts),
        ),
    )


def _nvml_fix(facts: Facts) -> Fix:
    driver = facts.machine.driver
    if driver.nvml_state == "no_binding":
        return Fix(text="Reinstall nvidia-ml-py.", commands=(pip(facts, "install", "--force-reinstall", "nvidia-ml-py"),))
    if driver.nvml_state == "no_library":
        if facts.container is not None:
            return start_anew(facts, "Start the container anew with the driver's libraries.", *WITH_NVML)
        major, look = branch(driver.kernel_module_version), "ldconfig -p | grep libnvidia-ml"
        command = f"sudo apt install libnvidia-compute-{major}" if major and not is_red_hat(facts) else look
        system = "" if is_debian(facts) or command == look else " (the command is for Debian and Ubuntu)"
        text = f"Install the driver's libraries in the version of the kernel module{system}."
        return Fix(text=text, commands=(command,), who="administrator")
    if driver.nvml_state == "error" and facts.container is not None:
        return _restart(facts)
    return Fix(
        text="Look for the driver's messages in the kernel log, then reboot.",
        commands=("sudo dmesg | grep -iE 'nvrm|xid'", "sudo reboot"),
        who="administrator",
    )


def _restart(facts: Facts) -> Fix:
    """Restart the container: what the host took away comes back with it."""
    text = "Restart the container ({} stands for its name); if that does not help, look at nvidia-smi on the host."
    if facts.container == "kubernetes":
        return Fix(text=text.format("POD"), commands=("kubectl delete pod POD", "nvidia-smi"), place="host")
    runner = "podman" if facts.container == "podman" else "docker"
    return Fix(text=text.format("NAME"), commands=(f"{runner} restart NAME", "nvidia-smi"), place="host")


def device_files(facts: Facts) -> Result:
    """The driver's device files are missing, or this user may not open them.

    ## What it checks
    `/dev/nvidiactl`, `/dev/nvidia0` and so on, and `/dev/nvidia-uvm`: present, and open for reading and writing.

    ## Why it matters
    CUDA and NVML reach the driver through these files alone.

    ## Example
    `error VLM106 This user may not open /dev/nvidia0, /dev/nvidiactl.`

    ## What to do
    Missing: `sudo nvidia-modprobe -u -c=0` creates them. Forbidden: join the group that owns them, and log in again.
    In a container: start it with GPU access rather than with single device files.

    ## When it is fine
    A job scheduler forbids the files of GPUs that were not given to the job, and outside containers CUDA creates
    `/dev/nvidia-uvm` when it first needs it: neither is reported.

    ## Sources
    `/dev`, access(2); NVML errors 4 (no permission) and 17 (operating system).
    """
    machine, driver = facts.machine, facts.machine.driver
    if driver.kernel_module_version is None:
        return skipped("the NVIDIA driver is not loaded")
    is_refused = machine.torch.cuda is not None and machine.torch.is_available is False and bool(facts.visible)
    if machine.gpus and not is_refused:
        return ()
    needed = ["/dev/nvidiactl", *(["/dev/nvidia-uvm"] if is_refused or facts.container is not None else [])]
    missing = [name for name in needed if name not in driver.device_files]
    pattern = r"/dev/nvidia(ctl|-uvm)" if machine.gpus else r"/dev/nvidia(ctl|-uvm|[0-9]+)"
    forbidden = [name for name in driver.forbidden_device_files if re.fullmatch(pattern, name, re.ASCII)]
    if forbidden:
        fix = (
            start_anew(facts, "Start the container anew with GPU access, not with single device files.")
            if facts.container is not None
            else Fix(
                text="Put the user into the group that owns the device files, and log in again (USER and GROUP stand for "
                "what the first command shows).",
                commands=("id -un; ls -l /dev/nvidia*", "sudo usermod -aG GROUP USER"),
                who="administrator",
            )
        )
        message = f"This user may not open {plain(', '.join(forbidden))}."
    elif missing:
        fix = Fix(text="Create the device files.", commands=("sudo nvidia-modprobe -u -c=0",), who="administrator")
        message = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, though the driver is loaded."
    else:
        return ()
    return (
        found("error", message, evidence=facts.evidence("driver.device_files", "driver.forbidden_device_files"), fix=fix),
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
    Check(
        code="VLM105",
        title="NVML cannot be used",
        run=nvml_unusable,
        explained_by=("VLM102", "VLM103", "VLM104", "VLM106", "VLM205", "VLM310"),
    ),
    Check(
        code="VLM106",
        title="device files missing or forbidden",
        run=device_files,
        explained_by=("VLM104", "VLM205"),
    ),
)
