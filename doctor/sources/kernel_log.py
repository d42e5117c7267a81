"""What the kernel log says about NVIDIA GPUs. By hand: ``sudo dmesg | grep -iE 'nvrm|xid|dmar|amd-vi'``.

Only numbers, addresses and ages are kept: the lines also name processes and what they were started with.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from ..machine import KernelEvent

Kind = Literal["xid", "init_failed", "gsp_failed", "needs_open_modules", "not_probed", "api_mismatch", "iommu_fault"]

_DEADLINE_S = 0.2
"""A log of 20,000 lines takes 40 ms; somebody who floods it must not hold up the verdict."""
_RECORD_BYTES = 8192
"""What the kernel wants a reader of /dev/kmsg to offer; the longest record is smaller."""
_MOST_EVENTS = 200

_BUS = r"(?:PCI:|GPU )?(?P<bus>[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}(?:\.[0-7])?)"
_SIGNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("xid", re.compile(rf"NVRM: Xid \({_BUS}[^)]*\): (?P<code>\d{{1,4}})")),
    ("needs_open_modules", re.compile(r"NVRM:.*(?:requires use of|use) the NVIDIA open kernel modules")),
    ("gsp_failed", re.compile(r"NVRM:.*(?:Cannot initialize GSP firmware|GSP firmware.*(?:failed|error))")),
    ("init_failed", re.compile(rf"NVRM:.*{_BUS}.*(?:RmInitAdapter failed|rm_init_adapter failed)")),
    ("init_failed", re.compile(r"NVRM:.*(?:RmInitAdapter failed|rm_init_adapter failed)")),
    ("not_probed", re.compile(r"NVRM:.*probe routine was not called for \d+ device")),
    ("api_mismatch", re.compile(r"NVRM: API mismatch")),
    ("iommu_fault", re.compile(rf"(?:DMAR:.*fault.*?|AMD-Vi:.*IO_PAGE_FAULT.*?){_BUS}")),
    ("iommu_fault", re.compile(r"DMAR:.*\[DMA (?:Read|Write).*device \[?(?P<slot>[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])")),
)
"""Texts of the NVIDIA driver and of the IOMMU drivers. Sources: NVIDIA, Xid Errors; open-gpu-kernel-modules issues 789 and
862; DCGM's check for denied drivers; drivers/iommu/intel/dmar.c and drivers/iommu/amd/iommu.c of Linux."""


def read_kernel_log(root: Path) -> tuple[KernelEvent, ...]:
    """Events since boot, the newest first.

    Raises:
        OSError: The log may not be read; in containers and for ordinary users that is usual.
    """
    now_s = _uptime_s(root)
    found: dict[tuple[Kind, int | None, str | None], KernelEvent] = {}
    for written_s, text in _records(root / "dev/kmsg"):
        event = understand(text)
        if event is None:
            continue
        key = (event.kind, event.code, event.bus_id)
        earlier = found.pop(key, None)
        age = max(0.0, round(now_s - written_s, 1)) if now_s is not None and written_s is not None else None
        count = 1 + (earlier.count if earlier is not None else 0)
        found[key] = msgspec.structs.replace(event, count=count, last_s_ago=age)
    return tuple(reversed(list(found.values())[-_MOST_EVENTS:]))


def understand(text: str) -> KernelEvent | None:
    """The event that a line tells of, or ``None``."""
    if "NVRM" not in text and "DMAR" not in text and "AMD-Vi" not in text:
        return None
    for kind, sign in _SIGNS:
        match = sign.search(text[:2000])
        if match is not None:
            parts = match.groupdict()
            code = parts.get("code")
            return KernelEvent(kind=kind, code=int(code) if code else None, bus_id=_address(parts))
    return None


def _address(parts: dict[str, str | None]) -> str | None:
    """The address as sysfs writes it: 4-digit domain, function 0 where none is told."""
    bus = parts.get("bus") or (f"0000:{parts['slot']}" if parts.get("slot") else None)
    if bus is None:
        return None
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}" if "." in rest else f"{domain[-4:]}:{rest}.0"


def _records(path: Path) -> Iterator[tuple[float | None, str]]:
    """Records of /dev/kmsg: seconds after boot, and the text. A plain file of such lines will do, too."""
    until = time.monotonic() + _DEADLINE_S
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        waiting = b""
        while time.monotonic() < until:
            try:
                data = os.read(descriptor, _RECORD_BYTES)
            except BlockingIOError:  # all that there is was read
                break
            except BrokenPipeError:  # the oldest record was overwritten meanwhile
                continue
            *lines, waiting = (waiting + data).split(b"\n")
            yield from map(_record, lines if data else [waiting])
            if not data:
                break
    finally:
        os.close(descriptor)


def _record(line: bytes) -> tuple[float | None, str]:
    """``6,1234,5678901,-;text``: priority, number, microseconds since boot, flags."""
    head, _, text = line.decode("utf-8", "replace").partition(";")
    words = head.split(",")
    is_timed = len(words) >= 3 and words[2].isdecimal() and len(words[2]) < 20
    return (int(words[2]) / 1e6 if is_timed else None), text


def _uptime_s(root: Path) -> float | None:
    """Seconds since boot, on the clock of the kernel log."""
    try:
        return float((root / "proc/uptime").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
