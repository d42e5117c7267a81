"""Commands for somebody who is stuck: they work as pasted, for the Python, the container and the system that was seen."""

from __future__ import annotations

import re
import shlex

from ..findings import Fix
from ._check import Facts

_DEBIAN = ("Debian", "Ubuntu", "Linux Mint", "Pop!_OS")
_RED_HAT = ("AlmaLinux", "CentOS", "Fedora", "Oracle Linux", "Red Hat", "Rocky")
"""Beginnings of PRETTY_NAME in /etc/os-release, which is where the name of the system comes from."""
WITH_NVML = ("-e NVIDIA_DRIVER_CAPABILITIES=compute,utility",)
"""Makes NVIDIA's container runtime bring libcuda and NVML. Source: NVIDIA Container Toolkit, Driver Capabilities."""
ROOMY = "/path/with/room"
"""Stands for a folder that only the user can name; the text beside the command says so."""
IMAGE = "IMAGE stands for yours"
"""Goes with every command that names one."""


def shell_path(path: str) -> str:
    """A path quoted for a shell, in which ``~`` at its beginning stays the home directory."""
    if path.startswith("~/") and len(path) > 2:
        return f"~/{shlex.quote(path[2:])}"
    return path if path == "~" else shlex.quote(path)


def python(facts: Facts) -> str:
    """The Python that was examined: ``python`` where its environment is active or nothing is known, else its path."""
    libraries = facts.machine.libraries
    if libraries is None or libraries.is_virtual_environment is None or not libraries.executable:
        return "python"
    active = facts.machine.environment.get("VIRTUAL_ENV")
    if active and libraries.executable.startswith(f"{active.rstrip('/')}/"):
        return "python"
    return shell_path(libraries.executable)


def pip(facts: Facts, verb: str, *words: str) -> str:
    """A command of pip for the Python that was examined; where it has no pip, of uv.

    Args:
        facts: What is known.
        verb: ``install`` or ``uninstall``.
        words: Options and requirements, not yet quoted.
    """
    libraries = facts.machine.libraries
    quoted = " ".join(map(shlex.quote, words))
    if libraries is not None and libraries.has_pip is False:
        return f"uv pip {verb} --python {python(facts)} {quoted}"
    # Debian's and Fedora's own Python refuses otherwise (PEP 668); whatever is installed there got in with this option.
    allowed = " --break-system-packages" if libraries is not None and libraries.is_externally_managed else ""
    return f"{python(facts)} -m pip {verb}{' -y' if verb == 'uninstall' else ''}{allowed} {quoted}"


def start_anew(facts: Facts, text: str, *options: str, gpus: str = "all") -> Fix:
    """Start the container anew with other options, in the words of what runs it.

    Args:
        facts: What is known.
        text: What to do, one sentence.
        options: Options that ``docker run`` and ``podman run`` share, ready for a shell.
        gpus: Those of ``docker run --gpus``, ready for a shell.
    """
    kind = facts.container
    said = text.rstrip(".")
    if kind == "kubernetes":
        text = f"{said} (in the pod's specification; NAME stands for that of yours)."
        return Fix(text=text, commands=("kubectl edit deployment NAME",), place="host")
    if kind == "apptainer":
        return Fix(text=f"{said} ({IMAGE}).", commands=("apptainer exec --nv IMAGE vlm-doctor",), place="host")
    words = ["podman run --device nvidia.com/gpu=all"] if kind == "podman" else [f"docker run --gpus {gpus}"]
    return Fix(text=f"{said} ({IMAGE}).", commands=(" ".join([*words, *options, "IMAGE"]),), place="host")


def is_debian(facts: Facts) -> bool:
    """True where packages are apt's, as far as is known."""
    host = facts.machine.host
    return host is not None and host.os.startswith(_DEBIAN)


def is_red_hat(facts: Facts) -> bool:
    """True where packages are dnf's, as far as is known."""
    host = facts.machine.host
    return host is not None and host.os.startswith(_RED_HAT)


def branch(version: str | None) -> str | None:
    """``580`` of ``580.95.05``: how distributions name the packages of a driver."""
    match = re.match(r"[0-9]{3,4}", version or "", re.ASCII)
    return match[0] if match else None


def without_folders(facts: Facts, unwanted: tuple[str, ...]) -> str:
    """LD_LIBRARY_PATH without folders that end so, ``/`` included; unset where nothing else stands in it."""
    folders = facts.machine.environment.get("LD_LIBRARY_PATH", "").split(":")
    kept = [folder for folder in folders if folder and not f"{folder.rstrip('/')}/".endswith(unwanted)]
    return f"export LD_LIBRARY_PATH={':'.join(map(shell_path, kept))}" if kept else "unset LD_LIBRARY_PATH"


def largest_last(folder: str) -> str:
    """A command that lists what takes room in a folder."""
    return f"du -sh {shell_path(folder)}/* 2> /dev/null | sort -h"
