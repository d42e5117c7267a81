"""1xx, second part: can this process reach the driver?"""

from __future__ import annotations

import re

from ..findings import Fix
from ._check import Check, Facts, Result, found, plain, skipped
from ._remedy import WITH_NVML, branch, is_debian, is_red_hat, pip, start_anew

_NVML_CAUSES = {
    4: "This user may not use the driver.",
    9: "NVML does not reach the kernel driver.",
    15: "A GPU has fallen off the bus.",
    17: "The operating system refused NVML access to the device files.",
}
"""nvmlReturn_t of nvmlInit."""
_UNKNOWN_ERROR = 999
_TAKEN_AWAY = (
    "The host took the GPUs from this container, as a reload of its service manager (systemctl daemon-reload) does."
)
"""What NVML's error 999 means in a container. Source: NVIDIA/nvidia-container-toolkit issue 48."""


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
    see the message. `crashed`, `timed_out`: look for `NVRM` and `Xid` in the kernel log, then reboot.

    "Unknown Error" (999) in a container that had its GPUs before: `systemctl daemon-reload` on the host takes them away.
    Restart the container. To keep it from happening again, let the host make the links that systemd looks for
    (`sudo nvidia-ctk system create-dev-char-symlinks --create-all`), or give GPUs to containers by CDI.

    ## When it is fine
    Where torch can use the GPUs all the same, or NVML failed only half-way, it is a warning.

    ## Sources
    nvmlInit and its `nvmlReturn_t`, asked in a child process with a deadline; NVIDIA/nvidia-container-toolkit issue 48.
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
            cause=_TAKEN_AWAY if _are_taken_away(facts) else _NVML_CAUSES.get(driver.nvml_error_code or 0),
            evidence=facts.evidence("driver.nvml_state", "driver.nvml_error_code", "driver.kernel_module_version"),
            fix=_nvml_fix(facts),
        ),
    )


def _are_taken_away(facts: Facts) -> bool:
    """Whether this is a container that has lost its GPUs: access(2) then refuses the device files as well."""
    return facts.container is not None and facts.machine.driver.nvml_error_code == _UNKNOWN_ERROR


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
    if _are_taken_away(facts):
        return skipped("NVML's own error says more (VLM105)")
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


CHECKS = (
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
