from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from vlm_doctor.sources import child

_DOUBLE = Path(__file__).with_name("nvml_double.py")


@pytest.fixture
def nvml_double(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], ModuleType]:
    """Load the stand-in for pynvml into this process, playing a scenario."""

    def load(scenario: dict[str, Any]) -> ModuleType:
        monkeypatch.setenv("NVML_DOUBLE", json.dumps(scenario))
        spec = importlib.util.spec_from_file_location("nvml_double", _DOUBLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def double_environment(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, str]]:
    """Environment of a child in which ``import pynvml`` finds the stand-in, playing a scenario."""

    def make(scenario: dict[str, Any]) -> dict[str, str]:
        folder = tmp_path / "nvml_double"
        folder.mkdir(exist_ok=True)
        shutil.copy(_DOUBLE, folder / "pynvml.py")
        return {**os.environ, "PYTHONPATH": str(folder), "NVML_DOUBLE": json.dumps(scenario)}

    return make


@pytest.fixture
def no_children_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test when a process that it started is still there, dead or alive."""
    monkeypatch.setattr(child, "_REAP_S", 60.0)  # a busy machine needs long to end what was killed
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    assert not left, f"processes left behind: {left}"
