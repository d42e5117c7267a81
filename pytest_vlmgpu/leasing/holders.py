"""Who holds a lease: written into its file for messages, and read back so that a recycled pid is not misnamed.

Nothing here decides anything: a lease is held as long as the kernel says that its file is locked.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 4096
"""More than any record of ours: what is longer is not read."""
_UNKNOWN = "a process that left no name"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19
"""Field ``starttime`` of /proc/PID/stat, counted behind the command's closing parenthesis. Source: proc_pid_stat(5)."""


def describe_self(about: Mapping[str, object] | None = None) -> bytes:
    """This process as a record: pid, user, command, since, and what tells it from a later process with its pid.

    Args:
        about: What else is to be known of it.
    """
    from vlm_doctor.sources.nvml_processes import describe_command

    record = {
        **(about or {}),
        "pid": os.getpid(),
        "user": _user(),
        "command": describe_command(_arguments()) or "",
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": os.uname().nodename,
        "boot": _boot(),
        "pid_namespace": pid_namespace(),
        "started": _start_ticks(os.getpid()),
    }
    return json.dumps(record).encode("utf-8", "replace")[:MAX_BYTES]


def describe(raw: bytes) -> str:
    """A record as part of a sentence: ``pid 4711 (ana, pytest tests) since 2026-01-02 10:11 UTC``.

    Args:
        raw: What the file of a lease contains; anything at all, since every user may write it.
    """
    record, pid = _read(raw), pid_of(raw)
    if pid is None:
        return _UNKNOWN
    command = f"warm host of {_plain(record['warm'])}" if record.get("warm") else _plain(record.get("command"))
    names = [text for text in (_plain(record.get("user")), command) if text]
    who = f"pid {pid} ({', '.join(names)})" if names else f"pid {pid}"
    since = _plain(record.get("since"))[:16].replace("T", " ")
    who = f"{who} since {since} UTC" if since else who
    if record.get("boot") != _boot():
        # Another computer, with a shared folder; or a file that is older than this computer's last start.
        return f"{who} on {_plain(record.get('host')) or 'another computer'}"
    if record.get("pid_namespace") != pid_namespace():
        return f"{who} (the pid counts in another container)"
    return who if _start_ticks(pid) == record.get("started") else _UNKNOWN


def is_here(raw: bytes) -> bool:
    """True where the process of a record runs on this computer, and its pid counts here."""
    record, pid = _read(raw), pid_of(raw)
    places = record.get("boot"), record.get("pid_namespace")
    return pid is not None and places == (_boot(), pid_namespace()) and _start_ticks(pid) == record.get("started")


def gives_way(raw: bytes) -> bool:
    """True of the record of a warm host, which ends when it is asked for its GPUs while it is idle."""
    record = _read(raw)
    return bool(record.get("warm"))


def warm_bytes(raw: bytes, name: str) -> int:
    """What a warm host says that it will give back of a GPU; 0 of anybody else."""
    held = _read(raw).get("warm_bytes")
    size = held.get(name) if isinstance(held, dict) else None
    return size if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**46 else 0


def pid_of(raw: bytes) -> int | None:
    """The pid in a record; ``None`` where there is none."""
    pid = _read(raw).get("pid")
    return pid if isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31 else None


def _read(raw: bytes) -> dict[str, object]:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _plain(value: object) -> str:
    """Text of others for a terminal: printable and short."""
    text = value if isinstance(value, str) else ""
    return "".join(character if character.isprintable() else "?" for character in text)[:200]


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container may run under a number without a name
        return f"uid {os.getuid()}"


def _arguments() -> list[str]:
    program, *others = sys.argv or [""]
    folder, _, name = program.rpartition("/")
    # python -m pytest
    return [folder.rpartition("/")[2] if name == "__main__.py" and folder else program or "python", *others]


def _boot() -> str:
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Where pids count the same; empty where nobody can tell."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no file: the link's text is the answer
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """False for a process that is gone or a zombie: its memory and its descriptors are given back."""
    return _stat(pid)[:1] not in ([], ["Z"], ["X"])


def _start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: no change of the wall clock moves it. ``None``: no process."""
    try:
        return int(_stat(pid)[_START_TIME])
    except (ValueError, IndexError):
        return None


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat behind the command, the state first; empty where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()
