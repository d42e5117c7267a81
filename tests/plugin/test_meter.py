"""Peaks are read from torch where it is in use, and nothing is started to read them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_vlmgpu.watching.meter import Meter, Peak


class _Cuda:
    """torch.cuda of two GPUs, the second one unused."""

    def __init__(self, *, is_initialized: bool) -> None:
        self._is_initialized = is_initialized
        self.resets: list[int] = []

    def is_initialized(self) -> bool:
        return self._is_initialized

    def device_count(self) -> int:
        return 2

    def reset_peak_memory_stats(self, ordinal: int) -> None:
        self.resets.append(ordinal)

    def max_memory_allocated(self, ordinal: int) -> int:
        return (700, 0)[ordinal]

    def max_memory_reserved(self, ordinal: int) -> int:
        return (1024, 0)[ordinal]


def test_only_gpus_that_held_tensors_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = _Cuda(is_initialized=True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    meter = Meter()
    meter.start()
    assert cuda.resets == [0, 1]
    assert meter.stop() == {0: Peak(allocated=700, reserved=1024)}


@pytest.mark.parametrize("torch", [None, SimpleNamespace(), SimpleNamespace(cuda=_Cuda(is_initialized=False))])
def test_without_cuda_in_use_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch, torch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    meter = Meter()
    meter.start()
    assert meter.stop() == {}


def test_metering_and_importing_the_loader_import_no_torch() -> None:
    program = (
        "import sys, pytest_vlmgpu.models.loading, pytest_vlmgpu.testing; from pytest_vlmgpu.watching.meter import Meter;"
        "m = Meter(); m.start(); m.stop(); sys.exit(bool({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
