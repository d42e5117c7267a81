"""Devices as people write them: ``0``, ``"cuda:0"``, ``"0"``, ``"cpu"``, ``"disk"``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

CPU, DISK = "cpu", "disk"
OFF_GPU = (CPU, DISK)
MOST_IN_ORDER = 7
"""Sets of numbers up to this are in rising order: the smallest table of a set of CPython has 8 places."""
_CUDA = re.compile(r"cuda:(\d{1,4})", re.ASCII)
_DIGITS = re.compile(r"\d{1,4}", re.ASCII)


class Spelled(NamedTuple):
    """One value of a map, understood."""

    device: int | str
    """Number in the process, ``cpu`` or ``disk``; the text as it stands where it is no device."""
    problem: str = ""
    """Why torch refuses it; empty when it does not."""
    is_text: bool = False
    """``"cuda:0"`` where a number would do: to accelerate the two are different devices."""


def spelled(value: int | str) -> Spelled:
    """Read one value."""
    if isinstance(value, int):
        return Spelled(value) if value >= 0 else Spelled(str(value), "torch has no device with a negative number")
    text = value.strip()
    match = _CUDA.fullmatch(text)
    if match:
        return Spelled(int(match[1]), is_text=True)
    if text in OFF_GPU:
        return Spelled(text)
    if text == "cuda":
        return Spelled(0, is_text=True)
    if _DIGITS.fullmatch(text):
        return Spelled(
            int(text), f"torch takes the number {int(text)} and refuses the text (Invalid device string: '{text}')"
        )
    return Spelled(text, "that is no device: write the number of a GPU, cpu or disk")


def shown(device: int | str) -> str:
    """As torch shows it: ``cuda:0``."""
    return f"cuda:{device}" if isinstance(device, int) else device


def main_device(devices: Iterable[int | str]) -> int | str:
    """Where accelerate runs what lies on CPU or disk, and where it sends the inputs; for text it depends on the seed of the
    process.
    """
    numbers = [device for device in devices if isinstance(device, int)]
    return main_number(numbers) if numbers else CPU


def main_number(numbers: Iterable[int]) -> int:
    """The main one of the GPUs of a map, of which there is one.

    ``dispatch_model`` takes the first of a set. For the numbers of GPUs that is the same in every process (8 comes before
    1, and beyond :data:`MOST_IN_ORDER` the order of the map may decide).
    """
    # The same expression as in accelerate: the order of a set of numbers is that of CPython.
    return list(set(numbers))[0]  # noqa: RUF015


def normal(device_map: Mapping[str, int | str]) -> dict[str, int | str]:
    """The map with every device in one spelling."""
    return {key: spelled(value).device for key, value in device_map.items()}
