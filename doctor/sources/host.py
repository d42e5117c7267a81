"""The computer around the GPUs: memory and its limits, shared memory, disk for checkpoints, container, virtual machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..machine import Host, PciDevice
from .environment import shown
from .in_time import in_time
from .limits import exists, filesystem_of, read_limits
from .pci import read_iommu
from .regular_file import small_text

ResultT = TypeVar("ResultT")

_NO_LIMIT_BYTES = 2**60
"""cgroup v1 writes about 2**63 where there is no limit."""
_CACHE_VARIABLES = (
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)
"""In the order in which huggingface_hub looks at them, and the folder below each."""
_DISK_DEADLINE_S = 1.0
"""A network file system whose server is gone would hold ``statvfs`` for ever."""


def read_host(root: Path, environment: Mapping[str, str], devices: Sequence[PciDevice] = ()) -> Host:
    """Describe the host below ``root``.

    Args:
        root: Where the file system begins.
        environment: Tells the folder of checkpoints and some containers.
        devices: The GPUs that the IOMMU is asked about.
    """
    memory = _memory_info(root)
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    limit, left = _cgroup_memory(root)
    if limit is not None and total is not None and limit >= total:
        limit = None
    shm_total, shm_free = _disk(root / "dev/shm") or (None, None)
    cache = hf_cache_folder(environment)
    disk = _told(lambda: _disk_and_access(root / str(cache).lstrip("/"))) if cache is not None else None
    limits = read_limits(root, environment)
    tmp = _told(lambda: _disk(root / (environment.get("TMPDIR") or "/tmp").lstrip("/")))
    release = small_text(root / "proc/sys/kernel/osrelease") or "unknown"
    return Host(
        os=_os_name(root),
        kernel=release,
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_total_bytes=total,
        memory_available_bytes=min((size for size in (available, left) if size is not None), default=None),
        cgroup_limit_bytes=limit,
        shm_total_bytes=shm_total,
        shm_free_bytes=shm_free,
        hf_cache=shown(str(cache), environment.get("HOME", "")) if cache is not None else None,
        hf_cache_free_bytes=disk[0] if disk else None,
        hf_cache_is_writable=disk[1] if disk else None,
        hf_cache_filesystem=filesystem_of(root, str(cache)) if cache is not None else None,
        tmp_free_bytes=tmp[1] if tmp else None,
        container=_container(root, environment),
        is_wsl="microsoft" in release.lower(),
        is_virtual_machine=_is_virtual_machine(root),
        iommu=read_iommu(root, devices),
        **limits,
    )


def hf_cache_folder(environment: Mapping[str, str]) -> Path | None:
    """Where huggingface_hub keeps checkpoints, by its own order of variables; ``None`` when even HOME is unknown."""
    home = environment.get("HOME")
    for name, below in _CACHE_VARIABLES:
        value = environment.get(name)
        if value:
            if value == "~" or value.startswith("~/"):
                value = (home or "") + value[1:]
            return Path(value) / below
    return Path(home) / ".cache/huggingface/hub" if home else None


def _memory_info(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes (the kernel writes KiB and calls them kB)."""
    sizes = {}
    for line in (small_text(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        number = _decimal(rest.partition("kB")[0])
        if number is not None:
            sizes[name] = number * 1024
    return sizes


def _cgroup_memory(root: Path) -> tuple[int | None, int | None]:
    """Tightest memory limit of this process's control group and its ancestors, and the least that one leaves, in bytes.

    Page cache that the kernel can drop at once (``inactive_file``) is not counted as taken: reading checkpoints fills it.
    """
    limits, left = [], []
    for folder, limit_name, used_name, cache_name in _cgroup_folders(root):
        limit = _number(folder / limit_name)
        if limit is None or limit >= _NO_LIMIT_BYTES:
            continue
        limits.append(limit)
        used = _number(folder / used_name)
        if used is not None:
            left.append(max(0, limit - max(0, used - _statistic(folder / "memory.stat", cache_name))))
    return min(limits, default=None), min(left, default=None)


def _cgroup_folders(root: Path) -> list[tuple[Path, str, str, str]]:
    """Folders of the memory controller from this process's group up to the top, with the file names of their version."""
    found: list[tuple[Path, str, str, str]] = []
    for line in (small_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the group may name folders of the host that are not mounted here: those are skipped.
        parts = [part for part in group.split("/") if part not in ("", "..")]
        found += [(mount.joinpath(*parts[:depth]), *names) for depth in range(len(parts), -1, -1)]
    return found


def _statistic(path: Path, name: str) -> int:
    for line in (small_text(path) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _decimal(value) or 0
    return 0


def _disk(path: Path) -> tuple[int, int] | None:
    """Total and free bytes, for this user, of the file system of ``path`` or of its nearest folder that exists."""
    for folder in (path, *path.parents):
        try:
            state = os.statvfs(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        return state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
    return None


def _disk_and_access(path: Path) -> tuple[int, bool] | None:
    """Free bytes, and whether this user may write there, or into the nearest folder that exists."""
    space = _disk(path)
    nearest = next((folder for folder in (path, *path.parents) if exists(folder)), None)
    return (space[1], os.access(nearest, os.W_OK | os.X_OK)) if space is not None and nearest is not None else None


def _told(look: Callable[[], ResultT]) -> ResultT | None:
    # A name that no file system takes, such as one of 100,000 characters, has nothing to tell, nor has a dead disk.
    try:
        return in_time(look, _DISK_DEADLINE_S)
    except (OSError, ValueError):
        return None


def _container(root: Path, environment: Mapping[str, str]) -> str | None:
    """Kind of container this process runs in. Kubernetes comes first: its containers are docker's or containerd's too."""
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "kubernetes"
    if "APPTAINER_NAME" in environment or "SINGULARITY_NAME" in environment:
        return "apptainer"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    groups = small_text(root / "proc/1/cgroup") or ""
    for mark, kind in (("kubepods", "kubernetes"), ("docker", "docker"), ("lxc", "lxc"), ("containerd", "container")):
        if mark in groups:
            return kind
    return shown(environment.get("container", ""), home="") or None


def _is_virtual_machine(root: Path) -> bool | None:
    """The ``hypervisor`` CPU flag (x86 only). Only the first CPU is read: on big machines the file is slow to make."""
    try:
        with (root / "proc/cpuinfo").open("rb") as file:
            head = file.read(8192)
    except OSError:
        return None
    flags = next((line.split() for line in head.split(b"\n") if line.startswith(b"flags")), None)
    return b"hypervisor" in flags if flags is not None else None


def _os_name(root: Path) -> str:
    for line in (small_text(root / "etc/os-release") or "").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip("\"'") or "unknown"
    return "unknown"


def _number(path: Path) -> int | None:
    return _decimal(small_text(path) or "")


def _decimal(text: str) -> int | None:
    """A number as the kernel writes it; ``None`` for what is none, or is larger than the kernel has."""
    text = text.strip()
    return int(text) if re.fullmatch("[0-9]{1,19}", text, re.ASCII) else None
