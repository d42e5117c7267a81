from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from vlm_doctor.machine import TorchDevice
from vlm_doctor.sources import torch_child
from vlm_doctor.sources.child import Outcome
from vlm_doctor.sources.torch_view import understand

UUID = bytes.fromhex("e51978ddc5cb2c03406aa7a5730d3445")


class FakeCuda:
    """Functions of libcuda that need no context; ``failing`` ones return an error."""

    def __init__(self, names: list[str], failing: tuple[str, ...] = ()) -> None:
        self._names = names
        self._failing = failing
        self.called: list[str] = []

    def __getattr__(self, function: str) -> Callable[..., int]:
        answers: dict[str, Callable[..., None]] = {
            "cuInit": lambda flags: None,
            "cuDeviceGetCount": self._count,
            "cuDeviceGet": self._device,
            "cuDeviceGetName": self._name,
            "cuDeviceTotalMem_v2": self._size,
            "cuDeviceGetUuid_v2": self._uuid,
        }
        if function not in answers or f"no {function}" in self._failing:
            raise AttributeError(function)

        def call(*arguments: Any) -> int:
            self.called.append(function)
            if function in self._failing:
                return 999
            answers[function](*arguments)
            return 0

        return call

    def _count(self, count: Any) -> None:
        count._obj.value = len(self._names)

    def _device(self, device: Any, ordinal: int) -> None:
        device._obj.value = ordinal

    def _name(self, name: Any, length: int, device: Any) -> None:
        name.value = self._names[device.value].encode()

    def _size(self, size: Any, device: Any) -> None:
        size._obj.value = 150109880320

    def _uuid(self, uuid: Any, device: Any) -> None:
        ctypes.memmove(uuid, UUID, 16)


def use(monkeypatch: pytest.MonkeyPatch, library: FakeCuda) -> FakeCuda:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    return library


def test_devices_are_listed_in_the_order_of_cuda_without_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    library = use(monkeypatch, FakeCuda(["NVIDIA H200", "NVIDIA H200 MIG 1g.18gb"]))
    assert torch_child.list_devices() == [
        {
            "ordinal": 0,
            "name": "NVIDIA H200",
            "memory_total_bytes": 150109880320,
            "uuid": "GPU-e51978dd-c5cb-2c03-406a-a7a5730d3445",
        },
        {
            "ordinal": 1,
            "name": "NVIDIA H200 MIG 1g.18gb",
            "memory_total_bytes": 150109880320,
            "uuid": "MIG-e51978dd-c5cb-2c03-406a-a7a5730d3445",
        },
    ]
    assert not any("Ctx" in function for function in library.called)


@pytest.mark.parametrize("failing", ["cuInit", "cuDeviceGetCount"])
def test_driver_that_does_not_start_lists_nothing(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    use(monkeypatch, FakeCuda(["NVIDIA L4"], (failing,)))
    assert torch_child.list_devices() == []


@pytest.mark.parametrize(
    ("failing", "missing"),
    [
        ("cuDeviceGet", {"name", "memory_total_bytes", "uuid"}),
        ("cuDeviceGetName", {"name"}),
        ("cuDeviceTotalMem_v2", {"memory_total_bytes"}),
        ("cuDeviceGetUuid_v2", {"uuid"}),
        ("no cuDeviceGetUuid_v2", {"uuid"}),
    ],
)
def test_what_an_old_driver_does_not_tell_is_left_out(
    monkeypatch: pytest.MonkeyPatch, failing: str, missing: set[str]
) -> None:
    use(monkeypatch, FakeCuda(["NVIDIA L4"], (failing,)))
    (device,) = torch_child.list_devices()
    assert {"ordinal", "name", "memory_total_bytes", "uuid"} - set(device) == missing


def test_machine_without_libcuda_lists_nothing() -> None:
    assert torch_child.list_devices("libcuda-that-is-not-there.so.1") == []


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, dict[str, Any], bool]]]:
    """Run the program in this process against a stand-in for torch; gives what it said."""

    def run(
        *, cuda: str | None, is_available: Callable[[], bool], count: int = 2
    ) -> list[tuple[str, dict[str, Any], bool]]:
        module: Any = SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda=cuda),
            cuda=SimpleNamespace(is_available=is_available, device_count=lambda: count),
        )
        monkeypatch.setitem(sys.modules, "torch", module)
        monkeypatch.setattr(os, "nice", lambda increment: increment)
        said: list[tuple[str, dict[str, Any], bool]] = []
        torch_child.main(lambda stage, answer, is_final=False: said.append((stage, dict(answer), is_final)))
        return said

    return run


def test_answer_grows_stage_by_stage(monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]) -> None:
    use(monkeypatch, FakeCuda(["NVIDIA L4"]))
    said = ask(cuda="13.0", is_available=lambda: True)
    assert [(stage, is_final) for stage, _, is_final in said] == [
        ("import torch", False),
        ("torch.cuda", False),
        ("libcuda", True),
    ]
    view = understand(Outcome(state="ok", answer=said[-1][1], stage="libcuda", seconds=1.23456))
    assert (view.version, view.cuda, view.is_available, view.device_count) == ("2.13.0", "13.0", True, 2)
    assert [device.name for device in view.devices] == ["NVIDIA L4"]
    assert (view.message, view.seconds) == (None, 1.235)


def test_cpu_build_is_not_asked_for_devices(monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]) -> None:
    library = use(monkeypatch, FakeCuda(["NVIDIA L4"]))
    said = ask(cuda=None, is_available=lambda: False, count=0)
    assert "devices" not in said[-1][1]
    assert library.called == []


def test_warning_why_cuda_is_not_available_becomes_the_message(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Any]
) -> None:
    use(monkeypatch, FakeCuda([], ("cuInit",)))

    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old\n(found version 12080).", stacklevel=2)
        return False

    said = ask(cuda="13.0", is_available=is_available)
    view = understand(Outcome(state="ok", answer=said[-1][1]))
    # NVML would still count two GPUs that CUDA cannot use.
    assert (view.is_available, view.device_count) == (False, 0)
    assert view.message == "The NVIDIA driver on your system is too old (found version 12080)."


def test_crash_after_the_import_keeps_the_version() -> None:
    view = understand(
        Outcome(state="crashed", answer={"version": "2.13.0", "cuda": "13.0"}, stage="import torch", message="SIGSEGV")
    )
    assert (view.state, view.version, view.message) == ("crashed", "2.13.0", "SIGSEGV, after import torch")


def test_unreadable_answer_is_a_crash() -> None:
    view = understand(Outcome(state="ok", answer={"device_count": "many"}))
    assert view.state == "crashed"
    assert view.message is not None
    assert view.message.startswith("unreadable answer: ")


def test_device_records_are_read() -> None:
    answer = {"devices": [{"ordinal": 0, "uuid": "GPU-1", "name": "x", "memory_total_bytes": 5}]}
    assert understand(Outcome(state="ok", answer=answer)).devices == (
        TorchDevice(ordinal=0, uuid="GPU-1", name="x", memory_total_bytes=5),
    )
