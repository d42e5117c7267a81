"""Units: the only place that knows how sizes and ages are spelled.

Inside the program a size is always an ``int`` of bytes. ``GB`` means 10**9 and ``GiB`` means 2**30: the field mixes
them up (an "80 GB" H100 reports 79.2 GiB), so both are read and neither is guessed.
"""

from __future__ import annotations

import re

from .errors import UsageError

KIB = 2**10
MIB = 2**20
GIB = 2**30
GB = 10**9

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": GB,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 2**40,
}
_AMOUNT = re.compile(r"\s*(?P<number>\d{1,15}(?:\.\d{1,6})?)\s*(?P<unit>[A-Za-z]{1,3})\s*", re.ASCII)


def parse_bytes(text: str, *, where: str = "size") -> int:
    """Read a size that carries its own unit.

    Args:
        text: A number and a unit, such as ``"24GiB"`` (24 * 2**30) or ``"80GB"`` (80 * 10**9). Case does not matter.
        where: What the text is, for the message of the error.

    Returns:
        Bytes, rounded down.

    Raises:
        UsageError: The text is not a number followed by one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    match = _AMOUNT.fullmatch(text)
    factor = _UNITS.get(match["unit"].lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f"{where}: {text!r} is not a size; write a number and a unit, such as 24GiB or 80GB.")
    return int(float(match["number"]) * factor)


def format_gib(size_bytes: int) -> str:
    """Write bytes for people, in GiB with one decimal (``"23.5 GiB"``), or in MiB below 1 GiB (``"618 MiB"``)."""
    if abs(size_bytes) < GIB:
        return f"{size_bytes / MIB:.0f} MiB"
    return f"{size_bytes / GIB:.1f} GiB"


def format_age(seconds: float) -> str:
    """Write how long ago something was, in its largest whole unit (``"3 d"``, ``"2 h"``, ``"5 min"``, ``"0 s"``)."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
