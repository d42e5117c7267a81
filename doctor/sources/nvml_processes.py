"""The part of the NVML program that asks who holds memory of a GPU."""

from __future__ import annotations

import time
from typing import Any

_LISTS = (
    ("compute", "nvmlDeviceGetComputeRunningProcesses"),
    ("mps", "nvmlDeviceGetMPSComputeRunningProcesses"),
    ("graphics", "nvmlDeviceGetGraphicsRunningProcesses"),
)
"""In order of weight: a process that is in several lists holds its memory once, and is named by the first."""
_MAX_COMMAND_CHARS = 200


def ask(reader: Any, where: str, handle: Any) -> list[dict[str, Any]]:
    """Processes that hold memory of one GPU, each once. An empty list may also mean that they are hidden (containers)."""
    found: dict[int, dict[str, Any]] = {}
    for kind, function in _LISTS:
        for process in reader.ask(where, function, handle) or ():
            if process.pid not in found:
                known = {"pid": process.pid, "kind": kind, "used_bytes": process.usedGpuMemory}
                found[process.pid] = {**known, **_owner(process.pid)}
    return list(found.values())


def _owner(pid: int) -> dict[str, Any]:
    """User, command and age of a process; nothing when it cannot be seen from here."""
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            return {
                "user": process.username(),
                "command": describe_command(process.cmdline()),
                "started_s_ago": round(max(0.0, time.time() - process.create_time()), 1),
            }
    except (psutil.Error, OSError, KeyError):
        return {}


def describe_command(arguments: list[str]) -> str | None:
    """``python -m vllm.entrypoints`` or ``python train.py``: the words before the first option.

    Options are left out because people pass keys and tokens in them.
    """
    words: list[str] = []
    for position, argument in enumerate(arguments):
        is_module = argument == "-m" or (words and words[-1] == "-m")
        if position and argument.startswith("-") and not is_module:
            break
        words.append(argument if position else argument.rpartition("/")[2])
    text = " ".join(words)[:_MAX_COMMAND_CHARS]
    return text.encode("utf-8", "replace").decode() or None
