"""NVIDIA devices on the PCI bus, driver or no driver, from sysfs. By hand: ``lspci -nnk -d 10de:``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..machine import PciDevice
from .regular_file import small_text

_NVIDIA = "0x10de"
_DISPLAY_CLASSES = ("0x0300", "0x0302")
"""VGA and 3D controller, the first 16 bits of the PCI class. NVSwitch (0x0680) and audio (0x0403) are not GPUs."""


def read_pci_devices(root: Path) -> tuple[PciDevice, ...]:
    """NVIDIA GPUs below ``root``/sys/bus/pci/devices, by address."""
    folder = root / "sys/bus/pci/devices"
    if not folder.is_dir():
        return ()
    found = []
    for device in sorted(folder.iterdir()):
        if small_text(device / "vendor") == _NVIDIA and (small_text(device / "class") or "").startswith(_DISPLAY_CLASSES):
            found.append(
                PciDevice(
                    bus_id=device.name.lower(),
                    device_id=(small_text(device / "device") or "").removeprefix("0x"),
                    kernel_driver=(device / "driver").resolve().name if (device / "driver").exists() else None,
                    numa_node=_count(device / "numa_node"),
                    link_width=_count(device / "current_link_width"),
                    link_width_max=_count(device / "max_link_width"),
                )
            )
    return tuple(found)


def read_iommu(root: Path, devices: Sequence[PciDevice]) -> Literal["off", "passthrough", "translating", "unknown"]:
    """What the IOMMU does to the GPUs: where it translates, peer copies over PCIe are redirected, slow or broken."""
    if not devices:
        return "unknown"
    modes = set()
    for device in devices:
        group = root / "sys/bus/pci/devices" / device.bus_id / "iommu_group"
        if not group.exists():
            modes.add("off")
        else:
            kind = small_text(group / "type") or ""
            modes.add("passthrough" if kind == "identity" else "translating" if kind.startswith("DMA") else "unknown")
    for mode in ("translating", "unknown", "passthrough"):
        if mode in modes:
            return mode
    return "off"


def _count(path: Path) -> int | None:
    """A number, or ``None`` where the kernel says -1 (no NUMA), 0 or 255 (no link)."""
    text = small_text(path)
    if text is None or not text.isdecimal():
        return None
    number = int(text)
    return number if path.name == "numa_node" or 0 < number < 255 else None
