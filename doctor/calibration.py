"""What one torch process was measured to take of a GPU besides a model; constants of a machine."""

from __future__ import annotations

import msgspec


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Readings of one GPU, by ``vlm-doctor calibrate``. Valid for the same card, driver and torch."""

    gpu_name: str
    driver_version: str
    """Of the kernel module."""
    torch_version: str
    date: str
    """Day of the measurement, ``2026-11-25``."""
    context_bytes: int
    """Outside torch's allocator: the CUDA context, and the kernels and libraries that the first calls load."""
    bare_context_bytes: int
    """The context alone; the rest of ``context_bytes`` came with the first matrix product, attention and convolution."""
    workspace_bytes: int
    """What torch keeps allocated for cuBLAS after the first matrix product."""
    rounding_bytes: int
    """The allocator's smallest block."""
    small_segment_bytes: int
    """What the allocator asks of the driver for its first small tensor."""
    large_segment_bytes: int
    """What it asks for a tensor between 1 and 10 MiB."""


def calibration_of(calibrations: tuple[Calibration, ...], gpu_name: str, driver_version: str | None) -> Calibration | None:
    """The readings of a card under a driver, or ``None``."""
    return next((one for one in calibrations if (one.gpu_name, one.driver_version) == (gpu_name, driver_version)), None)
