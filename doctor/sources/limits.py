"""What this process may use of the computer: CPUs by NUMA node, address space, tasks, and what runs beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..machine import NumaNode
from .environment import shown
from .regular_file import read_text

_MAX_BYTES = 64 * 1024
_MOST_NODES = 256
_MOST_CPUS = 65_536
_MAX_INTERFACES = 64
_NO_LIMIT = 2**62
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How the kernel writes a space in the name of a mount point."""


def read_limits(root: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Fields of :class:`~vlm_doctor.machine.Host` about limits of this process.

    By hand: ``ulimit -v``, ``numactl --show``, ``cat /sys/fs/cgroup/pids.max``, ``ls /sys/class/net``.
    """
    tmp = environment.get("TMPDIR") or "/tmp"
    return {
        "numa_nodes": numa_nodes(root),
        "network_interfaces": _interfaces(root),
        "address_space_limit_bytes": _address_space(),
        "tasks_left": tasks_left(root),
        "tmp": shown(tmp, environment.get("HOME", ""))[:4096],
        "mps": mps(root, environment),
    }


def numa_nodes(root: Path) -> tuple[NumaNode, ...]:
    """NUMA nodes with processors; empty where the kernel does not tell."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    found = []
    for folder in _listed(root / "sys/devices/system/node", r"node(\d{1,4})")[:_MOST_NODES]:
        cpus = _cpu_list(read_text(folder / "cpulist", _MAX_BYTES) or "")
        if cpus:
            mine = len(cpus) if allowed is None else len(cpus & allowed)
            found.append(NumaNode(node=int(folder.name[4:]), cpu_count=len(cpus), allowed_cpu_count=mine))
    return tuple(found)


def _cpu_list(text: str) -> set[int]:
    """``0-3,8`` to its numbers."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        if match:
            cpus.update(range(int(match[1]), min(int(match[2] or match[1]), _MOST_CPUS) + 1))
    return cpus


def _listed(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name, re.ASCII))
    except OSError:
        return []


def _interfaces(root: Path) -> tuple[str, ...]:
    return tuple(path.name for path in _listed(root / "sys/class/net", r"[!-~]{1,15}")[:_MAX_INTERFACES])


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return soft if 0 <= soft < _NO_LIMIT else None


def tasks_left(root: Path) -> int | None:
    """Tasks that the control group of this process, or one above it, still allows; version 2 of control groups."""
    line = next(
        (line for line in (read_text(root / "proc/self/cgroup", _MAX_BYTES) or "").splitlines() if line[:3] == "0::"), ""
    )
    parts = [part for part in line[3:].split("/") if part not in ("", "..")]
    left = []
    for depth in range(len(parts), -1, -1):
        folder = (root / "sys/fs/cgroup").joinpath(*parts[:depth])
        most, now = (read_text(folder / name, 100) or "" for name in ("pids.max", "pids.current"))
        if most.strip().isdecimal() and now.strip().isdecimal():
            left.append(max(0, int(most) - int(now)))
    return min(left, default=None)


def mps(root: Path, environment: Mapping[str, str]) -> Literal["absent", "running", "dead"]:
    """State of the MPS control daemon. Source: NVIDIA, Multi-Process Service, environment variables."""
    folder = root / (environment.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps").lstrip("/")
    if not exists(folder / "control"):
        return "absent"
    pid = (read_text(folder / "nvidia-cuda-mps-control.pid", 100) or "").strip()
    return "running" if not pid.isdecimal() or (root / "proc" / pid).exists() else "dead"


def exists(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is that of none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def filesystem_of(root: Path, path: str) -> str | None:
    """Type of the file system that holds ``path``, from the mount with the longest fitting name."""
    best: tuple[int, str | None] = (-1, None)
    for line in (read_text(root / "proc/self/mounts", 4 * _MAX_BYTES) or "").splitlines():
        words = line.split(" ")
        if len(words) < 3:
            continue
        mount = _ESCAPED.sub(lambda match: chr(int(match[1], 8)), words[1]).rstrip("/")
        if (path == mount or path.startswith(f"{mount}/")) and len(mount) >= best[0]:
            best = (len(mount), words[2][:100])
    return best[1]
