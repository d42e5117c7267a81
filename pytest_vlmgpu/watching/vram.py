"""Memory of one test: its peaks as properties of its report, its limit, what it left behind, the fixture ``vlm_vram``."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import pytest

from vlm_doctor.units import GIB, format_gib

from ..models.keepers import holder_of
from ..state import WATCHED_TEST
from ..verdicts import OVER_LIMIT
from .meter import ATTACHED, Meter, allocated_bytes, driver_bytes, empty_cache
from .properties import DECLARED, DRIVER, PEAK, PEAK_EACH, RESERVED, RESERVED_EACH

if TYPE_CHECKING:
    from collections.abc import Mapping

_LEAST_LEFT = 2**20
"""Tensors below 1 MiB are not looked for when memory was left behind: they explain nothing."""


class VramMeter:
    """GPU memory of the running test: value of the fixture ``vlm_vram``. All zero where no GPU is used."""

    def __init__(self) -> None:
        self._meter = Meter()
        self._meter.start()

    @property
    def peak_gib(self) -> float:
        """Most memory of tensors since the fixture was set up, or since :meth:`reset`, of all GPUs together, in GiB."""
        return sum(peak.allocated for peak in self._meter.read().values()) / GIB

    @property
    def used_gib(self) -> float:
        """What tensors hold right now, on all GPUs together, in GiB."""
        return (sum(allocated_bytes().values()) + sum(ATTACHED.values())) / GIB

    def peaks_gib(self) -> dict[int, float]:
        """CUDA ordinal to the peak of that GPU, in GiB."""
        return {ordinal: peak.allocated / GIB for ordinal, peak in self._meter.read().items()}

    def reset(self) -> None:
        """Measure from here. The peaks of the test as a whole, and its limit, are not affected."""
        self._meter.start()

    def close(self) -> None:
        """Stop measuring."""
        self._meter.stop()


def note(item: pytest.Item, meter: Meter) -> None:
    """Attach the peaks of a test to its reports."""
    peaks = meter.read()
    declared = item.stash[WATCHED_TEST].declared_bytes
    if not peaks:
        return
    driver = driver_bytes()
    figures: dict[str, int | None] = {
        PEAK: sum(peak.allocated for peak in peaks.values()),
        PEAK_EACH: max(peak.allocated for peak in peaks.values()),
        RESERVED: sum(peak.reserved for peak in peaks.values()),
        RESERVED_EACH: max(peak.reserved for peak in peaks.values()),
        DRIVER: sum(driver.values()) or None,
        DECLARED: declared,
    }
    kept = [(name, value) for name, value in item.user_properties if name not in figures]
    item.user_properties[:] = kept + [(name, round(value / GIB, 3)) for name, value in figures.items() if value is not None]


def hold_to_limit(item: pytest.Item, meter: Meter) -> None:
    """Fail a test whose peak is above its ``vlm_limit_vram``.

    Raises:
        pytest.fail.Exception: VLM751.
    """
    limit = item.stash[WATCHED_TEST].limit_bytes
    over = {ordinal: peak for ordinal, peak in meter.read().items() if limit is not None and peak.allocated > limit}
    if limit is None or not over:
        return
    figures = ", ".join(
        f"{format_gib(peak.allocated)} on cuda:{ordinal} ({format_gib(peak.reserved)} with gaps)"
        for ordinal, peak in over.items()
    )
    pytest.fail(
        f"{OVER_LIMIT}: the test may take {format_gib(limit)} of one GPU and took {figures}: make its inputs smaller, or "
        "raise the limit of @pytest.mark.vlm_limit_vram.",
        pytrace=False,
    )


def grown(before: Mapping[int, int], tolerance_bytes: int) -> dict[int, int]:
    """CUDA ordinal to how much more tensors hold than before, of the GPUs where that is more than the tolerance."""
    more = {ordinal: size - before.get(ordinal, 0) for ordinal, size in allocated_bytes().items()}
    return {ordinal: size for ordinal, size in more.items() if size > tolerance_bytes}


def collect() -> None:
    """Free what only reference cycles keep alive, and return it to the driver."""
    gc.collect()
    empty_cache()


def on_gpus(sizes: Mapping[int, int]) -> str:
    """``1.5 GiB on cuda:0, 512 MiB on cuda:1``."""
    return ", ".join(f"{format_gib(size)} on cuda:{ordinal}" for ordinal, size in sizes.items())


def who_holds(left: Mapping[int, int]) -> str:
    """The holder of the largest tensor that is no parameter on the GPU with most left; empty when nothing is found.

    Every object that Python tracks is looked at: for reports of something wrong only.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return ""
    worst = max(left, key=lambda ordinal: left[ordinal])
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors = [
        tensor
        for tensor in tensors
        if type(tensor) is torch.Tensor and tensor.device.type == "cuda" and tensor.device.index == worst
    ]
    largest = max(tensors, key=lambda tensor: int(tensor.nbytes), default=None)
    if largest is None or largest.nbytes < _LEAST_LEFT:
        return ""
    shape = list(largest.shape)
    del tensors
    name = holder_of(largest)
    return f" ({name} holds a tensor of shape {shape})" if name else f" (a tensor of shape {shape} is among it)"
