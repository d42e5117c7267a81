"""Lines of the NVIDIA and IOMMU drivers, as public threads show them, and what is kept of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor.machine import KernelEvent
from vlm_doctor.sources import kernel_log
from vlm_doctor.sources.kernel_log import read_kernel_log, understand

XID_79 = "NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
XID_31 = "NVRM: Xid (PCI:0000:01:00): 31, pid=4711, name=python --token=secret, Ch 00000008, intr 00000000. MMU Fault"


@pytest.mark.parametrize(
    ("text", "event"),
    [
        (XID_79, KernelEvent(kind="xid", code=79, bus_id="0000:5d:00.0")),
        (XID_31, KernelEvent(kind="xid", code=31, bus_id="0000:01:00.0")),
        (
            "NVRM: installed in this system requires use of the NVIDIA open kernel modules.",
            KernelEvent(kind="needs_open_modules"),
        ),
        (
            "NVRM: GPU 0000:01:00.0: RmInitAdapter failed! (0x22:0x56:884)",
            KernelEvent(kind="init_failed", bus_id="0000:01:00.0"),
        ),
        ("NVRM: RmInitAdapter failed! (0x26:0x56:1463)", KernelEvent(kind="init_failed")),
        ("NVRM: _kgspBootGspRm: Cannot initialize GSP firmware RM", KernelEvent(kind="gsp_failed")),
        ("NVRM: The NVIDIA probe routine was not called for 2 device(s).", KernelEvent(kind="not_probed")),
        ("NVRM: API mismatch: the client has the version 550.54.14, but", KernelEvent(kind="api_mismatch")),
        (
            "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:41:00.0 domain=0x0021 address=0xd0000000 flags=0x0030]",
            KernelEvent(kind="iommu_fault", bus_id="0000:41:00.0"),
        ),
        (
            "DMAR: [DMA Write NO_PASID] Request device [01:00.0] fault addr 0xfe800000 [fault reason 0x05]",
            KernelEvent(kind="iommu_fault", bus_id="0000:01:00.0"),
        ),
        ("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.95.05", None),
        ("usb 1-1: new high-speed USB device", None),
        ("DMAR: IOMMU enabled", None),
    ],
)
def test_lines(text: str, event: KernelEvent | None) -> None:
    assert understand(text) == event


def log(root: Path, *lines: str, uptime: str | None = "1000.50 1.0") -> None:
    (root / "dev").mkdir()
    (root / "proc").mkdir()
    (root / "dev/kmsg").write_text("".join(f"{line}\n" for line in lines))
    if uptime is not None:
        (root / "proc/uptime").write_text(uptime)


def test_the_newest_comes_first_and_the_same_event_once(tmp_path: Path) -> None:
    log(tmp_path, f"3,1,100000000,-;{XID_79}", f"3,2,200000000,-;{XID_31}", " SUBSYSTEM=pci", f"3,3,900500000,-;{XID_79}")
    assert read_kernel_log(tmp_path) == (
        KernelEvent(kind="xid", code=79, bus_id="0000:5d:00.0", count=2, last_s_ago=100.0),
        KernelEvent(kind="xid", code=31, bus_id="0000:01:00.0", last_s_ago=800.5),
    )


def test_names_of_processes_are_not_kept(tmp_path: Path) -> None:
    log(tmp_path, f"3,2,200000000,-;{XID_31}")
    assert "secret" not in str(read_kernel_log(tmp_path))


@pytest.mark.parametrize("uptime", [None, "", "soon"])
def test_without_a_clock_the_age_is_unknown(tmp_path: Path, uptime: str | None) -> None:
    log(tmp_path, f"3,2,200000000,-;{XID_31}", uptime=uptime)
    assert [event.last_s_ago for event in read_kernel_log(tmp_path)] == [None]
    (tmp_path / "dev/kmsg").write_text(f"{XID_31};\n;{XID_31}")
    assert len(read_kernel_log(tmp_path)) == 1


def test_a_log_that_may_not_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_kernel_log(tmp_path)


def test_a_flood_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, *[f"3,2,{second},-;NVRM: Xid (PCI:0000:01:00): {second}, x" for second in range(1000)])
    assert len(read_kernel_log(tmp_path)) == 200
    monkeypatch.setattr(kernel_log, "_DEADLINE_S", 0.0)
    assert read_kernel_log(tmp_path) == ()


def test_what_the_kernel_answers_when_it_has_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path)
    answers: list[bytes | OSError] = [BrokenPipeError(), f"3,1,1,-;{XID_79}\n".encode(), BlockingIOError()]

    def read(descriptor: int, size: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, bytes):
            return answer
        raise answer

    monkeypatch.setattr(os, "read", read)
    assert [event.code for event in read_kernel_log(tmp_path)] == [79]


@given(st.text())
def test_any_text_is_understood_or_left(text: str) -> None:
    event = understand(f"NVRM: {text}")
    assert event is None or event.kind
