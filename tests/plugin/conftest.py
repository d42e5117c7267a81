"""A project to run the plugin on, with a made-up machine and a loader that only says what it does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_vlmgpu.gating.gate
import pytest_vlmgpu.models.loading
import pytest_vlmgpu.watching.watch

# Imported for good: pytester forgets what is first imported inside a run, and imports it anew in the next one.
import pytest_vlmgpu.workers.controller
import pytest_vlmgpu.workers.worker  # noqa: F401
import vlm_doctor.checks
import vlm_doctor.sources.collection  # noqa: F401
from pytest_vlmgpu import declare
from vlm_doctor.codec import to_json
from vlm_doctor.machine import Driver, Gpu, Machine
from vlm_doctor.units import GIB

from .projects import UUIDS, Project

if TYPE_CHECKING:
    from collections.abc import Callable


def _gpu(
    index: int = 0, *, free_gib: float = 22.0, total_gib: float = 22.5, name: str = "NVIDIA L4", **fields: object
) -> Gpu:
    """An L4 unless said otherwise: 22.5 GiB of memory, half a GiB of it the driver's."""
    values: dict[str, object] = {
        "uuid": f"GPU-{index:08d}-0000-0000-0000-000000000000",
        "bus_id": f"0000:{index + 1:02x}:00.0",
        "memory_total_bytes": int(total_gib * GIB),
        "memory_free_bytes": int(free_gib * GIB),
        "memory_reserved_bytes": GIB // 2,
        "compute_capability": (8, 9),
    }
    return Gpu(index=index, name=name, **{**values, **fields})  # type: ignore[arg-type]


def _machine(*gpus: Gpu, **fields: object) -> Machine:
    """A live machine with a working driver."""
    values: dict[str, object] = {
        "origin": "live",
        "description": f"{len(gpus)} GPUs" if gpus else "no GPU",
        "driver": Driver(nvml_state="ok" if gpus else "no_library"),
    }
    return Machine(gpus=gpus, **{**values, **fields})  # type: ignore[arg-type]


@pytest.fixture(name="gpu")
def gpu_builder() -> Callable[..., Gpu]:
    """``gpu(index, free_gib=…, total_gib=…, name=…, any field of Gpu)``."""
    return _gpu


@pytest.fixture(name="machine")
def machine_builder() -> Callable[..., Machine]:
    """``machine(gpu(0), gpu(1), any field of Machine)``."""
    return _machine


@dataclass
class Suite:
    """A project in a temporary folder."""

    pytester: pytest.Pytester

    @property
    def folder(self) -> Path:
        return self.pytester.path

    def has(self, found: Machine) -> None:
        """Run on this machine."""
        (self.folder / "machine.json").write_text(to_json(found))

    def has_none(self) -> None:
        """Run on a machine without GPUs."""
        self.has(_machine())

    def run(self, *arguments: str, **files: str) -> pytest.RunResult:
        """Write test files and run pytest on them, in this process."""
        if files:
            self.pytester.makepyfile(**files)
        # Hypothesis would be imported anew in each run: nine tenths of its time.
        return self.pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments)

    def loads(self) -> list[str]:
        """What the loader did, in order."""
        return [line for line in self.log() if "LOAD" in line]

    def log(self) -> list[str]:
        """What the project wrote down."""
        log = self.folder / "log.txt"
        return log.read_text().splitlines() if log.exists() else []

    def configure(self, text: str = "", *, without: str | None = None) -> None:
        """Add to the project's conftest; ``without`` takes one of its fixtures away."""
        conftest = self.folder / "conftest.py"
        source = conftest.read_text()
        conftest.write_text((source.replace(f"def {without}(", "def unused(") if without else source) + "\n" + text)


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """A project with two L4, both free."""
    for setting in declare.SETTINGS:
        for prefix in declare.ENVIRONMENT_PREFIXES:
            monkeypatch.delenv(f"{prefix}{setting.name.upper()}", raising=False)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "VLMGPU_TESTING"):
        monkeypatch.delenv(name, raising=False)
    # Suites that run beside this one have GPUs of the same names.
    monkeypatch.setenv("VLMGPU_LEASE_DIR", str(pytester.path / "leases"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    # pytester moves HOME; nothing here may look for models in the new one.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, source in (("conftest", "fake_project"), ("made_up_plans", "made_up_plans")):
        (pytester.path / f"{name}.py").write_text(Path(__file__).with_name(f"{source}.py").read_text())
    project = Suite(pytester)
    project.has(_machine(_gpu(0), _gpu(1)))
    return project


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    for name in list(os.environ):
        if name.startswith("PYTEST_") or name == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(name)

    def project(name: str = "project", *, gpus: int = 2, **variables: str) -> Project:
        machine = Machine(
            origin="live",
            description=f"{gpus} GPUs",
            driver=Driver(nvml_state="ok"),
            gpus=tuple(
                Gpu(
                    index=index,
                    name="NVIDIA L4",
                    uuid=UUIDS[index],
                    bus_id=f"0000:{index + 1:02x}:00.0",
                    memory_total_bytes=22 * GIB,
                    memory_free_bytes=22 * GIB,
                    compute_capability=(8, 9),
                )
                for index in range(gpus)
            ),
        )
        (tmp_path / "machine.json").write_text(to_json(machine))
        places = {
            "SHARED_PROJECT": str(tmp_path),
            "PYTEST_VLMGPU_LEASE_DIR": str(tmp_path / "leases"),
            "HF_HUB_OFFLINE": "1",
        }
        return Project(tmp_path / name, tmp_path, {**places, **variables})

    return project
