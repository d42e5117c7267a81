"""The conftest of projects that share a made-up machine: it is copied there, not imported here.

Free memory is what machine.json says less what the models take that are loaded now, in any process that lives: a zombie,
which some containers' first process leaves for seconds, has none. Every load is written down with its process, the GPUs
it uses and what CUDA would be shown.
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from made_up_plans import place
from msgspec.structs import replace

from pytest_vlmgpu.leasing.holders import is_running
from vlm_doctor.codec import from_json
from vlm_doctor.machine import Gpu, GpuProcess, Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_vlmgpu import VlmSpec
    from vlm_doctor.placement import Plan

FOLDER = Path(os.environ.get("SHARED_PROJECT", Path(__file__).parent))
"""Of the machine and the log: several projects may share them."""
LOAD_S = float(os.environ.get("SHARED_PROJECT_LOAD_S", "0"))


def log(line: str) -> None:
    with (FOLDER / "log.txt").open("a") as file:
        file.write(f"{line}\n")


def pytest_vlmgpu_inventory(config: pytest.Config) -> Machine:
    machine = from_json((FOLDER / "machine.json").read_bytes(), Machine, where="machine.json")
    environment = dict(machine.environment)
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return replace(machine, gpus=tuple(map(_as_it_is_now, machine.gpus)), environment=environment)


def _as_it_is_now(gpu: Gpu) -> Gpu:
    processes = []
    for path in sorted((FOLDER / "memory").glob(f"{gpu.uuid}.*")):
        pid = int(path.suffix[1:])
        if is_running(pid):
            sizes = path.read_text().split()
            processes.append(GpuProcess(pid=pid, kind="compute", used_bytes=sum(map(int, sizes))))
    used_bytes = sum(process.used_bytes or 0 for process in processes)
    return replace(gpu, memory_free_bytes=(gpu.memory_free_bytes or 0) - used_bytes, processes=tuple(processes))


def hold(uuid: str, size_bytes: int) -> None:
    """Add to what this process holds of a GPU; a negative size gives it back."""
    (FOLDER / "memory").mkdir(exist_ok=True)
    path = FOLDER / "memory" / f"{uuid}.{os.getpid()}"
    held = path.read_text() if path.exists() else ""
    path.write_text(f"{held} {size_bytes}")


@pytest.fixture(scope="session")
def vlm_planner() -> Callable[[VlmSpec, Machine, tuple[int, ...]], Plan]:
    planner: Callable[[VlmSpec, Machine, tuple[int, ...]], Plan] = place
    return planner


@pytest.fixture(scope="session")
def vlm_loader() -> Callable[..., Any]:
    return load


@contextmanager
def load(spec: VlmSpec, plan: Plan | None) -> Iterator[Any]:
    """Take the memory of the plan while the model is there."""
    stages = plan.stages if plan is not None else ()
    gpus = ",".join(str(stage.gpu) for stage in stages) or "cpu"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    log(f"LOAD {spec.name} gpus={gpus} worker={worker} sees={os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}")
    for each in stages:
        hold(each.uuid, each.total_bytes)
    time.sleep(LOAD_S)
    yield SimpleNamespace(name=spec.name, plan=plan, gpus=stages)
    for each in stages:
        if spec.name != "org/sticky":
            hold(each.uuid, -each.total_bytes)
    log(f"UNLOAD {spec.name}")
