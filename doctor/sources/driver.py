"""The NVIDIA kernel driver as the file system shows it: version, flavour, device files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .regular_file import small_text

_VERSION = re.compile(r"\b(\d{3,4}\.\d{1,3}(?:\.\d{1,3})?)\b")


def read_driver_files(root: Path) -> dict[str, Any]:
    """Fields of :class:`~vlm_doctor.machine.Driver` that need no NVML.

    By hand: ``cat /proc/driver/nvidia/version``, ``ls -l /dev/nvidia*``.
    """
    banner = small_text(root / "proc/driver/nvidia/version")
    match = _VERSION.search(banner or "")
    files = device_files(root)
    return {
        "kernel_module_version": match[1] if match else small_text(root / "sys/module/nvidia/version"),
        "is_open_kernel_module": "Open Kernel Module" in banner if banner else None,
        "device_files": tuple(files),
        "forbidden_device_files": tuple(
            name for name in files if not os.access(root / name.lstrip("/"), os.R_OK | os.W_OK)
        ),
    }


def device_files(root: Path) -> list[str]:
    """``/dev/nvidia0``, ``/dev/nvidiactl``, ``/dev/nvidia-uvm`` …, sorted, without folders (/dev/nvidia-caps)."""
    return sorted(f"/dev/{path.name}" for path in (root / "dev").glob("nvidia*") if not path.is_dir())
