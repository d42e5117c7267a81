from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlm_doctor.machine import PciDevice
from vlm_doctor.sources.driver import read_driver_files
from vlm_doctor.sources.pci import read_iommu, read_pci_devices

OPEN_BANNER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\nGCC version: 12\n"
CLOSED_BANNER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"


def add_device(root: Path, address: str, *, driver: str | None = None, iommu: str | None = None, **files: str) -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    for name, text in {"vendor": "0x10de", "class": "0x030200", "device": "0x2335", **files}.items():
        (folder / name).write_text(f"{text}\n")
    if driver is not None:
        target = root / "sys/bus/pci/drivers" / driver
        target.mkdir(parents=True, exist_ok=True)
        (folder / "driver").symlink_to(target)
    if iommu is not None:
        (folder / "iommu_group").mkdir()
        (folder / "iommu_group/type").write_text(f"{iommu}\n")


def test_gpus_are_found_with_and_without_a_driver(tmp_path: Path) -> None:
    add_device(
        tmp_path,
        "0000:3B:00.0",
        driver="nvidia",
        numa_node="1",
        current_link_width="8",
        max_link_width="16",
    )
    add_device(tmp_path, "0000:0a:00.0", driver="nouveau", **{"class": "0x030000"})
    add_device(tmp_path, "0000:86:00.0", numa_node="-1", current_link_width="255", max_link_width="0")
    assert read_pci_devices(tmp_path) == (
        PciDevice(bus_id="0000:0a:00.0", device_id="2335", kernel_driver="nouveau"),
        PciDevice(
            bus_id="0000:3b:00.0", device_id="2335", kernel_driver="nvidia", numa_node=1, link_width=8, link_width_max=16
        ),
        PciDevice(bus_id="0000:86:00.0", device_id="2335"),
    )


def test_numa_node_zero_is_a_node(tmp_path: Path) -> None:
    add_device(tmp_path, "0000:01:00.0", numa_node="0")
    assert read_pci_devices(tmp_path)[0].numa_node == 0


@pytest.mark.parametrize(
    "files", [{"class": "0x068000"}, {"class": "0x040300"}, {"vendor": "0x1002"}, {"vendor": ""}, {"class": ""}]
)
def test_switches_audio_and_other_vendors_are_no_gpus(tmp_path: Path, files: dict[str, str]) -> None:
    add_device(tmp_path, "0000:01:00.0", **files)
    assert read_pci_devices(tmp_path) == ()


def test_machine_without_sysfs_has_no_pci_devices(tmp_path: Path) -> None:
    assert read_pci_devices(tmp_path) == ()


@pytest.mark.parametrize(
    ("kinds", "mode"),
    [
        ([], "unknown"),
        ([None], "off"),
        (["identity"], "passthrough"),
        (["DMA"], "translating"),
        (["DMA-FQ", "identity"], "translating"),
        (["identity", None], "passthrough"),
        (["blocked"], "unknown"),
        (["blocked", "identity"], "unknown"),
    ],
)
def test_iommu_mode_is_that_of_the_gpus(tmp_path: Path, kinds: list[str | None], mode: str) -> None:
    for number, kind in enumerate(kinds):
        add_device(tmp_path, f"0000:0{number}:00.0", iommu=kind)
    assert read_iommu(tmp_path, read_pci_devices(tmp_path)) == mode


@pytest.mark.parametrize(
    ("banner", "version", "is_open"), [(OPEN_BANNER, "580.159.04", True), (CLOSED_BANNER, "535.183.01", False)]
)
def test_kernel_module_is_read_from_its_banner(tmp_path: Path, banner: str, version: str, is_open: bool) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(banner)
    fields = read_driver_files(tmp_path)
    assert (fields["kernel_module_version"], fields["is_open_kernel_module"]) == (version, is_open)


def test_kernel_module_without_a_banner_is_read_from_sysfs(tmp_path: Path) -> None:
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    (tmp_path / "sys/module/nvidia/version").write_text("570.86.15\n")
    fields = read_driver_files(tmp_path)
    assert (fields["kernel_module_version"], fields["is_open_kernel_module"]) == ("570.86.15", None)


def test_no_driver_at_all(tmp_path: Path) -> None:
    assert read_driver_files(tmp_path) == {
        "kernel_module_version": None,
        "is_open_kernel_module": None,
        "device_files": (),
        "forbidden_device_files": (),
    }


def test_device_files_and_those_that_may_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev/nvidia-caps").mkdir(parents=True)
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: allowed(path, mode) and not str(path).endswith("nvidia0"))
    fields = read_driver_files(tmp_path)
    assert fields["device_files"] == ("/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl")
    assert fields["forbidden_device_files"] == ("/dev/nvidia0",)
