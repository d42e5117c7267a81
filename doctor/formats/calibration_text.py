"""What ``vlm-doctor calibrate`` prints."""

from __future__ import annotations

from collections.abc import Iterable

from ..calibration import Calibration
from ..units import MIB


def calibration_text(readings: Iterable[tuple[int, str, Calibration | None, str | None]]) -> str:
    """One paragraph a GPU.

    Args:
        readings: Index, name, and what was measured or why nothing was.
    """
    lines: list[str] = []
    for gpu, name, calibration, reason in readings:
        if calibration is None:
            lines.append(f"GPU {gpu} ({name}): not measured, {reason}.")
            continue
        libraries_bytes = calibration.context_bytes - calibration.bare_context_bytes
        lines += [
            f"GPU {gpu} ({name}), driver {calibration.driver_version}, torch {calibration.torch_version}:",
            f"  CUDA context                  {calibration.bare_context_bytes / MIB:7.0f} MiB",
            f"  libraries and kernels         {libraries_bytes / MIB:7.0f} MiB",
            f"  cuBLAS workspace              {calibration.workspace_bytes / MIB:7.1f} MiB",
            f"  allocator: smallest block {calibration.rounding_bytes} bytes, segments of "
            f"{calibration.small_segment_bytes / MIB:.0f} and {calibration.large_segment_bytes / MIB:.0f} MiB",
        ]
    if not lines:
        return "There is no GPU to measure.\n"
    return "\n".join(lines) + "\n"
